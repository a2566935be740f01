"""The page as a web application, with what surrounds it: health, limits, and a cache that is emptied."""

from pathlib import Path

import gradio as gr
from fastapi import FastAPI

from app.page import CSS, KEEP_SECONDS, THEME, build
from app.service import Service
from captioner import Captioner

SAMPLES = Path(__file__).parent / "assets" / "samples"
FAVICON = Path(__file__).parent / "assets" / "favicon.svg"


def create(
    models: dict[str, Captioner],
    auth: list[tuple[str, str]] | None = None,
    max_upload_mb: int = 20,
    concurrency: int = 1,
    queue: int = 64,
    root_path: str = "",
    keep_seconds: int = KEEP_SECONDS,
) -> FastAPI:
    """The whole application, to be served by uvicorn.

    Args:
        models: by the name that the page shows; at least one.
        auth: names and passwords of those who may enter; None for everybody.
        max_upload_mb: larger files are refused.
        concurrency: batches that are captioned at the same time.
        queue: requests that may wait; those who come when it is full are told so.
        root_path: where a reverse proxy shows the page.
        keep_seconds: uploads and downloads are deleted after so long.
    """
    server = FastAPI(title="captioner", docs_url=None, redoc_url=None, openapi_url=None)

    @server.get("/health")
    def health() -> dict[str, object]:
        """Whether the server is up, and with which models."""
        return {"status": "ok", "models": list(models)}

    page = build(Service(models), SAMPLES, concurrency, keep_seconds)
    page.queue(max_size=queue, default_concurrency_limit=concurrency)
    page.has_launched = True  # as Blocks.launch() says; only then does Gradio refuse paths that nobody uploaded
    return gr.mount_gradio_app(
        server,
        page,
        path="/",
        auth=auth,
        max_file_size=max_upload_mb * 1024 * 1024,
        root_path=root_path or None,
        show_error=True,
        allowed_paths=[str(SAMPLES)],
        favicon_path=FAVICON,
        ssr_mode=False,
        theme=THEME,
        css=CSS,
        footer_links=["api"],
    )
