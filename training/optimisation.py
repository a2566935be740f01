"""The optimiser of a stage, its learning rate over the steps, and the averages of the weights."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from captioner.network.model import ShowAttendTell

from .config import TrainConfig
from .stages import Stage


def build_optimiser(model: ShowAttendTell, stage: Stage, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with separate learning rates for encoder and decoder, and weight decay on matrices and kernels only.

    The field "peak" of each parameter group is its peak learning rate.
    """
    groups = []
    for part, peak in (("encoder.", stage.encoder_learning_rate), ("", stage.learning_rate)):
        own = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.startswith("encoder.") == bool(part)
        ]
        for decay in (0.0, weight_decay):
            chosen = [parameter for parameter in own if (parameter.dim() > 1) == (decay > 0)]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "peak": peak})
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=model.device.type in ("cpu", "cuda"))


def set_learning_rate(optimiser: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> None:
    """Set the learning rate of a step: a linear warm-up (at most a tenth of the steps), then a cosine."""
    warm_up = min(1.0, (step + 1) / max(min(config.warmup_steps, total // 10), 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    share = warm_up * (config.final_rate + (1 - config.final_rate) * cosine)
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of the weights; its decay is lower at first, to forget the initial weights.

    Weights that are frozen, as `requires_grad` says now, are left out: their average is what they are.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]

    def average(means: Sequence[Tensor], currents: Sequence[Tensor], updates: Tensor | int) -> None:
        share = min(decay, (1 + int(updates)) / (10 + int(updates)))
        for mean, current, changes in zip(means, currents, trained, strict=True):
            if changes:
                mean.lerp_(current, 1 - share)

    return AveragedModel(model, multi_avg_fn=average)


def interpolate(start: ShowAttendTell, end: ShowAttendTell, share: float) -> ShowAttendTell:
    """A model on the line between two others, at `share` of the way.

    After fine-tuning with another objective the best model is often not at the end of this line (Wortsman et al. 2022,
    "Robust fine-tuning of zero-shot models").
    """
    model = copy.deepcopy(end)
    model.load_state_dict(mean_weights([end.state_dict(), start.state_dict()], [share, 1 - share]))
    return model


def mean_weights(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """The mean of the weights of models, each with its share (they sum to 1). Integer buffers are the first model's."""
    return {
        name: torch.stack([share * state[name] for share, state in zip(shares, states, strict=True)]).sum(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }
