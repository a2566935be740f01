"""What the page asks of a photo: captions, hidden regions, evidence. A photo that is kept is not encoded again."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from captioner import Caption

from .service import Box, Refused, Request, Service, Settings, shown

MOST_BOXES = 1024
KEPT = 16  # captions that are kept with their annotation vectors and a preview of the photo, at most 3 MB each


class Wish(NamedTuple):
    """What the viewer of the page asks beside a caption.

    hide: boxes that attention may not use, as shares of the photo's width and height.
    evidence: whether to measure what the words rest on.
    """

    hide: tuple[Box, ...] = ()
    evidence: bool = False


class Seen(NamedTuple):
    """The caption of a photo, and that without the regions that were hidden, if any were."""

    caption: Caption
    hidden: Caption | None = None


class Asked(NamedTuple):
    """A request of the page: the file of a photo, how to caption it, and the wish; or what is wrong with them."""

    path: str | Refused | None
    settings: Settings | Refused
    wish: Wish | Refused = Wish()


def read_wish(value: Any) -> Wish | Refused:
    """The wish in the question of viewer.js, which may be any JSON; None for no wish. What is wrong is returned."""
    question = {} if value is None else value
    if not isinstance(question, dict):
        return Refused(f"The question should be an object, not {shown(value)}.")
    hide, evidence = question.get("hide") or [], question.get("evidence", False)
    if not isinstance(hide, list) or len(hide) > MOST_BOXES or not all(map(is_box, hide)):
        return Refused(
            f"The hidden regions should be at most {MOST_BOXES} boxes [left, top, width, height], each number a share "
            f"of the photo from 0 to 1, not {shown(hide)}."
        )
    if not isinstance(evidence, bool):
        return Refused(f"Evidence should be true or false, not {shown(evidence)}.")
    return Wish(tuple((float(left), float(top), float(w), float(h)) for left, top, w, h in hide), evidence)


def is_box(value: Any) -> bool:
    """Whether a value is [left, top, width, height] with numbers from 0 to 1, of a box with an area in the photo."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1 for one in value):
        return False
    return bool(value[0] < 1 and value[1] < 1 and value[2] > 0 and value[3] > 0)


class Kept:
    """The captions that the page asked for last, with their annotation vectors: a further question needs no encoder.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int = KEPT) -> None:
        self.most, self.lock = most, threading.Lock()
        self.captions: dict[tuple[str, Settings], Caption] = {}  # the latest last

    def get(self, path: str, settings: Settings) -> Caption | None:
        """The caption of a file with these settings; None if it is not kept."""
        with self.lock:
            return self.captions.get((path, settings))

    def put(self, path: str, settings: Settings, caption: Caption) -> None:
        """Keep a caption; beyond `most` the oldest goes."""
        with self.lock:
            self.captions.pop((path, settings), None)
            self.captions[path, settings] = caption
            while len(self.captions) > self.most:
                del self.captions[next(iter(self.captions))]


class Viewing:
    """Answers what the page asks.

    Args:
        service: captions the photos.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.kept = service, Kept()

    def see(self, asked: Sequence[Asked]) -> list[Seen | str]:
        """What the page shows for each request, or a sentence that says why it shows nothing."""
        whole = self.captions(asked)
        hidden: dict[int, Request] = {}
        for number, (one, (_, settings, wish)) in enumerate(zip(whole, asked, strict=True)):
            if isinstance(one, Caption) and isinstance(settings, Settings) and isinstance(wish, Wish) and wish.hide:
                changed = replace(settings, evidence=wish.evidence, hide=in_pixels(wish.hide, one))
                hidden[number] = (one, changed)
        without = self.answers(hidden)
        seen: list[Seen | str] = []
        for number, one in enumerate(whole):
            other = without.get(number)
            sentence = next((each for each in (one, other) if isinstance(each, str)), None)
            seen.append(sentence or Seen(one, other))  # type: ignore[arg-type]  # captions, if none is a sentence
        return seen

    def captions(self, asked: Sequence[Asked]) -> list[Caption | str]:
        """The caption of each photo with all regions. What is kept is not computed again; evidence is added to it."""
        found: dict[int, Caption | str] = {}
        missing: dict[int, Request] = {}
        for number, (path, settings, wish) in enumerate(asked):
            if isinstance(settings, Refused) or isinstance(wish, Refused) or not isinstance(path, str):
                problem = next((each for each in (path, settings, wish) if isinstance(each, Refused)), None)
                missing[number] = (problem, settings)
                continue
            known = self.kept.get(path, settings)
            if known and (known.evidence is not None or not wish.evidence):
                found[number] = known
            else:
                missing[number] = (known or path, replace(settings, evidence=wish.evidence))
        found |= self.answers(missing)
        for number, (path, settings, _) in enumerate(asked):
            one = found[number]
            if isinstance(one, Caption) and isinstance(path, str) and isinstance(settings, Settings):
                self.kept.put(path, settings, one)
        return [found[number] for number in range(len(asked))]

    def answers(self, requests: dict[int, Request]) -> dict[int, Caption | str]:
        """As `Service.answer`, by the numbers of the requests, with annotation vectors."""
        if not requests:
            return {}
        return dict(zip(requests, self.service.answer(list(requests.values()), keep_annotations=True), strict=True))


def in_pixels(boxes: Sequence[Box], caption: Caption) -> tuple[Box, ...]:
    """Boxes as shares of a photo, in its pixels."""
    width, height = caption.size
    return tuple((left * width, top * height, w * width, h * height) for left, top, w, h in boxes)
