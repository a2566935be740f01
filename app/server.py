"""The page as a web application: its limits, /health, an orderly shutdown, and the deletion of uploads."""

import asyncio
import contextlib
import importlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.server_messages import ProcessCompletedMessage
from gradio.utils import get_upload_folder
from starlette.routing import Mount

from captioner import Captioner
from captioner.web import FILES

from .auth import Passwords
from .guard import Gate, Page
from .handlers import Handlers
from .page import CSS, KEEP_SECONDS, THEME, build
from .service import Service
from .uploads import Uploads

SAMPLES = FILES / "samples"
FAVICON = FILES / "favicon.svg"
GRACE_SECONDS = 3  # for which running requests go on when the server is told to stop
STOPPED = "The server was stopped before this request was answered: send it again."
SESSIONS = 256  # pages whose last values are kept; Gradio's default of 10,000 would fill the memory


def create(
    models: dict[str, Captioner],
    auth: Passwords | None = None,
    max_upload_mb: int = 20,
    concurrency: int = 1,
    queue: int = 64,
    root_path: str = "",
    keep_seconds: int = KEEP_SECONDS,
    max_disk_mb: int = 2000,
) -> FastAPI:
    """The web application, to be served by uvicorn.

    Args:
        models: by the name that the page shows; at least one.
        auth: names and passwords of those who may log in; None admits everybody.
        max_upload_mb: larger files are refused.
        concurrency: batches that are captioned at the same time.
        queue: requests that may wait; with a full queue further ones are refused.
        root_path: the page's path behind a reverse proxy.
        keep_seconds: age in seconds at which uploads and downloads are deleted.
        max_disk_mb: size of all uploads and downloads beyond which the oldest are deleted.
    """
    with contextlib.suppress(ImportError):
        # Gradio imports it at the first request, and would answer nobody else meanwhile.
        importlib.import_module("matplotlib.pyplot")
    service = Service(models, concurrency=concurrency)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(uploads.sweep())
        yield
        sweeping.cancel()
        service.close()

    server = FastAPI(title="captioner", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @server.get("/health")
    async def health() -> dict[str, object]:
        """Whether the server is up, and with which models. It needs no thread, so it answers however busy they are."""
        return {"status": "ok", "models": list(models)}

    # Gradio's statistics, which are not shown here, grow with every request and are computed anew after each.
    os.environ |= {"GRADIO_ANALYTICS_MAX_EVENTS": "1", "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**9)}
    handlers = Handlers(service)
    page = build(handlers, SAMPLES, concurrency, keep_seconds)
    folder = Path(get_upload_folder())
    uploads = Uploads(folder, page, handlers.pictures_in_use, max_disk_mb * 1024 * 1024, keep_seconds)
    page.queue(max_size=queue, default_concurrency_limit=concurrency, api_open=False)
    mount(server, page, uploads, auth, max_upload_mb, root_path)
    return server


def mount(
    server: FastAPI, page: Page, uploads: Uploads, auth: Passwords | None, max_upload_mb: int, root_path: str
) -> None:
    """Serve the page at the root of the server, behind the Gate; for the arguments see `create`."""
    os.environ["GRADIO_RUN_HISTORY"] = "False"  # or clients could have the server write to the Hub
    page.has_launched = True  # as Blocks.launch() sets it; only then does Gradio refuse paths that were not uploaded
    page.state_session_capacity = SESSIONS
    gr.mount_gradio_app(
        server,
        page,
        path="/",
        auth=auth.check if auth else None,
        max_file_size=max_upload_mb * 1024 * 1024,
        root_path=root_path or None,
        show_error=False,  # clients see the messages of gradio.Error, not those of every exception
        allowed_paths=[str(SAMPLES)],
        favicon_path=FAVICON,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
        footer_links=["api"],
    )
    server.state.page, server.state.gradio = page, next(one.app for one in server.routes if isinstance(one, Mount))
    server.add_middleware(Gate, page=page, gradio=server.state.gradio, uploads=uploads)


class Server(uvicorn.Server):
    """uvicorn, but requests that wait when it is told to stop get an answer: a caption in time, or an error."""

    async def shutdown(self, sockets: Any = None) -> None:
        """Take no new connections, let running requests end, answer the rest with an error, and close."""
        for listener in self.servers:
            listener.close()
        app: Any = self.config.app
        await drain(app.state.page, GRACE_SECONDS)
        app.state.gradio.stop_event.set()  # ends the heartbeats of open pages
        await super().shutdown(sockets)


def configure(server: FastAPI, host: str, port: int, **options: Any) -> Server:
    """The application, ready to `run()`."""
    return Server(uvicorn.Config(server, host, port, timeout_graceful_shutdown=1, **options))


async def drain(page: gr.Blocks, seconds: float) -> None:
    """Let the queue go on for that many seconds, then answer all waiting requests with `STOPPED`."""
    queue, until = page._queue, time.monotonic() + seconds
    while (any(queue.active_jobs) or len(queue)) and time.monotonic() < until:
        await asyncio.sleep(0.05)
    for waiting in queue.event_queue_per_concurrency_id.values():
        waiting.queue.clear()
    for event in list(queue.event_ids_to_events.values()):
        queue.send_message(event, ProcessCompletedMessage(output={"error": STOPPED}, success=False))
    await asyncio.sleep(0.2)  # until the answers are sent
    queue.close()
