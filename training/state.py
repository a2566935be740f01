"""The state of a run, from which it is resumed: progress, weights, their average and the optimiser's moments."""

import dataclasses
import json
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captioner.checkpoint import CheckpointError, load_tensors, save_tensors
from captioner.files import replacing
from captioner.modelfile import MODEL_FILE

from .config import TrainConfig
from .data.sources import source_name

STATE = "training-state.safetensors"
# What may change between a run and its continuation without changing what the run computes.
FREE_OPTIONS = {
    "output",
    "device",
    "workers",
    "cache",
    "resume",
    "checkpoint_every",
    "compile",
    "patience",
}


class TrainingError(RuntimeError):
    """Training cannot continue; the message gives the reason."""


@dataclasses.dataclass
class Progress:
    """The position of a run and its measurements.

    Dropout and augmentation use generators seeded by the step and the epoch, so no generator's state has to be saved.

    stage, epoch, batch: position of the next batch.
    step, total_steps: number of steps taken in this stage, and in the whole run.
    loss_sum, reward_sum, seconds: sums over the batches of this epoch.
    best, best_bleu: the best dev score of the run, and the BLEU-4 of that model.
    stale: epochs of this stage since the score last improved.
    baseline: moving average of a word's log-probability, the baseline of attention that draws regions.
    history: a row of figures for each epoch.
    """

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    step: int = 0
    total_steps: int = 0
    loss_sum: float = 0.0
    reward_sum: float = 0.0
    seconds: float = 0.0
    best: float = -math.inf
    best_bleu: float = -math.inf
    stale: int = 0
    baseline: float | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def count_step(self, loss: float) -> None:
        """Count a step that has been taken."""
        self.loss_sum += loss
        self.batch, self.step, self.total_steps = self.batch + 1, self.step + 1, self.total_steps + 1

    def row(self, name: str, scores: dict[str, float], images: int, rewarded: bool) -> dict[str, Any]:
        """The figures of this epoch for the history. Before the first step there is no loss, and the epoch is 0.

        Args:
            name: of the stage, or "start".
            scores: on the dev images.
            images: number of training images.
            rewarded: whether the stage has rewards.
        """
        trained = self.batch > 0
        return {
            "stage": name,
            "epoch": self.epoch + 1 if trained else 0,
            "loss": self.loss_sum / self.batch if trained else "",
            "reward": self.reward_sum / self.batch if trained and rewarded else "",
            **scores,
            "seconds": self.seconds,
            "images_per_second": images / max(self.seconds, 1e-9) if trained else 0.0,
        }

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first batch of an epoch."""
        self.epoch, self.batch = epoch, 0
        self.loss_sum = self.reward_sum = self.seconds = 0.0

    def begin_stage(self, stage: int) -> None:
        """Move to the first epoch of a stage."""
        self.begin_epoch(0)
        self.stage, self.step, self.stale = stage, 0, 0


class StateWriter:
    """A context that writes the state into one file of the run folder, completely or not at all.

    It is copied at once and written by a thread, so that training goes on meanwhile. The context ends when it is
    written.

    Args:
        config: the options of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def save(self, progress: Progress, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> None:
        """Begin to write the state, after an earlier one has been written.

        Args:
            progress: of the run.
            modules: by name; "model" is the one that is trained.
            optimiser: of its parameters.

        Raises:
            OSError: the earlier one could not be written; the state before it is kept.
        """
        self.wait()
        tensors = {
            f"{part}/{name}": tensor for part, module in modules.items() for name, tensor in module.state_dict().items()
        }
        names: dict[Any, str] = {parameter: name for name, parameter in modules["model"].named_parameters()}
        for parameter, state in optimiser.state.items():
            tensors |= {f"optimiser/{key}/{names[parameter]}": tensor for key, tensor in state.items()}
        copies = {key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        metadata = {
            "progress": json.dumps(dataclasses.asdict(progress)),
            "config": json.dumps(options_for_resuming(self.config)),
        }
        self.writing = self.thread.submit(self.write, copies, metadata)

    def write(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write the file."""
        with replacing(Path(self.config.output) / STATE) as path:
            save_tensors(path, tensors, metadata)

    def wait(self) -> None:
        """Wait until the state is written.

        Raises:
            OSError: it cannot be written; the previous state is kept.
        """
        writing, self.writing = self.writing, None
        if writing:
            writing.result()


def load_state(config: TrainConfig) -> tuple[Progress, dict[str, Tensor] | None]:
    """The progress and the tensors that `StateWriter` wrote; a new progress and None if there is no saved state.

    Raises:
        TrainingError: the file is damaged, the run has other options, or there is a run but `resume` is not set.
    """
    path = Path(config.output) / STATE
    if not path.exists():
        return Progress(), None
    if not config.resume:
        raise TrainingError(
            f"{config.output} holds a run already; go on with it by --resume, or choose another --output"
        )
    try:
        tensors, metadata = load_tensors(path)
        # An option that did not exist when the run began has its default.
        saved = options_for_resuming(TrainConfig()) | json.loads(metadata["config"])
        progress = Progress(**json.loads(metadata["progress"]))
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"cannot resume from {path}: {error}") from error
    now = options_for_resuming(config)
    changed = [key for key in now if key not in FREE_OPTIONS and saved[key] != now[key]]
    if changed:
        was = ", ".join(f"{key} was {saved[key]!r} and is {now[key]!r}" for key in changed)
        raise TrainingError(f"cannot resume {config.output} with other options: {was}")
    return progress, tensors


def restore_tensors(
    tensors: dict[str, Tensor], modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer
) -> None:
    """Copy the tensors from `load_state` into the modules and the optimiser; see `StateWriter.save`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    for name, module in modules.items():
        module.load_state_dict(part(f"{name}/"))
    names = {parameter: name for name, parameter in modules["model"].named_parameters()}
    order = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in part("optimiser/").items():
        kind, name = key.split("/", 1)
        state.setdefault(order.index(name), {})[kind] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def remove_leftovers(folder: Path) -> None:
    """Remove the half-written files that a killed process left in the run folder."""
    for name in (STATE, MODEL_FILE):
        for left in folder.glob(f".{name}.????????"):
            left.unlink(missing_ok=True)


def options_for_resuming(config: TrainConfig) -> dict[str, Any]:
    """The options as they are after a round trip through JSON; of the data sets only the names, as folders may move."""
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    options["data"] = [source_name(source) for source in config.data]
    return options
