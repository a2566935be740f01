"""`Captioner`: a model with its vocabulary and its preprocessing. Images in, captions out."""

import dataclasses
import importlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import numpy as np
from PIL import Image

from captioner.arrays import Array, to_numpy
from captioner.captions import Caption
from captioner.engine import Engine, OnnxEngine
from captioner.hiding import EVIDENCE_WINDOW, check_regions, check_window, measure_evidence, usable_regions
from captioner.images import MAX_PIXELS, ImageError, Preprocessing, describe
from captioner.modelfile import (
    MODEL_FILE,
    CheckpointError,
    ModelDescription,
    model_file,
    opened,
    read_model,
    save_model,
)
from captioner.options import ENGINES, Options, Regions, check_option
from captioner.pretrained import DEFAULT_MODEL, model_folders
from captioner.reading import Photo, Source, read_batches, read_photo
from captioner.search import (
    BEAM_SIZE,
    BLOCK_NGRAMS,
    LENGTH_PENALTY,
    MAX_LENGTH,
    Distribution,
    Hypotheses,
    beam_search,
    follow,
    sample,
)
from captioner.vocabulary import END, PAD, SPECIAL

if TYPE_CHECKING:
    from captioner.checkpoint import Checkpoint

MAX_ROWS = 8000  # captions followed at a time, over all images of a batch; with more, smaller batches are made


class Captioner:
    """A model with its vocabulary and its preprocessing.

    Args:
        model: a network with its vocabulary and preprocessing; or the description of a model.
        engine: what computes it; None for torch, which needs the network.

    Attributes:
        engine: what computes the network; see `captioner.engine.Engine`.
        config: names and sizes of the network.
        about: what is known of the model: its scores, the command that made it.
    """

    def __init__(self, model: "Checkpoint | ModelDescription", engine: Engine | None = None) -> None:
        if engine is None:
            from captioner.network.engine import TorchEngine

            engine = TorchEngine(cast("Checkpoint", model).model)
        self.engine: Engine = engine
        self.config = model.config
        self.vocabulary = model.vocabulary
        self.preprocessing = model.preprocessing
        self.about = model.about
        self.graphs = model.graphs
        self.file: Path | None = None  # where ONNX Runtime's weights are

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str] | None = None, device: str | None = None, engine: str | None = None
    ) -> "Captioner":
        """Load a model.

        Args:
            name: a model in the package (see `list_models`), a `.safetensors` file, a folder with a
                `model.safetensors`, or a Hugging Face Hub id ("user/model"), for which the extra `hub` must be
                installed; by default `DEFAULT_MODEL` of `captioner.pretrained`. A string that names a model in the
                package means that model, even where a folder has the same name: write "./small", or give a `Path`,
                for the folder.
            device: where to compute; None for the CPU, "auto" for a GPU where there is one.
            engine: "onnx" for ONNX Runtime, which computes on the CPU and needs the graphs that `captioner-export`
                writes into a model; the large matrices of the decoder then have 8 bits. "onnx-float32" for the same
                without rounding; "torch"; or None for "onnx" wherever it can, and torch otherwise.

        Raises:
            CheckpointError: there is no such model, or its file is damaged or of another format.
            ImportError: torch is needed and not installed; the message says what to install.
            ValueError: there is no such device or engine, or the engine cannot use the device.
        """
        if engine not in (None, *ENGINES):
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
        on_onnx = engine in ("onnx", "onnx-float32")
        path = model_file(find_model(name or DEFAULT_MODEL))
        if device == "auto" and not on_onnx:
            device = "cuda" if has_gpu() else None
        on_cpu = device in (None, "cpu", "auto")
        if on_onnx and not on_cpu:
            raise ValueError(f"the engine {engine!r} computes on the CPU, not on {device!r}")
        if engine != "torch" and on_cpu and (found := cls.on_onnx_runtime(path, int8=engine != "onnx-float32")):
            return found
        if on_onnx:
            raise CheckpointError(f"{path} has no graphs for ONNX Runtime; run captioner-export {path}")
        from captioner.network.engine import choose_device

        return cls(importlib.import_module("captioner.checkpoint").load_checkpoint(path, choose_device(device)))

    @classmethod
    def on_onnx_runtime(cls, path: Path, int8: bool) -> "Captioner | None":
        """The model in a file, with ONNX Runtime; None where it has no graphs for that. See `OnnxEngine`."""
        with opened(path) as file:
            description = ModelDescription.from_metadata(file.metadata() or {}, path)
            if description.graphs is None:
                return None
            try:
                captioner = cls(description, OnnxEngine(description.graphs, file.get_tensor, int8))
            except ValueError as error:
                raise CheckpointError(f"{path}: {error}") from error
        captioner.file = path
        return captioner

    @property
    def model(self) -> Any:
        """The network in torch, a `captioner.network.model.ShowAttendTell`.

        Raises:
            AttributeError: another engine computes it.
        """
        if self.file:
            raise AttributeError('ONNX Runtime computes this network; from_pretrained(..., engine="torch") gives it')
        return cast(Any, self.engine).model

    def save_pretrained(self, path: str | os.PathLike[str], half: bool = False) -> None:
        """Write the model as one file, for `from_pretrained`.

        Args:
            path: a folder, which gets a `model.safetensors`, or the `.safetensors` file.
            half: store the weights in float16.

        Raises:
            CheckpointError: the file cannot be written, a weight is not finite, or ONNX Runtime computes the model and
                its file has been replaced since.
        """
        description = ModelDescription(self.config, self.vocabulary, self.preprocessing, self.about, self.graphs)
        if self.file:
            found, weights = read_model(self.file)
            if found != description:
                raise CheckpointError(f"{self.file} holds another model now than when it was loaded")
        else:
            weights = {name: to_numpy(tensor) for name, tensor in self.model.state_dict().items()}
        save_model(path, description, weights, half)

    @overload
    def caption(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, images: Source, *, errors: Literal["raise"] = "raise", **options: Unpack[Options]
    ) -> Caption: ...

    @overload
    def caption(  # type: ignore[overload-overlap]
        self, images: Source, *, errors: Literal["return"], **options: Unpack[Options]
    ) -> Caption | ImageError: ...

    @overload
    def caption(
        self, images: Sequence[Source], *, errors: Literal["raise"] = "raise", **options: Unpack[Options]
    ) -> list[Caption]: ...

    @overload
    def caption(
        self, images: Sequence[Source], *, errors: Literal["return"], **options: Unpack[Options]
    ) -> list[Caption | ImageError]: ...

    def caption(
        self,
        images: Source | Sequence[Source],
        *,
        errors: Literal["raise", "return"] = "raise",
        **options: Unpack[Options],
    ) -> Caption | ImageError | list[Caption] | list[Caption | ImageError]:
        """Caption one image or many.

        Args:
            images: one image, or a list or tuple of them: a path, bytes, an open file, a PIL image, an array
                (height, width[, channels]), a tensor (channels, height, width). In place of an image also its caption,
                made by this model with `keep_annotations=True`: the encoder does not run again.
            errors: "raise" to raise the ImageError of the first image that cannot be read, or "return" to return an
                ImageError in place of its caption.
            batch_size: images that go through the network together; 32 by default.
            beam_size: hypotheses that the beam search keeps; 1 is greedy search. 5 by default.
            alternatives: other captions to return with each; by default all the others of the beam, or none when
                sampling.
            max_length: largest number of words in a caption; 22 by default.
            length_penalty: captions are ranked by log-probability over length to this power; 1 by default.
            block_ngrams: when above 0, no n-gram of that many words occurs twice in a caption; 2 by default.
            temperature, top_p: when either is given, words are sampled: from the model's distribution sharpened (below
                1) or flattened (above 1) by the temperature, and only from the likeliest words that together reach
                the probability top_p.
            seed: the same seed gives the same samples.
            max_pixels: larger images are refused before they are decoded; 100 million by default.
            keep_annotations: keep the annotation vectors with each caption, for `captioner.explain`.
            evidence: measure for each caption, not for its alternatives, how far the log-probability of each word falls
                where attention may not use a region and its neighbours: `Caption.evidence`.
            evidence_window: rows and columns of regions that are hidden together for that, an odd number; 3 by default.
            hide: regions that attention may not use: a Boolean array (rows, columns), or one box or several, (left,
                top, width, height) in pixels of the upright photograph. A box stands for the regions whose cells it
                covers by at least half, or if there is none, for the one of which it covers most; cells lie where
                heatmaps show them. Regions and boxes are the same for each image of a list.
            attend: the only regions that attention may use, likewise.

        Returns:
            A `Caption` for one image; for a list, a list of them in the same order.

        Raises:
            ImageError: an image cannot be read, a box lies outside it, or `hide` and `attend` leave none of its
                regions; the message names it. It is a ValueError.
            ValueError: an option has a value that cannot be used.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f'errors must be "raise" or "return", not {errors!r}')
        single = not isinstance(images, list | tuple)
        sources: Any = [images] if single else images
        found: list[Any] = []
        with closing(self.stream(sources, **options)) as results:
            for result in results:
                if isinstance(result, ImageError) and errors == "raise":
                    raise result
                found.append(result)
        return found[0] if single else found

    def stream(
        self,
        sources: Iterable[Source],
        *,
        batch_size: int = 32,
        beam_size: int = BEAM_SIZE,
        alternatives: int | None = None,
        max_length: int = MAX_LENGTH,
        length_penalty: float = LENGTH_PENALTY,
        block_ngrams: int = BLOCK_NGRAMS,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        max_pixels: float = MAX_PIXELS,
        keep_annotations: bool = False,
        evidence: bool = False,
        evidence_window: int = EVIDENCE_WINDOW,
        hide: Regions | None = None,
        attend: Regions | None = None,
    ) -> Generator[Caption | ImageError, None, None]:
        """Caption any number of images in bounded memory.

        While the network computes the captions of one batch, threads read the next. `sources` is advanced in the
        caller's thread, at most two batches ahead of the results. Open files, images, arrays and tensors are read
        when `sources` gives them, so the caller may then close them or write to them.

        Args:
            sources: the images, each as in `caption`; any iterable, a generator too.
            batch_size, ..., attend: as in `caption`.

        Returns:
            An iterator over the results, in order: a `Caption`, or an ImageError in the place of an image for which
            `caption` raises one. Its `close()` cancels what is not begun.

        Raises:
            TypeError: `sources` is one image, or no iterable.
            ValueError: an option has a value that cannot be used. These two are raised by the call, before anything is
                read.
            Exception: whatever `sources` raised, after the results before it.
        """
        if isinstance(sources, str | bytes | os.PathLike | Image.Image) or hasattr(sources, "read"):
            raise TypeError(f"stream() takes an iterable of images, not {describe(sources)}; caption() takes one image")
        batch_size, beam_size = int(check_option("batch_size", batch_size)), int(check_option("beam_size", beam_size))
        max_pixels = check_option("max_pixels", max_pixels)
        length_penalty = check_option("length_penalty", length_penalty)
        max_length = int(check_option("max_length", max_length))
        block_ngrams = int(check_option("block_ngrams", block_ngrams))
        chance = {"temperature": temperature, "top_p": top_p, "seed": seed}
        drawn: dict[str, Any] = {name: check_option(name, value) for name, value in chance.items() if value is not None}
        sampling = temperature is not None or top_p is not None
        if alternatives is None:
            alternatives = 0 if sampling else beam_size - 1
        alternatives = int(check_option("alternatives", alternatives))
        rows = alternatives + 1 if sampling else max(beam_size, alternatives + 1)
        if not sampling and rows > (most := len(self.vocabulary) - len(SPECIAL)):
            option, value = ("beam_size", beam_size) if beam_size == rows else ("alternatives", alternatives)
            raise ValueError(f"{option} {value} is too many: a caption may begin with one of {most} words")
        shared: dict[str, Any] = {"max_length": max_length, "block_ngrams": block_ngrams}
        if sampling:
            search = partial(sample, self.engine, samples=rows, **drawn, **shared)
            distribution = Distribution(block_ngrams, drawn.get("temperature", 1.0), drawn.get("top_p", 1.0))
        else:
            search = partial(beam_search, self.engine, beam_size=rows, length_penalty=length_penalty, **shared)
            distribution = Distribution(block_ngrams)
        window = check_window(evidence_window)
        read = self.reader(max_pixels, hide, attend)
        batches = read_batches(iter(sources), min(batch_size, max(1, MAX_ROWS // rows)), read)
        caption_photos = partial(
            self.caption_photos,
            search=search,
            alternatives=alternatives,
            distribution=distribution,
            keep_annotations=keep_annotations,
            evidence_window=window if evidence else None,
        )
        return self.results(batches, caption_photos)

    def reader(self, max_pixels: float, hide: Regions | None, attend: Regions | None) -> Callable[[Source], Photo]:
        """What reads one photograph. Raises ValueError where `hide` or `attend` is neither a grid nor boxes."""
        grid = self.config.grid
        usable = partial(
            usable_regions,
            grid=grid,
            displacement=self.displacement,
            hide=check_regions("hide", hide, grid),
            attend=check_regions("attend", attend, grid),
        )
        return partial(read_photo, preprocessing=self.preprocessing, max_pixels=max_pixels, usable=usable)

    @property
    def displacement(self) -> tuple[float, float]:
        """See `Caption.displacement`."""
        rows, columns = self.preprocessing.size
        return self.engine.displacement / rows, self.engine.displacement / columns

    def results(
        self,
        batches: Generator[list[Photo | ImageError], None, None],
        caption_photos: Callable[[list[Photo]], list[Caption]],
    ) -> Generator[Caption | ImageError, None, None]:
        """The captions of batches of photographs, with the ImageErrors among them in their places."""
        with closing(batches):
            for batch in batches:
                photos = [photo for photo in batch if isinstance(photo, Photo)]
                captions: Iterator[Caption] = iter(caption_photos(photos) if photos else ())
                for photo in batch:
                    yield photo if isinstance(photo, ImageError) else next(captions)

    def caption_photos(
        self,
        photos: Sequence[Photo],
        search: Callable[[Array, Array | None], Hypotheses],
        alternatives: int,
        distribution: Distribution,
        keep_annotations: bool,
        evidence_window: int | None,
    ) -> list[Caption]:
        """The captions of a batch of photographs.

        Args:
            photos: at least one.
            search: gives the hypotheses for annotation vectors and a mask; see `captioner.search.beam_search`.
            alternatives: how many of an image's hypotheses stand beside the first.
            distribution: by which the search chooses words.
            keep_annotations: see `caption`.
            evidence_window: see `caption`; None to measure no evidence.
        """
        annotations = annotations_of(photos, self.engine, self.preprocessing)
        masks = [photo.mask.ravel() for photo in photos if photo.mask is not None]
        mask = np.stack(masks) if masks else None  # all photographs have one, or none has
        found = search(annotations, None if mask is None else self.engine.array(mask))
        evidence = None
        if evidence_window is not None:
            grid, words = self.config.grid, found.words[:, 0]
            evidence = measure_evidence(self.engine, annotations, words, grid, evidence_window, mask)
        return self.read(found, photos, alternatives, distribution, annotations if keep_annotations else None, evidence)

    def teacher_forced(
        self,
        image: Source,
        text: str,
        max_pixels: float = MAX_PIXELS,
        keep_annotations: bool = False,
        *,
        evidence: bool = False,
        evidence_window: int = EVIDENCE_WINDOW,
        hide: Regions | None = None,
        attend: Regions | None = None,
    ) -> Caption:
        """Read a given caption under teacher forcing: the probability and the attention map of each of its words.

        Args:
            image: one image, as in `caption`.
            text: lower-case words with a space between each two, such as "a dog on grass".
            max_pixels, ..., attend: as in `caption`.

        Returns:
            A `Caption` of these words. The higher its log-probability, the better they describe the image.

        Raises:
            ImageError: as in `caption`.
            ValueError: the text has no word, or has words that are not in the vocabulary, which the message names; or
                an option has a value that cannot be used.
        """
        words = text.split()
        if not words:
            raise ValueError("the caption has no words")
        if unknown := [word for word in words if word not in self.vocabulary.words[len(SPECIAL) :]]:
            raise ValueError(f"the model does not know {', '.join(map(repr, unknown))}")
        window = check_window(evidence_window)
        photo = self.reader(max_pixels, hide, attend)(image)
        ids = self.engine.array(np.array([[self.vocabulary.encode(words)[1:]]]))

        def read_words(annotations: Array, mask: Array | None) -> Hypotheses:
            return follow(self.engine, annotations, ids, mask)

        return self.caption_photos(
            [photo], read_words, 0, Distribution(), keep_annotations, window if evidence else None
        )[0]

    def read(
        self,
        found: Hypotheses,
        photos: Sequence[Photo],
        alternatives: int,
        distribution: Distribution,
        annotations: Array | None,
        evidence: np.ndarray | None,
    ) -> list[Caption]:
        """Convert hypotheses to captions, with annotation vectors and evidence where they are given.

        Args:
            evidence: (images, steps, rows, columns), of the first hypothesis of each image.
        """
        words, alphas, log_probabilities = map(to_numpy, (found.words, found.alpha, found.log_probabilities))
        grid = self.config.grid
        captions = []
        # Copied, so that no caption keeps the arrays of its whole batch in memory.
        kept = None if annotations is None else [array.copy() for array in to_numpy(annotations)]
        for i, photo in enumerate(photos):
            rows = []
            for j in range(alternatives + 1):
                length = int((words[i, j] != PAD).sum())
                word_count = length - 1 if words[i, j, length - 1] == END else length
                maps = alphas[i, j, :word_count].reshape(word_count, -1, *grid)  # by word and head
                rows.append(
                    Caption(
                        words=tuple(self.vocabulary.words[index] for index in words[i, j, :word_count]),
                        word_log_probabilities=tuple(log_probabilities[i, j, :length].tolist()),
                        attention=maps.mean(axis=1),
                        image=photo.preview,
                        head_attention=maps.copy() if self.engine.heads > 1 else None,
                        displacement=self.displacement,
                        source=photo.path,
                        size=photo.size,
                        annotations=kept[i] if kept else None,
                        distribution=distribution,
                        mask=photo.mask,
                    )
                )
            measured = None if evidence is None else evidence[i, : len(rows[0].words)].copy()
            captions.append(dataclasses.replace(rows[0], alternatives=tuple(rows[1:]), evidence=measured))
        return captions


def annotations_of(photos: Sequence[Photo], engine: Engine, preprocessing: Preprocessing) -> Array:
    """The annotation vectors of photographs, (images, regions, channels). The encoder runs for those without."""
    unknown = [photo.pixels for photo in photos if photo.annotations is None]
    found = engine.annotate(preprocessing(unknown)) if unknown else None
    if len(unknown) == len(photos):
        return found
    rows = iter(() if found is None else to_numpy(found))
    return engine.array(np.stack([next(rows) if one.annotations is None else one.annotations for one in photos]))


def has_gpu() -> bool:
    """Whether torch is installed and finds a GPU that it knows as "cuda"."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def find_model(name: str | os.PathLike[str]) -> Path:
    """The folder or file of a model: in the package, on disk, or fetched from the Hub, looked for in this order.

    A `Path` is taken to be on disk, and returned as it is.

    Raises:
        CheckpointError: there is no such model.
    """
    path, packaged = Path(name), model_folders()
    if isinstance(name, str) and name in packaged:
        return packaged[name]
    if not isinstance(name, str) or path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or path.parent.is_dir():
        raise CheckpointError(
            f"there is no model {name!r}: give a model in the package ({', '.join(packaged)}), "
            f"a .safetensors file, a folder with {MODEL_FILE}, or a Hugging Face Hub id such as 'user/model'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no folder here; to fetch it from the Hugging Face Hub, pip install 'captioner[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[MODEL_FILE]))
    except Exception as error:
        raise CheckpointError(f"cannot fetch {name!r} from the Hugging Face Hub: {error}") from error
