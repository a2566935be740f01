"""Open the demo: `python -m app`."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from captioner import Captioner, CheckpointError, list_models
from captioner.cli import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 closed, 1 it could not start, 2 wrong usage."""
    options = parse(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
        import uvicorn
    except ImportError:
        print("the page needs Gradio: pip install 'captioner[app]'", file=sys.stderr)
        return 1
    from app.server import create

    try:
        named = by_display_name(options.model)
        models = {shown: Captioner.from_pretrained(model, options.device) for shown, model in named.items()}
        auth = read_auth(options.auth_file) if options.auth_file else None
        server = create(models, auth, options.max_upload_mb, options.concurrency, options.queue, options.root_path)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    del gradio
    print(f"http://{options.host}:{options.port}{options.root_path}", file=sys.stderr)
    uvicorn.run(server, host=options.host, port=options.port, log_level="warning")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="A page that captions photos and shows where the network looked for every word.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        help="model folder or name; give several to compare them; without any, all models in the package are offered",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=positive, default=7860, help="port to listen on")
    parser.add_argument("--auth-file", metavar="FILE", help="who may enter: a line NAME:PASSWORD for each")
    parser.add_argument("--max-upload-mb", type=positive, default=20, metavar="N", help="larger files are refused")
    parser.add_argument("--concurrency", type=positive, default=1, metavar="N", help="batches captioned at a time")
    parser.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that may wait")
    parser.add_argument("--root-path", default="", metavar="PATH", help="the page's path behind a reverse proxy")
    parser.add_argument("--device", help="cpu, cuda, mps, or auto for a GPU where there is one (default: cpu)")
    options = parser.parse_args(arguments)
    options.model = options.model or [model.name for model in list_models()]
    return options


def by_display_name(models: Sequence[str]) -> dict[str, str]:
    """Each model by its name on the page: the last part of its path, or all of it where two models share that part."""
    last = {model: Path(model).name or model for model in models}
    count = Counter(last.values())
    return {model if count[name] > 1 else name: model for model, name in last.items()}


def read_auth(path: str) -> list[tuple[str, str]]:
    """Names and passwords from a file. Raises ValueError for a line that is none, OSError where it cannot be read."""
    pairs = []
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        if not (name and colon and password):
            raise ValueError(f"{path}, line {number}: should be NAME:PASSWORD")
        pairs.append((name, password))
    if not pairs:
        raise ValueError(f"{path} names nobody")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
