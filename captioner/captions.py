"""`Caption`: the words for one image, with the probability and the attention map of each."""

import dataclasses
import math
import re
from typing import Any

import numpy as np
from PIL import Image

from captioner import heatmap
from captioner.images import ImageSource, load_image
from captioner.search import Distribution


@dataclasses.dataclass(frozen=True)
class Caption:
    """The caption of one image, with the probability and the attention map of each word.

    Attributes:
        words: the T words.
        word_log_probabilities: natural logarithms, one for each word and one for the end of the sentence; the
            last is missing where the caption was cut at the maximum length.
        attention: float32 (T, rows, columns), the attention weights of each word over the image's regions; each of
            the T maps sums to 1. The mean over the heads where attention has several.
        image: a preview of the photograph for pictures of the attention: upright, RGB, its longer side at most 1,024
            pixels.
        alternatives: the other captions found, best first.
        head_attention: float32 (T, heads, rows, columns), the maps of each head, of which `attention` is the mean;
            a transformer's heads are those of its first layer, then those of the next. None where there is one head.
        displacement: offset between the centre of a region's receptive field and the centre of its cell, as a share
            of the image's height and width; pictures of the attention take it into account.
        source: the path of the photograph; None where it was not given by its path.
        size: width and height of the whole photograph, upright, in pixels.
        annotations: float32 (regions, channels), the annotation vectors that the decoder read, for
            `captioner.explain`; None unless they were asked for.
        distribution: how the probabilities of the words were computed.
        evidence: float32 (T, rows, columns), how far the log-probability of each word falls, in nats, when the
            window centred on a region is hidden from attention in the step that chooses the word (see
            `captioner.hiding.measure_evidence`); 0 where the word becomes likelier instead. None unless it was asked
            for, and for alternatives.
        mask: Boolean (rows, columns), the regions that attention could use; None for all.
    """

    words: tuple[str, ...]
    word_log_probabilities: tuple[float, ...]
    attention: np.ndarray = dataclasses.field(repr=False, compare=False)
    image: Image.Image = dataclasses.field(repr=False, compare=False)
    alternatives: tuple["Caption", ...] = dataclasses.field(default=(), repr=False)
    head_attention: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    displacement: tuple[float, float] = dataclasses.field(default=(0.0, 0.0), repr=False)
    source: str | None = dataclasses.field(default=None, repr=False, compare=False)
    size: tuple[int, int] = dataclasses.field(default=(0, 0), repr=False, compare=False)
    annotations: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    distribution: Distribution = dataclasses.field(default=Distribution(), repr=False, compare=False)
    evidence: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)
    mask: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.size == (0, 0):
            object.__setattr__(self, "size", self.image.size)

    @property
    def text(self) -> str:
        """The words with a space between each two, as in the vocabulary."""
        return " ".join(self.words)

    @property
    def log_probability(self) -> float:
        """Natural logarithm of the caption's probability given the image."""
        return math.fsum(self.word_log_probabilities)

    @property
    def confidence(self) -> float:
        """Geometric mean of the words' probabilities, 0 to 1: comparable between captions of different length."""
        return math.exp(self.log_probability / max(len(self.word_log_probabilities), 1))

    def __str__(self) -> str:
        """The caption as people write it: no space before punctuation or a split-off 's."""
        text = re.sub(r" (n't|'\w+|[.,!?;:%])(?=\s|$)", r"\1", self.text)
        return re.sub(r"\b(can|gon|wan) (not|na)\b", r"\1\2", text)

    def sentence(self) -> str:
        """The caption as a sentence, with a capital and a full stop."""
        text = str(self)
        return f"{text[:1].upper()}{text[1:]}." if text else ""

    def index(self, word: str | int) -> int:
        """The position of a word, given as the word itself (its first occurrence) or as its position.

        Raises:
            KeyError: the caption has no such word.
        """
        if isinstance(word, str):
            if word.lower() not in self.words:
                raise KeyError(f"{word!r} is not in the caption {str(self)!r}")
            return self.words.index(word.lower())
        if not -len(self.words) <= word < len(self.words):
            raise KeyError(f"there is no word {word}; the caption has {len(self.words)}: {str(self)!r}")
        return word % len(self.words)

    @property
    def heads(self) -> int:
        """How many attention maps there are of each word."""
        return 1 if self.head_attention is None else self.head_attention.shape[1]

    def maps(self, head: int | None = None, of: str = "attention") -> np.ndarray:
        """The map of each word, (T, rows, columns).

        Args:
            head: of attention, the number of a head; None for the mean over all heads.
            of: "attention" or "evidence".

        Raises:
            IndexError: there is no such head.
            ValueError: there is no such map: the caption was made without `evidence=True`, or a head's evidence.
        """
        heatmap.check_kind(of)
        if of == "evidence":
            if self.evidence is None:
                raise ValueError(f"the caption {str(self)!r} has no evidence; make it with evidence=True")
            if head is not None:
                raise ValueError("evidence is of all heads together; leave head out")
            return self.evidence
        if head is None:
            return self.attention
        if not 0 <= head < self.heads:
            raise IndexError(f"there is no head {head}; this model has {self.heads}, counted from 0")
        return self.attention if self.head_attention is None else self.head_attention[:, head]

    def covered(self, photo: Image.Image) -> Image.Image:
        """The photograph as pictures of the maps show it: regions that attention could not use are under grey."""
        return photo if self.mask is None else heatmap.cover(photo, self.mask, self.displacement)

    def heatmap(
        self,
        word: str | int,
        head: int | None = None,
        scale: str = "caption",
        image: ImageSource | None = None,
        of: str = "attention",
        **options: Any,
    ) -> Image.Image:
        """The photograph with a heatmap of the attention, or of the evidence, for one word.

        Args:
            word: the word, or its position.
            head: number of the head whose map is drawn; None for the mean over the heads.
            scale: meaning of the brightest colour: "caption" for the largest weight of all words, so that pictures of
                several words can be compared; "word" for the largest weight of this word.
            image: image to draw over in place of the preview, such as `result.source` for the whole photograph.
            of: "attention" or "evidence".
            options: see `captioner.heatmap.overlay`.

        Raises:
            ImageError: the image given cannot be read.
            KeyError: the caption has no such word.
            IndexError: there is no such head.
            ValueError: there is no such scale, or no evidence.
        """
        maps, index = self.maps(head, of), self.index(word)
        top = heatmap.scale_tops(maps, scale)[index]
        photo = self.covered(self.image if image is None else load_image(image))
        return heatmap.overlay(photo, maps[index], displacement=self.displacement, largest=top, **options)

    def figure(
        self, head: int | None = None, scale: str = "caption", of: str = "attention", **options: Any
    ) -> Image.Image:
        """The photograph, then the heatmap of each word, in a grid as in the paper's figure 2, with a legend.

        Args:
            head, scale, of: as in `heatmap`.
            options: see `captioner.heatmap.figure`.
        """
        maps, place = self.maps(head, of), self.displacement
        photo = self.covered(self.image)
        return heatmap.figure(photo, self.words, maps, scale=scale, of=of, displacement=place, **options)

    def animation(
        self, head: int | None = None, scale: str = "caption", of: str = "attention", **options: Any
    ) -> list[Image.Image]:
        """One frame per word, for `captioner.heatmap.save_animation`.

        Args:
            head, scale, of: as in `heatmap`.
            options: see `captioner.heatmap.animation`.
        """
        maps, place = self.maps(head, of), self.displacement
        photo = self.covered(self.image)
        return heatmap.animation(photo, self.words, maps, scale=scale, of=of, displacement=place, **options)

    def to_dict(self, attention: bool = False) -> dict[str, Any]:
        """Plain data, ready for JSON.

        Args:
            attention: whether to include the attention maps, and the evidence where there is some, as nested lists.
        """
        plain: dict[str, Any] = {
            "caption": str(self),
            "log_probability": self.log_probability,
            "words": [
                {"word": word, "log_probability": log_probability}
                for word, log_probability in zip(self.words, self.word_log_probabilities, strict=False)
            ],
            "alternatives": [
                {"caption": str(other), "log_probability": other.log_probability} for other in self.alternatives
            ],
        }
        if attention:
            plain["attention"] = self.attention.tolist()
            if self.evidence is not None:
                plain["evidence"] = self.evidence.tolist()
        return plain
