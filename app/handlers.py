"""What the page's buttons and the API call."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from captioner import Caption

from .rendering import api_answer, as_csv, as_json, as_zip, file_name, page_photo, table_rows, viewer_result
from .service import Refused, Service, Settings, guarded, read_settings, settings_of
from .steps import Change, board_of, first_value, read_question, steps_value
from .viewing import Asked, Seen, Viewing, read_wish

BATCH = 32  # photos that go through the network together
STEP = 8  # photos of the second tab after which its table and gallery are updated
PROGRESS = gr.Progress()  # Gradio replaces this default with the request's own


class Handlers:
    """The functions of a page, all of which ask the same service.

    Values come as the browser or the API sent them: Gradio's components are told not to convert them (see `page`), so
    that a value of the wrong type is refused with a sentence.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.viewing = service, Viewing(service)
        # The pictures, with their captions, that each running request of the second tab shows.
        self.galleries: dict[int, list[tuple[str, str]]] = {}

    def pictures_in_use(self) -> list[str]:
        """The files of these pictures; every update of a gallery reads them again."""
        return [path for gallery in list(self.galleries.values()) for path, _ in list(gallery)]

    def chosen_models(self, chosen: Any) -> list[Any]:
        """The models that were chosen, each once, or else the first. An unknown name stays, and is refused later."""
        names = list(self.service.models)
        if not isinstance(chosen, list):
            return [chosen] if chosen else names[:1]
        unknown = [name for name in chosen if name not in names]
        return unknown[:1] or list(dict.fromkeys(chosen)) or names[:1]

    def show_photo(self, paths: list[Any], chosen: list[Any], *rest: list[Any]) -> list[list[dict[str, Any]]]:
        """Answer a batch of requests of the first tab.

        Args:
            paths: the photo of each request.
            chosen: the models of each request.
            rest: for each setting its value in each request; then the questions of viewer.js.

        Returns:
            The value of viewer.js and the value of steps.js for each request.
        """
        *settings, questions = rest
        asked: list[tuple[int, str, Asked]] = []
        for place, (path, names, question, *values) in enumerate(zip(paths, chosen, questions, *settings, strict=True)):
            wish = read_wish(question)
            asked += [
                (place, name, Asked(path, read_settings(name, *values), wish)) for name in self.chosen_models(names)
            ]
        views: list[dict[str, Any]] = [{"asked": path if isinstance(path, str) else None} for path in paths]
        boards: list[list[dict[str, Any]]] = [[] for _ in paths]
        for (place, name, _), seen in zip(asked, self.viewing.see([one for *_, one in asked]), strict=True):
            shown = seen if isinstance(seen, str) else guarded(partial(self.render, name, seen))
            if isinstance(shown, str):
                views[place] = {"asked": views[place]["asked"], "error": shown}
            elif "error" not in views[place]:
                views[place].setdefault("results", []).append(shown[0])
                boards[place].append(shown[1])
        return [views, [first_value(each) for each in boards]]

    def render(self, name: str, seen: Seen) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was seen with the model of that name, for viewer.js and as a board of steps.js."""
        captions = [one for one in seen if one is not None]
        without = [self.service.without_most_attended(one, name) for one in captions]
        view = {"model": name, **viewer_result(captions, without)}
        return view, board_of(self.service, name, seen.caption)

    def show_steps(self, path: Any, chosen: Any, *rest: Any) -> dict[str, Any]:
        """The value of steps.js for the first model chosen, and for the second of its question, which may be none.

        Attention of both is changed as the question says. An error of the first model leaves nothing to show, one of
        the second stands in its place.

        Args:
            path: the photo.
            chosen: the models.
            rest: the value of each setting; then the question of steps.js.
        """
        *values, asked = rest
        question = read_question(asked)
        if isinstance(question, Refused):
            return {"error": str(question)}
        first = self.chosen_models(chosen)[0]
        names = [first] if question.second in (None, first) else [first, question.second]
        found = self.viewing.see([Asked(path, read_settings(name, *values)) for name in names])
        boards = [self.board(name, seen, question.change) for name, seen in zip(names, found, strict=True)]
        return {"error": boards[0]["error"]} if "error" in boards[0] else steps_value(boards, question)

    def board(self, name: str, seen: Seen | str, change: Change) -> dict[str, Any]:
        """A board of steps.js: see `board_of`; or the name of the model and an error."""
        shown = seen if isinstance(seen, str) else guarded(partial(board_of, self.service, name, seen.caption, change))
        return {"model": name, "error": shown} if isinstance(shown, str) else shown

    def show_many(
        self, paths: list[Any] | Refused | None, chosen: Any, *settings: Any, progress: Any = PROGRESS
    ) -> Iterator[tuple[Any, ...]]:
        """Caption the photos of the second tab with the first model chosen.

        Yields:
            The gallery, the table and the three downloads, after every STEP photos; the downloads come last.
        """
        checked, how = self.check_many(paths, chosen, settings)
        pictures: list[tuple[str, str]] = []
        self.galleries[id(pictures)] = pictures
        try:
            yield from self.caption_many(checked, how, pictures, progress)
        finally:
            del self.galleries[id(pictures)]

    def caption_many(
        self, paths: list[Any], settings: Settings, pictures: list[tuple[str, str]], progress: Any
    ) -> Iterator[tuple[Any, ...]]:
        """As `show_many`; the pictures of the gallery are added to `pictures`."""
        answers: list[dict[str, Any]] = []
        captions: list[tuple[str, Caption]] = []
        for first in range(0, len(paths), STEP):
            progress((first, len(paths)), desc="Captioning", unit="photos")
            part = paths[first : first + STEP]
            for path, one in zip(part, self.service.answer([(path, settings) for path in part]), strict=True):
                name = file_name(path)
                if isinstance(one, str):
                    answers.append({"file": name, "error": one})
                    continue
                # The heatmaps need no more of the photo than this, and there may be many.
                small = replace(one, image=page_photo(one), alternatives=())
                captions.append((name, small))
                # Encoded once, into the folder where Gradio looks for it: every update shows all pictures again.
                pictures.append((save_pil_to_cache(small.image, get_upload_folder()), one.sentence()))
                answers.append({"file": name, "confidence": round(one.confidence, 3), **api_answer(one)})
            yield gr.Gallery(pictures, visible=bool(pictures)), table_rows(answers), *[gr.skip()] * 3
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the files into its cache
            yield gr.skip(), table_rows(answers), *self.downloads(Path(folder), answers, captions)

    def check_many(
        self, paths: list[Any] | Refused | None, chosen: Any, settings: tuple[Any, ...]
    ) -> tuple[list[Any], Settings]:
        """The photos of the second tab and how to caption them. Raises `gradio.Error`, which the page shows."""
        try:
            if isinstance(paths, Refused):
                raise paths
            if not paths:
                raise Refused("Choose some photos first.")
            return paths, settings_of(self.chosen_models(chosen)[0], *settings)
        except Refused as error:
            raise gr.Error(str(error), print_exception=False) from error

    def downloads(
        self, folder: Path, answers: list[dict[str, Any]], captions: list[tuple[str, Caption]]
    ) -> list[gr.DownloadButton]:
        """Write the files of many photos to a folder: JSON, CSV, and a ZIP of heatmaps. Returns a button for each."""
        files = {
            "captions.json": as_json(answers),
            "captions.csv": as_csv(answers),
            "heatmaps.zip": as_zip([name for name, _ in captions], [one for _, one in captions]),
        }
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return [gr.DownloadButton(value=str(folder / name), interactive=True) for name in files]

    def caption(
        self,
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
        settings = zip(model, beam_size, captions, max_length, sampling, temperature, top_p, seed, strict=True)
        asked = [(photo, read_settings(*values)) for photo, values in zip(image, settings, strict=True)]
        return [[api_answer(one) for one in self.service.answer(asked)]]

    def caption_batch(
        self,
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
        """Captions of many files as JSON, in their order; a file that failed has an error."""
        settings = read_settings(model, beam_size, captions, max_length, sampling, temperature, top_p, seed)
        if isinstance(images, Refused) or isinstance(settings, Refused):
            return [{"error": str(images if isinstance(images, Refused) else settings)}]
        answers = []
        for first in range(0, len(images or []), BATCH):
            part = (images or [])[first : first + BATCH]
            found = self.service.answer([(path, settings) for path in part])
            answers += [{"file": file_name(path), **api_answer(one)} for path, one in zip(part, found, strict=True)]
        return answers
