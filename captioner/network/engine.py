"""The engine that captions with torch: on a GPU, or with a network that is being trained."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.engine import Step
from captioner.images import reason
from captioner.network.model import ShowAttendTell


class TorchEngine:
    """A network computed by torch, on the device where its weights are; see `captioner.engine.Engine`.

    Args:
        model: the network, which is set to evaluation mode.
    """

    def __init__(self, model: ShowAttendTell) -> None:
        self.model = model.eval()
        self.decoder: Any = model.decoder  # whichever it is, it has the same methods
        self.decoder.remember_words()

    @property
    def heads(self) -> int:
        """Attention maps of each word."""
        return int(self.decoder.heads)

    @property
    def displacement(self) -> float:
        """See `captioner.network.encoder.Encoder`."""
        return self.model.encoder.displacement

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.model.device)

    @torch.inference_mode()
    def annotate(self, images: np.ndarray) -> Tensor:
        """See `Engine.annotate`."""
        return self.model.annotate(self.array(images))

    def array(self, values: np.ndarray) -> Tensor:
        """A NumPy array as a tensor on the network's device."""
        return torch.from_numpy(values).to(self.model.device)

    @torch.inference_mode()
    def encode(self, annotations: Tensor, mask: Tensor | None = None) -> Any:
        """See `Engine.encode`."""
        return self.decoder.encode(annotations, mask)

    @torch.inference_mode()
    def initial_state(self, memory: Any, rows: int) -> Any:
        """See `Engine.initial_state`."""
        return self.decoder.initial_state(memory, rows)

    @torch.inference_mode()
    def step(self, memory: Any, state: Any, tokens: Tensor) -> Step:
        """See `Engine.step`."""
        return self.decoder.step(memory, state, tokens)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of that name; None is the CPU, "auto" a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device or "cpu").cpu()
    except Exception as error:  # each backend has its own
        raise ValueError(f"cannot use device {str(device)!r}: {reason(error)}") from error
    return torch.device(device or "cpu")
