"""Start the demo: `captioner-demo`, or `python -m app` in a checkout."""

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

from captioner import Captioner, CheckpointError, list_models
from captioner.cli import positive

from .auth import Passwords, ask_password


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is stopped. Returns the exit status: 0 stopped, 1 it could not start, 2 wrong usage."""
    options = parse(arguments)
    if options.hash_password is not None:
        return print_hash(options.hash_password)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        from .server import configure, create
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "uvicorn"):
            raise
        print("the demo needs Gradio: pip install 'captioner[app]'", file=sys.stderr)
        return 1
    try:
        named = by_display_name(options.model)
        models = {shown: Captioner.from_pretrained(model, options.device) for shown, model in named.items()}
        auth = Passwords.read(options.auth_file) if options.auth_file else None
        server = create(
            models,
            auth,
            options.max_upload_mb,
            options.concurrency,
            options.queue,
            options.root_path,
            max_disk_mb=options.max_disk_mb,
        )
    except (CheckpointError, ImportError, ValueError, OSError) as error:
        print(f"{command()}: {error}", file=sys.stderr)
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
        print(f"{command()}: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> str:
    """How this program was started, for messages: the console command, or `python -m` and the package."""
    name = Path(sys.argv[0]).stem
    return name if name == "captioner-demo" else f"python -m {__package__}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog=command(),
        description="Serve a page that captions photos and shows the attention map of every word.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        help="folder or name of a model; repeat it to offer several (default: all models in the package)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 admits other machines")
    parser.add_argument("--port", type=positive, default=7860, help="port to listen on")
    parser.add_argument("--auth-file", metavar="FILE", help="require a login; a line is NAME:PASSWORD")
    parser.add_argument(
        "--hash-password",
        metavar="NAME",
        help="ask for NAME's password, print the line for --auth-file with its hash, and exit",
    )
    parser.add_argument("--max-upload-mb", type=positive, default=20, metavar="N", help="larger files are refused")
    parser.add_argument(
        "--max-disk-mb",
        type=positive,
        default=2000,
        metavar="N",
        help="size of all uploads and downloads; beyond it the oldest are deleted",
    )
    parser.add_argument("--concurrency", type=positive, default=1, metavar="N", help="batches at the same time")
    parser.add_argument("--queue", type=positive, default=64, metavar="N", help="requests that may wait")
    parser.add_argument("--root-path", default="", metavar="PATH", help="the page's path behind a reverse proxy")
    parser.add_argument("--device", help="cpu, cuda, mps, or auto for a GPU where there is one (default: cpu)")
    options = parser.parse_args(arguments)
    options.model = options.model or [model.name for model in list_models()]
    return options


def by_display_name(models: Sequence[str]) -> dict[str, str]:
    """The models by their names on the page: the last part of the path, or the whole path if two share that part."""
    last = {model: Path(model).name or model for model in models}
    count = Counter(last.values())
    return {model if count[name] > 1 else name: model for model, name in last.items()}


def program() -> NoReturn:
    """Run the command as a process of its own, and end the process."""
    # uvicorn raises the signal again after its shutdown: handled like Ctrl-C, it lets the uploads be deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="captioner-") as folder:
        # A folder for the uploads of this server alone: other servers on this machine may use Gradio too.
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        status = main()
    sys.stdout.flush()
    os._exit(status)  # do not wait for a batch whose answers nobody awaits


if __name__ == "__main__":
    program()
