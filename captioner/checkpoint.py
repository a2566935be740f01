"""A model as a folder: `model.safetensors`, `config.json`, `vocabulary.json`. Nothing in it is ever unpickled."""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captioner.images import Preprocessing
from captioner.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import SPECIAL, Vocabulary

FORMAT = 1
WEIGHTS, CONFIG, VOCABULARY = "model.safetensors", "config.json", "vocabulary.json"


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
    config = read_json(folder / CONFIG, dict)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / CONFIG} has format {config.get('format')!r}; this version of captioner reads format {FORMAT}"
        )
    words = read_json(folder / VOCABULARY, list)
    weights, metadata = load_tensors(folder / WEIGHTS)
    for name, file in (("config", CONFIG), ("vocabulary", VOCABULARY)):
        if metadata.get(name) != digest((folder / file).read_bytes()):
            raise CheckpointError(
                f"{folder / file} is not the one that {WEIGHTS} was saved with; copy all three files again"
            )
    try:
        if not all(isinstance(word, str) for word in words):
            raise ValueError("every word should be a string")
        vocabulary = Vocabulary(words)
    except ValueError as error:
        raise CheckpointError(f"{folder / VOCABULARY} is no list of words: {error}") from error
    try:
        model_config = ModelConfig(**{**config["model"], "grid": tuple(config["model"]["grid"])})
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        model = ShowAttendTell(model_config)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model: {error}") from error
    if model_config.vocabulary_size != len(vocabulary):
        raise CheckpointError(
            f"{folder / VOCABULARY} has {len(vocabulary)} words, {CONFIG} says {model_config.vocabulary_size}"
        )
    fill(model, weights, folder / WEIGHTS)
    return Checkpoint(model.to(device).eval(), vocabulary, preprocessing, config.get("about", {}))


def fill(model: torch.nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Copy `weights` into `model`; any missing, unknown or misshapen one is a CheckpointError."""
    own = model.state_dict()
    for problem, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has unknown", weights.keys() - own.keys()),
    ):
        if names:
            raise CheckpointError(f"{source} {problem} tensors that its config asks for: {sorted(names)[:3]}")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(tensor.shape)}"
            )
        if not torch.isfinite(weights[name]).all():
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")
    model.load_state_dict(weights)


@contextlib.contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files beside `paths` to write; on success all are flushed to the disk, then take their places."""
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths]
    try:
        yield temporary
        for path in temporary:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o644)
        swap(temporary, paths)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def swap(temporary: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename each temporary file to its path; where that is interrupted, put back what stood there before."""
    before = [path.with_name(f"{new.name}.old") for new, path in zip(temporary, paths, strict=True)]
    done: list[tuple[Path, Path]] = []
    try:
        for new, old, path in zip(temporary, before, paths, strict=True):
            with contextlib.suppress(OSError):  # nothing stood there, or the file system has no hard links
                os.link(path, old)
            done.append((old, path))
            os.replace(new, path)
    except BaseException:
        for old, path in done:
            if old.exists():
                os.replace(old, path)
        raise
    finally:
        for old in before:
            old.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises OSError where the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises CheckpointError where it is none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def read_json(path: Path, kind: type) -> Any:
    """The JSON value in `path`. Raises CheckpointError where it is missing, broken or of another kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
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
