"""Open the demo: `python -m app`."""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from app.auth import Passwords, ask_password
from captioner import Captioner, CheckpointError, list_models
from captioner.cli import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status: 0 closed, 1 it could not start, 2 wrong usage."""
    options = parse(arguments)
    if options.hash_password is not None:
        return print_hash(options.hash_password)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from app.server import configure, create
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "uvicorn"):
            raise
        print("the page needs Gradio: pip install 'captioner[app]'", file=sys.stderr)
        return 1
    try:
        named = by_display_name(options.model)
        models = {shown: Captioner.from_pretrained(model, options.device) for shown, model in named.items()}
        auth = Passwords.read(options.auth_file) if options.auth_file else None
        server = create(models, auth, options.max_upload_mb, options.concurrency, options.queue, options.root_path)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    print(f"http://{options.host}:{options.port}{options.root_path}", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        configure(server, options.host, options.port, log_level="warning").run()
    return 0


def print_hash(name: str) -> int:
    """Print a line for the file of `--auth-file`. Returns the exit status."""
    try:
        print(ask_password(name))
    except ValueError as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
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
    parser.add_argument(
        "--hash-password",
        metavar="NAME",
        help="ask for NAME's password, print a line for the file of --auth-file with its hash, and exit",
    )
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


def program() -> NoReturn:
    """Run the command in a process of its own."""
    # After a stop uvicorn raises the signal again: as that of Ctrl-C it leaves time to delete the uploads.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        # Uploads have a folder of their own, apart from those of other servers with Gradio on this machine.
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        status = main()
    sys.stdout.flush()
    os._exit(status)  # a batch that nobody waits for any more must not hold up the end


if __name__ == "__main__":
    program()
