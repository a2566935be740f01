"""The file format of models. Torch is not needed to read what is described here.

A model is one file, `model.safetensors`. Its header holds, beside the shapes of the weights, these texts, all but the
first in JSON:

    format          the number of the format
    model           a `captioner.config.ModelConfig`
    preprocessing   a `captioner.images.Preprocessing`
    vocabulary      the words in the order of their ids, without the special ones
    about           what is known of the model: the command that made it, its training data, its scores
    graphs          the network for ONNX Runtime, a `captioner.engine.Graphs`; missing where it was not exported

Nothing in it is ever unpickled. A file from a stranger is refused with a `CheckpointError` before it can cost much
time or memory.
"""

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from captioner.config import ModelConfig
from captioner.engine import Graphs, digest_of
from captioner.files import replacing
from captioner.vocabulary import SPECIAL, Vocabulary

if TYPE_CHECKING:
    from captioner.images import Preprocessing

MODEL_FILE = "model.safetensors"
FORMAT = 2
MAX_HEADER = 16 * 2**20  # bytes


class CheckpointError(RuntimeError):
    """A model that cannot be loaded or saved. The message names the file and says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """All that a model's file holds except the weights.

    Attributes:
        config: names and sizes of the network.
        vocabulary: its words.
        preprocessing: how images become its input.
        about: what is known of it, as plain data.
        graphs: the network for ONNX Runtime; None where there is none.
    """

    config: ModelConfig
    vocabulary: Vocabulary
    preprocessing: "Preprocessing"
    about: dict[str, Any]
    graphs: Graphs | None = None

    def to_metadata(self) -> dict[str, str]:
        """The texts of the header."""
        parts = {
            "model": dataclasses.asdict(self.config),
            "preprocessing": self.preprocessing.to_dict(),
            "vocabulary": self.vocabulary.words[len(SPECIAL) :],
            "about": self.about,
        }
        texts = {"format": str(FORMAT), **{name: json.dumps(part, ensure_ascii=False) for name, part in parts.items()}}
        return texts if self.graphs is None else {**texts, "graphs": self.graphs.to_text()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], path: Path) -> "ModelDescription":
        """What `to_metadata` gave.

        Args:
            metadata: the texts of a header.
            path: where they were read, for the message of an error.

        Raises:
            CheckpointError: they are of another format, or do not describe a model.
        """
        from captioner.images import Preprocessing  # and Pillow, which takes long to import

        check_format(metadata, path)
        try:
            config = ModelConfig.from_dict(parse_json(metadata, "model", dict))
            vocabulary = Vocabulary(parse_json(metadata, "vocabulary", list))
            preprocessing = Preprocessing.from_dict(parse_json(metadata, "preprocessing", dict))
            about = parse_json(metadata, "about", dict)
            if config.vocabulary_size != len(vocabulary):
                raise ValueError(
                    f"its vocabulary has {len(vocabulary)} words, but vocabulary_size is {config.vocabulary_size}"
                )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not describe a model: {error}") from error
        graphs = read_graphs(metadata, digest_of(dataclasses.asdict(config), preprocessing.size), path)
        return cls(config, vocabulary, preprocessing, about, graphs)


def model_file(path: str | os.PathLike[str]) -> Path:
    """The file of a model that is given as that file, or as the folder with `model.safetensors`."""
    path = Path(path)
    return path if path.suffix == ".safetensors" and not path.is_dir() else path / MODEL_FILE


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a model's file; the weights are not read.

    Raises:
        CheckpointError: there is no model of this format.
    """
    with opened(path) as file:
        metadata = file.metadata() or {}
    check_format(metadata, path)
    return metadata


def read_model(path: Path) -> tuple[ModelDescription, dict[str, np.ndarray]]:
    """All that a model's file holds: the description and the weights by name, as they are stored.

    Raises:
        CheckpointError: there is no model of this format.
    """
    with opened(path) as file:
        description = ModelDescription.from_metadata(file.metadata() or {}, path)
        return description, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def opened(path: Path, framework: str = "numpy") -> Iterator[Any]:
    """A safetensors file, open; nothing but its header is read yet.

    Args:
        path: the file.
        framework: whose arrays it gives: "numpy", or "pt" for torch.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.parent.is_dir():
        raise CheckpointError(f"there is no model folder {path.parent}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MAX_HEADER < header < path.stat().st_size:
            raise ValueError(f"its header has more than {MAX_HEADER >> 20} MiB")
        with safe_open(path, framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def save_model(
    path: str | os.PathLike[str], description: ModelDescription, weights: Mapping[str, np.ndarray], half: bool = False
) -> None:
    """Write a model as one file.

    The file is written whole under a temporary name, flushed to the disk and then renamed, so that a save that is
    interrupted, or meets a full disk, leaves the old model as it was.

    Args:
        path: a folder, which is made if need be and gets a `model.safetensors`, or the `.safetensors` file.
        description: all but the weights.
        weights: by name.
        half: store floating-point weights in float16, half the size.

    Raises:
        CheckpointError: the file cannot be written, or a weight is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = model_file(path)
    with np.errstate(over="ignore"):  # what becomes infinite is found below
        weights = {
            name: np.asarray(array, np.float16 if half and array.dtype.kind == "f" else None, order="C")
            for name, array in weights.items()
        }
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite{' in float16' if half else ''}; "
                f"the model is not saved, and {path} is untouched"
            )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(weights, temporary, description.to_metadata())
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot save the model in {path}: {reason}; what was there before is untouched"
        ) from error


def check_format(metadata: Mapping[str, str], path: Path) -> None:
    """Raise CheckpointError unless the texts of a header are of this version's format."""
    found = metadata.get("format", "")
    if found == str(FORMAT):
        return
    if not found and {"config", "vocabulary"} <= metadata.keys():
        found = "1, of three files"
    if not found:
        raise CheckpointError(f"{path} is not a model of captioner: its header names no format")
    raise CheckpointError(
        f"{path} is of format {found:.100}; this version of captioner reads format {FORMAT}, one file"
    )


def read_graphs(metadata: Mapping[str, str], configuration: str, path: Path) -> Graphs | None:
    """The graphs in a header; None, with a warning, where they are damaged or belong to another configuration."""
    if "graphs" not in metadata:
        return None
    try:
        graphs = Graphs.from_text(metadata["graphs"])
        if graphs.configuration != configuration:
            raise ValueError("they were exported from another configuration")
    except ValueError as error:
        warnings.warn(f"the graphs in {path} are not used: {error}; run captioner-export {path}", stacklevel=2)
        return None
    return graphs


def parse_json(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    """The value of one text of a header. Raises ValueError where it is missing, broken or of another kind."""
    if name not in metadata:
        raise ValueError(f"its {name} is missing")
    try:
        value = json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} is truncated or not JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"its {name} should be a JSON {kind.__name__}, not a {type(value).__name__}")
    return value
