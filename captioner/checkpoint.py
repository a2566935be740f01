"""A model as a folder: `model.safetensors`, `config.json`, `vocabulary.json`. Nothing in it is ever unpickled."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captioner.files import replacing
from captioner.images import Preprocessing
from captioner.network.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import SPECIAL, Vocabulary

FORMAT = 1
WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.json"
MAX_JSON = 16 * 2**20  # bytes of a JSON file, and of the header of a safetensors file
MAX_SIZE = 2**24  # of anything in a configuration without a smaller limit
MAX_SIZES = {"encoder_self_attention": 64, "layers": 64, "heads": 1024, "grid": 128}


class CheckpointError(RuntimeError):
    """A model that cannot be loaded or saved; the message names the file and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, its words, its preprocessing, and what is known of it (scores, the command that made it)."""

    model: ShowAttendTell
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(folder: str | os.PathLike[str], checkpoint: Checkpoint, half: bool = False) -> None:
    """Write the checkpoint into `folder`, made if need be.

    Every file is written whole under a temporary name and flushed to the disk before the first one is renamed
    into place, so a save that is interrupted, or meets a full disk, leaves the old checkpoint as it was. The
    weights come last and carry the digests of the other two files, so files of two saves never pass as one model.

    Args:
        half: store floating-point weights in float16, half the size.

    Raises:
        CheckpointError: the folder cannot be written, or a weight is not finite.
    """
    config = {
        "format": FORMAT,
        "model": dataclasses.asdict(checkpoint.model.config),
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "about": checkpoint.about,
    }
    config_bytes = encode_json(config)
    vocabulary_bytes = encode_json(checkpoint.vocabulary.words[len(SPECIAL) :])
    weights = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite{' in float16' if half else ''}; "
                f"the model is not saved, and {Path(folder)} is untouched"
            )
    metadata = {"config": digest(config_bytes), "vocabulary": digest(vocabulary_bytes)}
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = (folder / CONFIG, folder / VOCABULARY, folder / WEIGHTS)
        with replacing(*files) as (config_path, vocabulary_path, weights_path):
            config_path.write_bytes(config_bytes)
            vocabulary_path.write_bytes(vocabulary_bytes)
            save_tensors(weights_path, weights, metadata)
    except OSError as error:
        raise CheckpointError(
            f"cannot save the model in {folder}: {error.strerror or error}; what was there before is untouched"
        ) from error


def load_checkpoint(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote; the model comes in evaluation mode and float32.

    Raises:
        CheckpointError: a file is missing, truncated, of another format or version, or does not fit the others.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}")
    with opened(folder / WEIGHTS) as file:
        metadata = file.metadata() or {}
        config_bytes = read_saved_with(folder / CONFIG, metadata.get("config"))
        vocabulary_bytes = read_saved_with(folder / VOCABULARY, metadata.get("vocabulary"))
        config = parse_json(config_bytes, dict, folder / CONFIG)
        if config.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder / CONFIG} has format {config.get('format')!r}; "
                f"this version of captioner reads format {FORMAT}"
            )
        words = parse_json(vocabulary_bytes, list, folder / VOCABULARY)
        for name, part, data in (("config", CONFIG, config_bytes), ("vocabulary", VOCABULARY, vocabulary_bytes)):
            if metadata.get(name) != digest(data):
                raise CheckpointError(
                    f"{folder / part} is not the one that {WEIGHTS} was saved with; copy all three files again"
                )
        try:
            vocabulary = Vocabulary(words)
        except ValueError as error:
            raise CheckpointError(f"{folder / VOCABULARY} is no list of words: {error}") from error
        try:
            model_config = read_config(config["model"])
            preprocessing = Preprocessing.from_dict(config["preprocessing"])
            about = config.get("about", {})
            if not isinstance(about, dict):
                raise ValueError(f"about should be an object, not {about!r}")
            with WithoutMemory():
                model = ShowAttendTell(model_config)
        except Exception as error:  # whatever the parts of a network raise at sizes that make no sense
            message = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{folder / CONFIG} does not describe a model: {message}") from error
        if model_config.vocabulary_size != len(vocabulary):
            raise CheckpointError(
                f"{folder / VOCABULARY} has {len(vocabulary)} words, {CONFIG} says {model_config.vocabulary_size}"
            )
        check_shapes(model, file, folder / WEIGHTS)
        fill(model.to_empty(device="cpu"), file, folder / WEIGHTS)
    return Checkpoint(model.to(device).eval(), vocabulary, preprocessing, about)


class WithoutMemory(TorchFunctionMode):
    """Networks built inside have shapes and no memory, so that they can be compared with a file's first.

    Unlike with `torch.device("meta")`, tensors other than weights and buffers are real: some networks read them.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def read_config(values: dict[str, Any]) -> ModelConfig:
    """The configuration of a model from a file.

    Raises:
        TypeError, ValueError: there is an unknown name, or a value of the wrong type or outside all reason.
    """
    config = ModelConfig(**values)
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        if field.name == "grid":
            value = list(value) if isinstance(value, list | tuple) else []
            valid = len(value) == 2 and all(type(n) is int and 1 <= n <= MAX_SIZES["grid"] for n in value)
        elif field.type is int:
            least = 0 if field.name in ("annotation_size", "encoder_self_attention") else 1
            valid = type(value) is int and least <= value <= MAX_SIZES.get(field.name, MAX_SIZE)
        elif field.type is float:
            valid = isinstance(value, int | float) and math.isfinite(value)
        else:
            valid = isinstance(value, field.type)  # type: ignore[arg-type]
        if not valid:
            raise ValueError(f"{field.name} cannot be {value!r:.100}")
    # The other networks of torchvision download parts of themselves when they are built.
    if config.encoder not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(f"torchvision has no classification network {config.encoder!r:.100}")
    return dataclasses.replace(config, grid=(config.grid[0], config.grid[1]))


def check_shapes(model: torch.nn.Module, file: Any, source: Path) -> None:
    """Raise CheckpointError where the tensors of a safetensors file are not those of the model."""
    own = model.state_dict()
    names = set(file.keys())
    for problem, wrong in (("lacks", own.keys() - names), ("has unknown", names - own.keys())):
        if wrong:
            raise CheckpointError(f"{source} {problem} tensors that its config asks for: {sorted(wrong)[:3]}")
    for name, tensor in own.items():
        there = file.get_slice(name)
        if list(there.get_shape()) != list(tensor.shape):
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(there.get_shape())}, expected {tuple(tensor.shape)}"
            )
        if there.get_dtype() not in (("F32", "F16", "BF16") if tensor.is_floating_point() else ("I64",)):
            raise CheckpointError(f"{source}: {name} is of type {there.get_dtype()}, expected {tensor.dtype}")


def fill(model: torch.nn.Module, file: Any, source: Path) -> None:
    """Copy the tensors of a safetensors file into `model`, one after the other."""
    for name, own in model.state_dict().items():
        tensor = file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")
        own.copy_(tensor)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open; nothing but its header is read. Raises CheckpointError where it is none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if MAX_JSON < header < path.stat().st_size:
            raise ValueError(f"its header has more than {MAX_JSON >> 20} MiB")
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises CheckpointError where it is none."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_saved_with(path: Path, wanted: str | None) -> bytes:
    """A file of a model, of the digest that its weights were saved with.

    Where a save was killed between two of its renames, the weights are still those from before, and so is a copy of
    the file that was replaced already (see `swap`). Where there is no such copy either, the file as it is.
    """
    data = read_file(path)
    if digest(data) != wanted:
        for old in path.parent.glob(f".{path.name}.*.old"):
            if digest(before := read_file(old)) == wanted:
                return before
    return data


def read_file(path: Path) -> bytes:
    """The bytes of a JSON file. Raises CheckpointError where it is missing or very large."""
    try:
        if not path.is_file():
            raise FileNotFoundError
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{path} has more than {MAX_JSON >> 20} MiB")
    return data


def parse_json(data: bytes, kind: type, path: Path) -> Any:
    """The JSON value in `data`, read from `path`. Raises CheckpointError where it is broken or of another kind."""
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} should hold a JSON {kind.__name__}, not a {type(value).__name__}")
    return value


def encode_json(value: Any) -> bytes:
    """JSON for people: indented, UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
