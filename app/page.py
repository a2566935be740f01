"""The layout of the page: its tabs, their components, and which handler each event calls."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from captioner.heatmap import ANCHORS, colour_table
from captioner.web import FILES, VIEWER, component_script

from .guard import Page
from .handlers import BATCH, Handlers
from .rendering import MAP_SIZE

ASSETS = Path(__file__).parent / "assets"
SAMPLES = ("cat.jpg", "photographer.jpg", "fruit.jpg", "astronaut.jpg")
FAILURE = "Both models fail on the astronaut: their training photographs show little like her."
KEEP_SECONDS = 3600  # uploads and downloads are deleted after an hour
QUESTION = (ASSETS / "question.js").read_text("utf-8")
CSS = (ASSETS / "page.css").read_text("utf-8")
# Fonts of the reader's own machine: the page loads nothing from other hosts.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_700",  # dark enough for white text
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_text_color="white",
)


def build(
    handlers: Handlers, samples: Path | None = None, concurrency: int = 1, keep_seconds: int = KEEP_SECONDS
) -> Page:
    """The page of a server.

    Args:
        handlers: what its events call.
        samples: folder of sample photos, which get a button each.
        concurrency: batches that are captioned at the same time.
        keep_seconds: age in seconds at which uploads and downloads are deleted.
    """
    with Page(
        title="captioner", analytics_enabled=False, delete_cache=(max(1, keep_seconds // 4), keep_seconds)
    ) as page:
        gr.Markdown("# captioner\nA caption for a photo and, for every word, the regions that the network attended to.")
        with gr.Tabs():
            with gr.Tab("One photo"):
                one = one_photo(list(handlers.service.models), samples)
            with gr.Tab("Many photos"):
                many = many_photos()
            with gr.Tab("How it works"):
                steps = how_it_works(list(handlers.service.models))
        inputs = [one.models, *one.settings]
        # The viewer asks for the same as a change of the settings. Its maps stay to be seen until the answer is there.
        for triggers, progress in (
            ([one.photo.change, *(component.input for component in inputs)], "full"),
            ([one.viewer.select], "minimal"),
        ):
            gr.on(
                triggers,
                handlers.show_photo,
                [one.photo, *inputs, one.viewer],
                [one.viewer, steps],
                js=QUESTION.replace("COMPONENT", "viewer"),
                batch=True,
                max_batch_size=BATCH,
                concurrency_limit=concurrency,
                show_progress=progress,
                show_progress_on=[one.viewer],
                api_visibility="private",
                trigger_mode="always_last",
            )
        steps.select(
            handlers.show_steps,
            [one.photo, *inputs, steps],
            steps,
            js=QUESTION.replace("COMPONENT", "steps"),
            concurrency_limit=concurrency,
            show_progress="hidden",
            api_visibility="private",
            trigger_mode="always_last",
        )
        many.start.click(
            handlers.show_many,
            [many.files, *inputs],
            [many.gallery, many.table, *many.downloads],
            concurrency_limit=concurrency,
            api_visibility="private",
        )
        for component in inputs:
            pass_through(component)
        add_api(handlers, concurrency)
    return page


class OnePhoto(NamedTuple):
    """The components of the first tab that have events."""

    photo: gr.Image
    models: gr.CheckboxGroup
    settings: list[Any]
    viewer: gr.HTML


def one_photo(names: list[str], samples: Path | None) -> OnePhoto:
    """The first tab: on the left a photo and the settings, on the right its captions and their maps."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            photo = photo_input(label="Photo", sources=["upload", "clipboard", "webcam"], elem_id="photo", height=320)
            sample_buttons(photo, samples)
            models = gr.CheckboxGroup(names, value=names[:1], label="Models, side by side", visible=len(names) > 1)
            with gr.Accordion("Settings", open=False):
                settings = setting_inputs()
        with gr.Column(scale=3, min_width=300):
            tables = {name: colour_table(name).astype(int).tolist() for name in ANCHORS}
            viewer = custom_html(
                FILES / "viewer",
                VIEWER,
                'class="viewer" aria-live="polite"',
                tables=tables,
                map_size=MAP_SIZE,
                measures=True,
            )
    return OnePhoto(photo, models, settings, viewer)


def sample_buttons(photo: gr.Image, samples: Path | None) -> None:
    """A button for each sample photo, which chooses it."""
    with gr.Row(elem_classes="samples"):
        for file in [samples / name for name in SAMPLES if samples and (samples / name).is_file()]:
            button = gr.Button(file.stem.capitalize(), icon=file, min_width=70, elem_classes="sample")
            button.keep_in_cache.update(button.temp_files)  # or Gradio would delete the icon like an upload
            button.click(partial(str, file), None, photo, api_visibility="private", queue=False)
    if samples:
        gr.Markdown(FAILURE)


def setting_inputs() -> list[Any]:
    """The inputs for `Settings`, in the order of its fields after the model."""
    return [
        gr.Slider(1, 10, 5, step=1, label="Beam size", info="Partial captions kept at each step."),
        gr.Slider(1, 10, 3, step=1, label="Captions", info="Number of captions shown."),
        gr.Slider(3, 30, 22, step=1, label="Maximum length", info="In words."),
        gr.Checkbox(False, label="Sample the words instead of searching for the best caption"),
        gr.Slider(0.1, 2, 1, step=0.05, label="Temperature", info="Below 1: likelier words. Above 1: rarer words."),
        gr.Slider(
            0.05,
            1,
            0.9,
            step=0.05,
            label="Top-p",
            info="Sample from the likeliest words, up to this total probability.",
        ),
        gr.Number(0, label="Seed", info="The same seed draws the same captions.", precision=0, minimum=0),
    ]


class ManyPhotos(NamedTuple):
    """The components of the second tab that have events."""

    files: gr.File
    start: gr.Button
    table: gr.Dataframe
    gallery: gr.Gallery
    downloads: list[gr.DownloadButton]


def many_photos() -> ManyPhotos:
    """The second tab: files, the table of their captions, a gallery, and downloads."""
    files = gr.File(label="Photos", file_count="multiple", elem_id="many", height=180)
    start = gr.Button("Caption all", variant="primary")
    table = gr.Dataframe(
        headers=["File", "Caption", "Confidence", "Error"],
        label="Captions",
        interactive=False,
        wrap=True,
        column_widths=["20%", "40%", "14%", "26%"],
        elem_id="table",
    )
    gallery = gr.Gallery(label="Photos and captions", columns=4, object_fit="contain", height="auto", visible=False)
    with gr.Row():
        downloads = [
            gr.DownloadButton(f"Download {kind}", interactive=False, elem_id=f"download-{name}")
            for kind, name in (("JSON", "json"), ("CSV", "csv"), ("heatmaps (ZIP)", "heatmaps"))
        ]
    return ManyPhotos(files, start, table, gallery, downloads)


def how_it_works(names: list[str]) -> gr.HTML:
    """The third tab: the numbers of one step of the decoder, of the first model chosen and of a second one."""
    gr.Markdown(
        "Before each word the decoder scores every region of the photo against its state. A softmax turns the scores "
        "into weights that sum to 1, and the decoder reads the weighted sum of the regions. Change "
        "the temperature of the softmax, or let the network look everywhere or nowhere: that changes each word alone, "
        "after the same words before it."
    )
    return custom_html(ASSETS / "steps", [ASSETS / "steps.js"], 'class="steps"', models=names)


def add_api(handlers: Handlers, concurrency: int) -> None:
    """The endpoints /caption and /caption_batch. They have inputs of their own, in an order the page does not set."""
    with gr.Row(visible=False):
        image, images = photo_input(label="image"), gr.File(file_count="multiple", label="images")
        options = [
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
    for component in options:
        pass_through(component)
    run_one.click(
        handlers.caption,
        [image, *options],
        result,
        api_name="caption",
        batch=True,
        max_batch_size=BATCH,
        concurrency_limit=concurrency,
    )
    run_many.click(
        handlers.caption_batch,
        [images, *options],
        result,
        api_name="caption_batch",
        concurrency_limit=concurrency,
    )


def custom_html(path: Path, scripts: Sequence[Path], attributes: str, **props: Any) -> gr.HTML:
    """A component that some scripts draw, with the style sheet of that path, which is given without its ending."""
    return gr.HTML(
        html_template=f"<div {attributes}></div>",
        css_template=path.with_suffix(".css").read_text("utf-8"),
        js_on_load=component_script(*scripts),
        elem_id=path.name,
        **props,
    )


def photo_input(**options: Any) -> gr.Image:
    """An image component that passes on the path of the file as it was sent, so that the library reads the file."""
    image = gr.Image(type="filepath", image_mode=None, **options)
    setattr(image, "preprocess", lambda payload: None if payload is None else payload.path)  # noqa: B010
    return image


def pass_through(component: Any) -> None:
    """Make a component pass its values on as they were sent, so that `settings_of` says what is wrong with them."""
    component.preprocess = lambda payload: payload
