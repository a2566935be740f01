"""The page: one photo, many photos, and how it works; and the same functions as an API."""

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from app.service import (
    PHOTO_WIDTH,
    Refused,
    Service,
    Settings,
    as_csv,
    as_json,
    as_zip,
    return_memory,
    settings_of,
    view,
)
from captioner import Caption
from captioner.heatmap import ANCHORS, colour_table, shrink

ASSETS = Path(__file__).parent / "assets"
SAMPLES = ("photographer.jpg", "astronaut.jpg", "cat.jpg", "coffee.jpg", "raccoon.jpg", "rocket.jpg")
BATCH = 32  # photographs that go through the network together
KEEP_SECONDS = 3600  # uploads and downloads are deleted after an hour
# The fonts of the user's own machine: the page asks no other host for anything.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_700",  # on which white text can be read
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
)

# The footer in the colour of the text, which can be read on its ground; samples as large as pictures.
CSS = """
footer *, .or { color: var(--body-text-color) !important }
.samples { display: grid; grid-template-columns: repeat(3, 1fr) }
.sample { flex-direction: column; height: auto; padding: .4rem; font-size: .8rem; min-width: 0 !important }
.sample img { width: 100%; max-width: 7rem; height: 4.5rem; object-fit: cover; border-radius: 4px; margin: 0 }
"""
PROGRESS = gr.Progress()  # Gradio puts the request's own in its place


def photo_input(**options: Any) -> gr.Image:
    """An image component that hands on the file as it came, so that the library reads it and says what is wrong."""
    image = gr.Image(type="filepath", image_mode=None, **options)
    setattr(image, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
    return image


def build(
    service: Service, samples: Path | None = None, concurrency: int = 1, keep_seconds: int = KEEP_SECONDS
) -> gr.Blocks:
    """The page for a service.

    Args:
        service: what answers.
        samples: folder of sample pictures, shown where it has any.
        concurrency: batches that are captioned at the same time.
        keep_seconds: uploads and downloads are deleted after so long.
    """
    names = list(service.models)
    tables = {name: colour_table(name).astype(int).tolist() for name in ANCHORS}
    # The network always runs in the same few threads: each that ever ran it keeps memory of its own.
    workers = ThreadPoolExecutor(concurrency, thread_name_prefix="captions")

    def answer(paths: list[str | None], settings: list[Settings]) -> list[Caption | str]:
        found = workers.submit(service.caption, list(zip(paths, settings, strict=True))).result()
        return_memory()
        return found

    def caption_page(path: list[str | None], chosen: list[list[str]], *options: list[Any]) -> list[list[Any]]:
        """What many people asked for at the same time, as the viewer and the table of steps show it."""
        asked: list[tuple[int, str, Settings]] = []
        views: list[dict[str, Any]] = [{} for _ in path]
        for person, values in enumerate(zip(*options, strict=True)):
            try:
                for name in chosen[person] or names[:1]:
                    asked.append((person, name, settings_of(name, *values)))
            except Refused as error:
                views[person] = {"error": str(error)}
        asked = [one for one in asked if not views[one[0]]]
        steps: list[dict[str, Any]] = [{} for _ in path]
        found = answer([path[person] for person, *_ in asked], [settings for *_, settings in asked])
        for (person, name, _), one in zip(asked, found, strict=True):
            if isinstance(one, str):
                views[person] = {"error": one}
            elif "error" not in views[person]:
                views[person].setdefault("results", []).append({"model": name, **view(one)})
                if not steps[person]:
                    steps[person] = {"steps": workers.submit(service.explain, one, name).result()}
        return [views, steps]

    def caption(
        image: list[str | None],
        model: list[str],
        beam_size: list[float],
        captions: list[float],
        max_length: list[float],
        sampling: list[bool],
        temperature: list[float],
        top_p: list[float],
        seed: list[float],
    ) -> list[list[dict[str, Any]]]:
        """A caption as JSON: caption, log_probability, words, alternatives, attention; or error."""
        asked: list[tuple[str | None, Settings]] = []
        refused: dict[int, str] = {}
        every = zip(model, beam_size, captions, max_length, sampling, temperature, top_p, seed, strict=True)
        for person, (photo, values) in enumerate(zip(image, every, strict=True)):
            try:
                asked.append((photo, settings_of(*values)))
            except Refused as error:
                refused[person] = str(error)
        found = iter(answer([photo for photo, _ in asked], [settings for _, settings in asked]))
        return [[plain(refused[person] if person in refused else next(found)) for person in range(len(image))]]

    def caption_batch(
        images: list[str] | None,
        model: str,
        beam_size: float,
        captions: float,
        max_length: float,
        sampling: bool,
        temperature: float,
        top_p: float,
        seed: float,
    ) -> list[dict[str, Any]]:
        """Captions of many files as JSON, in their order; what failed has an error."""
        try:
            settings = settings_of(model, beam_size, captions, max_length, sampling, temperature, top_p, seed)
        except Refused as error:
            return [{"error": str(error)}]
        rows = []
        for first in range(0, len(images or []), BATCH):
            part = (images or [])[first : first + BATCH]
            found = answer(list(part), [settings] * len(part))
            rows += [{"file": Path(path).name, **plain(one)} for path, one in zip(part, found, strict=True)]
        return rows

    def caption_many(
        paths: list[str] | None, chosen: list[str], *options: Any, progress: Any = PROGRESS
    ) -> Iterator[tuple[Any, ...]]:
        """The gallery, the table and the files of many photographs."""
        try:
            if not paths:
                raise Refused("Choose some photos first.")
            settings = settings_of((chosen or names)[0], *options)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error
        rows: list[dict[str, Any]] = []
        good: list[tuple[str, Caption]] = []
        for first in range(0, len(paths), BATCH // 4):
            progress((first, len(paths)), desc="Captioning", unit="photos")
            part = paths[first : first + BATCH // 4]
            for path, one in zip(part, answer(list(part), [settings] * len(part)), strict=True):
                name = Path(path).name
                if isinstance(one, Caption):
                    # The gallery and the heatmaps need no more of the photograph than this, and there may be many.
                    small = shrink(one.image, PHOTO_WIDTH, enlarge=False)
                    good.append((name, replace(one, image=small, alternatives=())))
                    rows.append({"file": name, "confidence": round(one.confidence, 3), **plain(one)})
                else:
                    rows.append({"file": name, "error": one})
            shown = gr.Gallery([(one.image, one.sentence()) for _, one in good], visible=bool(good))
            yield shown, cells(rows), *[gr.skip()] * 3
        files = {
            "captions.json": as_json(rows),
            "captions.csv": as_csv(rows),
            "heatmaps.zip": as_zip([name for name, _ in good], [one for _, one in good]),
        }
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            # Gradio copies them into its cache, where they are deleted after a while like the uploads.
            buttons = [gr.DownloadButton(value=str(Path(folder) / name), interactive=True) for name in files]
            yield gr.skip(), cells(rows), *buttons

    with gr.Blocks(
        title="captioner", analytics_enabled=False, delete_cache=(max(1, keep_seconds // 4), keep_seconds)
    ) as page:
        gr.Markdown("# captioner\nShow it a photo: it says what it sees, and for every word *where* it looked.")
        with gr.Tabs():
            with gr.Tab("One photo"), gr.Row():
                with gr.Column(scale=2, min_width=280):
                    photo = photo_input(
                        label="Photo",
                        sources=["upload", "clipboard", "webcam"],
                        elem_id="photo",
                        height=320,
                    )
                    files = [samples / name for name in SAMPLES if samples and (samples / name).is_file()]
                    with gr.Row(elem_classes="samples"):
                        for file in files:
                            sample = gr.Button(file.stem.capitalize(), icon=file, min_width=70, elem_classes="sample")
                            sample.click(partial(str, file), None, photo, api_visibility="private", queue=False)
                    chosen = gr.CheckboxGroup(
                        names, value=names[:1], label="Models, side by side", visible=len(names) > 1
                    )
                    with gr.Accordion("Settings", open=False):
                        settings: list[Any] = [
                            gr.Slider(1, 10, 5, step=1, label="Beam size", info="Captions followed at a time."),
                            gr.Slider(1, 10, 3, step=1, label="Captions", info="How many to show."),
                            gr.Slider(3, 30, 22, step=1, label="Maximum length", info="In words."),
                            gr.Checkbox(False, label="Draw words by chance instead of searching"),
                            gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", info="Below 1 safer, above bolder."),
                            gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="Only the likeliest words."),
                            gr.Number(0, label="Seed", precision=0, minimum=0),
                        ]
                with gr.Column(scale=3, min_width=300):
                    viewer = gr.HTML(
                        html_template='<div class="viewer" aria-live="polite"></div>',
                        css_template=(ASSETS / "viewer.css").read_text("utf-8"),
                        js_on_load=(ASSETS / "viewer.js").read_text("utf-8"),
                        elem_id="viewer",
                        tables=tables,
                        map_size=28,
                    )
            with gr.Tab("Many photos"):
                many = gr.File(label="Photos", file_count="multiple", elem_id="many", height=180)
                start = gr.Button("Caption them all", variant="primary")
                table = gr.Dataframe(
                    headers=["File", "Caption", "Confidence", "Problem"],
                    label="Captions",
                    interactive=False,
                    wrap=True,
                    column_widths=["20%", "40%", "14%", "26%"],
                    elem_id="table",
                )
                gallery = gr.Gallery(
                    label="Photos with their captions", columns=4, object_fit="contain", height="auto", visible=False
                )
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(f"Download {kind}", interactive=False, elem_id=f"download-{kind.lower()[:4]}")
                        for kind in ("JSON", "CSV", "heatmaps (ZIP)")
                    ]
            with gr.Tab("How it works"):
                gr.Markdown(
                    "Before each word the network scores every region of the photo against its state, makes the scores "
                    "weights that sum to 1, and looks at the weighted sum. Move the slider through the words."
                )
                steps = gr.HTML(
                    html_template='<div class="steps"></div>',
                    css_template=(ASSETS / "steps.css").read_text("utf-8"),
                    js_on_load=(ASSETS / "steps.js").read_text("utf-8"),
                    elem_id="steps",
                )
        gr.on(
            [photo.change, chosen.input, *(one.input for one in settings)],
            caption_page,
            [photo, chosen, *settings],
            [viewer, steps],
            batch=True,
            max_batch_size=BATCH,
            concurrency_limit=concurrency,
            show_progress_on=[viewer],
            api_visibility="private",
            trigger_mode="always_last",
        )
        start.click(
            caption_many,
            [many, chosen, *settings],
            [gallery, table, *downloads],
            concurrency_limit=concurrency,
            api_visibility="private",
        )
        # The API has inputs of its own, so that their order is not that of the page.
        with gr.Row(visible=False):
            api_photo, api_files = photo_input(label="image"), gr.File(file_count="multiple", label="images")
            api_options = [
                gr.Textbox("", label="model"),
                gr.Number(5, label="beam_size"),
                gr.Number(1, label="captions"),
                gr.Number(22, label="max_length"),
                gr.Checkbox(False, label="sampling"),
                gr.Number(1.0, label="temperature"),
                gr.Number(0.9, label="top_p"),
                gr.Number(0, label="seed"),
            ]
            result, run_one, run_many = gr.JSON(), gr.Button("one"), gr.Button("many")
        run_one.click(
            caption,
            [api_photo, *api_options],
            result,
            api_name="caption",
            batch=True,
            max_batch_size=BATCH,
            concurrency_limit=concurrency,
        )
        run_many.click(
            caption_batch, [api_files, *api_options], result, api_name="caption_batch", concurrency_limit=concurrency
        )
    return page


def plain(answer: Caption | str) -> dict[str, Any]:
    """A caption as JSON, or why there is none."""
    return {"error": answer} if isinstance(answer, str) else answer.to_dict(attention=True)


def cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The rows as the table on the page shows them."""
    return [[row["file"], row.get("caption", ""), row.get("confidence", ""), row.get("error", "")] for row in rows]
