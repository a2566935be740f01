"""The page: one photo, many photos, and how it works; and the same functions as an API."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache

from app.guard import Page
from app.service import (
    PHOTO_WIDTH,
    Refused,
    Request,
    Service,
    as_csv,
    as_json,
    as_zip,
    guarded,
    read_settings,
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


def hand_on(component: Any) -> None:
    """Let a component hand on its values as they came, so that `settings_of` says what is wrong with them."""
    component.preprocess = lambda payload: payload


def build(
    service: Service, samples: Path | None = None, concurrency: int = 1, keep_seconds: int = KEEP_SECONDS
) -> Page:
    """The page for a service.

    Args:
        service: what answers.
        samples: folder of sample pictures, shown where it has any.
        concurrency: batches that are captioned at the same time.
        keep_seconds: uploads and downloads are deleted after so long.
    """
    names = list(service.models)
    tables = {name: colour_table(name).astype(int).tolist() for name in ANCHORS}

    def models_of(chosen: Any) -> list[Any]:
        """The models that somebody chose, each once; the first where none was. Unknown ones are refused later."""
        if not isinstance(chosen, list):
            return [chosen] if chosen else names[:1]
        unknown = [name for name in chosen if name not in names]
        return unknown[:1] or list(dict.fromkeys(chosen)) or names[:1]

    def caption_page(path: list[Any], chosen: list[Any], *options: list[Any]) -> list[list[Any]]:
        """What many people asked for at the same time, as the viewer and the table of steps show it."""
        asked: list[tuple[int, Any, Request]] = []
        for person, values in enumerate(zip(*options, strict=True)):
            for name in models_of(chosen[person]):
                asked.append((person, name, (path[person], read_settings(name, *values))))
        views: list[dict[str, Any]] = [{} for _ in path]
        steps: list[dict[str, Any]] = [{} for _ in path]
        found = service.answer([request for *_, request in asked], keep_annotations=True)
        for (person, name, _), one in zip(asked, found, strict=True):
            shown = one if isinstance(one, str) else guarded(partial(show, name, one))
            if isinstance(shown, str):
                views[person] = {"error": shown}
            elif "error" not in views[person]:
                views[person].setdefault("results", []).append(shown[0])
                steps[person] = steps[person] or shown[1]
        return [views, steps]

    def show(name: str, answer: Caption) -> tuple[dict[str, Any], dict[str, Any]]:
        """A caption for the viewer, and its steps."""
        return {"model": name, **view(answer)}, {"steps": service.explain(answer, name)}

    def caption(
        image: list[Any],
        model: list[Any],
        beam_size: list[Any],
        captions: list[Any],
        max_length: list[Any],
        sampling: list[Any],
        temperature: list[Any],
        top_p: list[Any],
        seed: list[Any],
    ) -> list[list[dict[str, Any]]]:
        """A caption as JSON: caption, log_probability, words, alternatives, attention; or error."""
        every = zip(model, beam_size, captions, max_length, sampling, temperature, top_p, seed, strict=True)
        asked = [(photo, read_settings(*values)) for photo, values in zip(image, every, strict=True)]
        return [[plain(one) for one in service.answer(asked)]]

    def caption_batch(
        images: list[Any] | Refused | None,
        model: Any,
        beam_size: Any,
        captions: Any,
        max_length: Any,
        sampling: Any,
        temperature: Any,
        top_p: Any,
        seed: Any,
    ) -> list[dict[str, Any]]:
        """Captions of many files as JSON, in their order; what failed has an error."""
        settings = read_settings(model, beam_size, captions, max_length, sampling, temperature, top_p, seed)
        if isinstance(images, Refused) or isinstance(settings, Refused):
            return [{"error": str(images if isinstance(images, Refused) else settings)}]
        rows = []
        for first in range(0, len(images or []), BATCH):
            part = (images or [])[first : first + BATCH]
            found = service.answer([(path, settings) for path in part])
            rows += [{"file": file_name(path), **plain(one)} for path, one in zip(part, found, strict=True)]
        return rows

    def caption_many(
        paths: list[Any] | Refused | None, chosen: Any, *options: Any, progress: Any = PROGRESS
    ) -> Iterator[tuple[Any, ...]]:
        """The gallery, the table and the files of many photographs."""
        try:
            if isinstance(paths, Refused):
                raise paths
            if not paths:
                raise Refused("Choose some photos first.")
            settings = settings_of(models_of(chosen)[0], *options)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error
        rows: list[dict[str, Any]] = []
        good: list[tuple[str, Caption]] = []
        pictures: list[tuple[str, str]] = []
        for first in range(0, len(paths), BATCH // 4):
            progress((first, len(paths)), desc="Captioning", unit="photos")
            part = paths[first : first + BATCH // 4]
            for path, one in zip(part, service.answer([(path, settings) for path in part]), strict=True):
                name = file_name(path)
                if isinstance(one, Caption):
                    # The heatmaps need no more of the photograph than this, and there may be many.
                    small = replace(one, image=shrink(one.image, PHOTO_WIDTH, enlarge=False), alternatives=())
                    good.append((name, small))
                    # Encoded once, into the folder where Gradio looks for it: every step shows all pictures again.
                    pictures.append((save_pil_to_cache(small.image, gallery.GRADIO_CACHE), one.sentence()))
                    rows.append({"file": name, "confidence": round(one.confidence, 3), **plain(one)})
                else:
                    rows.append({"file": name, "error": one})
            yield gr.Gallery(pictures, visible=bool(pictures)), cells(rows), *[gr.skip()] * 3
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

    with Page(
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
                            sample.keep_in_cache.update(sample.temp_files)  # else deleted like an upload
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
        for component in (chosen, *settings, *api_options):
            hand_on(component)
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


def file_name(path: str | Refused) -> str:
    """The name of an uploaded file."""
    return path.file if isinstance(path, Refused) else Path(path).name


def cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The rows as the table on the page shows them."""
    return [[row["file"], row.get("caption", ""), row.get("confidence", ""), row.get("error", "")] for row in rows]
