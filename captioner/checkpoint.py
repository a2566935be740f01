"""Models in PyTorch: saved to one file and loaded from it. `captioner.modelfile` describes the file."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captioner.files import replacing
from captioner.images import Preprocessing
from captioner.modelfile import CheckpointError, ModelDescription, model_file, opened
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model, its vocabulary, its preprocessing, and what is known of it: scores, the command that made it."""

    model: ShowAttendTell
    vocabulary: Vocabulary
    preprocessing: Preprocessing
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint, half: bool = False) -> None:
    """Write a model as one file.

    The file is written whole under a temporary name, flushed to the disk and then renamed, so that a save that is
    interrupted, or meets a full disk, leaves the old model as it was.

    Args:
        path: a folder, which is made if need be and gets a `model.safetensors`, or the `.safetensors` file.
        checkpoint: the model.
        half: store floating-point weights in float16, half the size.

    Raises:
        CheckpointError: the file cannot be written, or a weight is not finite.
    """
    path = model_file(path)
    weights = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in checkpoint.model.state_dict().items()
    }
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite{' in float16' if half else ''}; "
                f"the model is not saved, and {path} is untouched"
            )
    description = ModelDescription(
        checkpoint.model.config, checkpoint.vocabulary, checkpoint.preprocessing, checkpoint.about
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_tensors(temporary, weights, description.to_metadata())
    except OSError as error:
        raise CheckpointError(
            f"cannot save the model in {path}: {error.strerror or error}; what was there before is untouched"
        ) from error


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Checkpoint:
    """Read what `save_checkpoint` wrote. The model is in evaluation mode and in float32.

    Args:
        path: a folder with a `model.safetensors`, or the `.safetensors` file.
        device: where the weights go.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or its weights do not fit its
            configuration.
    """
    path = model_file(path)
    with opened(path, "pt") as file:
        description = ModelDescription.from_metadata(file.metadata() or {}, path)
        try:
            with WithoutMemory():
                model = ShowAttendTell(description.config)
        except Exception as error:  # torch and torchvision raise many kinds at sizes that make no sense
            raise CheckpointError(f"{path} does not describe a model: {error!s:.300}") from error
        check_shapes(model, file, path)
        fill(model.to_empty(device="cpu"), file, path)
    return Checkpoint(model.to(device).eval(), description.vocabulary, description.preprocessing, description.about)


class WithoutMemory(TorchFunctionMode):
    """Networks built inside have shapes but no memory, so that these are first compared with a file's.

    Unlike with `torch.device("meta")`, tensors other than weights and buffers are real: some networks read them.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


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


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises CheckpointError where it is none."""
    with opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
