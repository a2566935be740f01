"""The training loop: stages, epochs and steps, resumable at any step, on one process or many."""

import copy
import logging
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from captioner.images import Preprocessing
from captioner.network.attention import Attention
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import Vocabulary

from .best_model import BestModel
from .config import TrainConfig, data_weights
from .data.batches import Batch, CaptionTable, EpochBatches, encode_captions, file_numbers
from .data.images import ImageSource
from .data.items import CaptionedImage
from .distributed import Distributed
from .history import History
from .interruption import Interrupted, StopRequest
from .objectives import Imitation, Objective
from .optimisation import build_average, build_optimiser, interpolate, set_learning_rate
from .self_critical import SelfCritical
from .stages import Stage
from .state import Progress, StateWriter, TrainingError, load_state, remove_leftovers, restore_tensors
from .validation import Validation

log = logging.getLogger("training")


class Trainer:
    """Trains a model stage by stage and saves the best one in the run folder.

    Args:
        config: the options.
        model: the network, on the device to train on.
        vocabulary, preprocessing: saved with the model.
        train, dev: items whose images are readable.
        stages: in order.
        distributed: the processes that share the work.
    """

    objective: Objective
    optimiser: torch.optim.Optimizer
    average: AveragedModel
    modules: dict[str, nn.Module]  # whose weights belong to the state

    def __init__(
        self,
        config: TrainConfig,
        model: ShowAttendTell,
        vocabulary: Vocabulary,
        preprocessing: Preprocessing,
        train: Sequence[CaptionedImage],
        dev: Sequence[CaptionedImage],
        stages: Sequence[Stage],
        distributed: Distributed,
    ) -> None:
        self.config, self.model, self.stages, self.distributed = config, model, stages, distributed
        self.vocabulary, self.train_items, self.output = vocabulary, train, Path(config.output)
        self.captions = CaptionTable(encode_captions(item, vocabulary, config.max_length) for item in train)
        weights = data_weights(config)
        self.weights = [weights.get(item.dataset, 1.0) for item in train]
        self.files = file_numbers(train)
        self.validation = Validation(dev, vocabulary, config.monitor_beam, distributed)
        self.best_model = BestModel(config, vocabulary, preprocessing)
        self.history = History(self.output) if distributed.is_first else None
        self.progress = Progress()
        self.state = StateWriter(config)
        self.stop = StopRequest()

    def run(self) -> float:
        """Train all stages, from the saved state if there is one. Returns the best dev score.

        Raises:
            TrainingError: the run cannot be resumed, or the loss is not finite.
            OSError: a part of the run cannot be written; what was saved before is whole.
            Interrupted: SIGINT or SIGTERM came; the state has been saved first.
        """
        if self.config.resume and self.distributed.is_first:
            remove_leftovers(self.output)
        self.progress, tensors = load_state(self.config)
        if len({progress.total_steps for progress in self.distributed.gather(self.progress)}) > 1:
            raise TrainingError(
                f"{self.config.output} is not the same folder on all machines; give one that they share"
            )
        if self.history:
            self.history.steps = self.progress.total_steps
        with self.stop, self.state:
            for number in range(self.progress.stage, len(self.stages)):
                self.run_stage(self.stages[number], tensors)
                tensors = None
                self.progress.begin_stage(number + 1)
        if self.history:
            self.history.close()
        return self.progress.best

    def run_stage(self, stage: Stage, tensors: dict[str, Tensor] | None) -> None:
        """Train one stage, from saved tensors if there are any."""
        progress = self.progress
        self.begin_stage(stage, tensors)
        if self.config.start_from and tensors is None and not progress.history:
            self.validate(stage, "start")
        if tensors is None and progress.history:
            # Resuming could not start the stage again once a better model has replaced the one that it begins with.
            self.save()
        while progress.epoch < stage.epochs and progress.stale < self.config.patience:
            self.run_epoch(stage)
            self.validate(stage, stage.name)
            progress.begin_epoch(progress.epoch + 1)
            self.save()

    def run_epoch(self, stage: Stage) -> None:
        """Train on the remaining batches of the epoch."""
        progress = self.progress
        batches = self.batches(stage)
        self.objective.begin_epoch()
        # Cached features are read faster than they could be passed on by another process.
        workers = self.config.workers if isinstance(stage.train, ImageSource) else 0
        bar = tqdm(
            batches.loader(progress.batch, workers, pin_memory=self.distributed.device.type == "cuda"),
            f"{stage.name} epoch {progress.epoch + 1}/{stage.epochs}",
            len(batches),
            initial=progress.batch,
            disable=self.distributed.quiet,
            unit="batch",
        )
        for batch in bar:
            started = time.perf_counter()
            set_learning_rate(self.optimiser, self.config, progress.step, stage.epochs * len(batches))
            loss, stop = self.step(batch)
            progress.seconds += time.perf_counter() - started
            progress.count_step(loss)
            bar.set_postfix(loss=f"{progress.loss_sum / progress.batch:.3f}")
            if self.history:
                self.history.step(loss, self.optimiser.param_groups[-1]["lr"])
            if stop:
                self.save()
                raise Interrupted
            if progress.step % self.config.checkpoint_every == 0:
                self.save(wait=False)

    def step(self, batch: Batch) -> tuple[float, bool]:
        """One step of gradient descent. Returns the loss of the whole batch, and whether a process is to stop."""
        progress, distributed = self.progress, self.distributed
        # All random numbers of a step depend on its number alone: resuming needs no generator's state.
        torch.manual_seed(hash((self.config.seed, progress.stage, progress.step, distributed.rank)) % 2**63)
        self.optimiser.zero_grad()
        sums = torch.zeros(2, device=self.model.device)
        parts = batch.parts(self.config.accumulate)
        for part in parts:
            with self.summed(part is parts[-1]):
                loss, statistic = self.objective.loss(part)
                # DistributedDataParallel averages gradients over the processes; these losses are to be summed.
                (batch.weight * loss * distributed.size).backward()
            sums += batch.weight * torch.stack([loss.detach(), statistic])
        stop = torch.tensor([float(self.stop.received)], device=sums.device)
        total, measured, stops = distributed.sum(torch.cat([sums, stop])).tolist()
        if not math.isfinite(total):
            raise self.not_finite(total, batch)
        self.objective.record(batch, measured)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimiser.step()
        self.average.update_parameters(self.model)
        return total, stops > 0

    def summed(self, last: bool) -> AbstractContextManager[None]:
        """A context for the backward pass of a part of a batch: gradients are summed over processes with the last."""
        parallel = self.objective.parallel
        return nullcontext() if last or not isinstance(parallel, DistributedDataParallel) else parallel.no_sync()

    def validate(self, stage: Stage, name: str) -> None:
        """Score the averaged weights on the dev images, record the scores, save the model if it is the best so far.

        Where the stage has a share below 1, it is the model between the one before the stage and the average.

        A run that starts from a trained model begins with a row "start" for that model (epoch 0), so that the best
        model of the run is never worse. Of models with equal scores the one with the higher BLEU-4 is kept, then the
        earliest: on a few dev images with the same words CIDEr is always 0.
        """
        progress, config = self.progress, self.config
        model = cast(ShowAttendTell, self.average.module)
        if stage.share < 1:
            model = interpolate(cast(ShowAttendTell, self.modules["start"]), model, stage.share)
        scores = self.validation.scores(model, stage.dev)
        row = progress.row(name, scores, len(self.train_items), stage.self_critical)
        progress.history.append(row)
        log.info("%s", "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        found = (scores[config.monitor], scores["BLEU-4"])
        better = found > (progress.best, progress.best_bleu)
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best, progress.best_bleu = found
        if self.history:
            self.history.epoch(progress.history)
            if better:
                self.best_model.save(model, row)
        self.distributed.barrier()

    def begin_stage(self, stage: Stage, tensors: dict[str, Tensor] | None) -> None:
        """Create the average, the optimiser and the objective. A later stage continues from the best model so far."""
        if tensors is None and self.progress.best > -math.inf:
            self.model.load_state_dict(self.best_model.weights())
        if tensors is None and stage.sharpen != 1:
            # Narrower maps are wanted though they cost some of the score: this stage's best model replaces the best.
            self.progress.best = self.progress.best_bleu = -math.inf
            for module in self.model.decoder.modules():
                if isinstance(module, Attention):
                    module.sharpen(stage.sharpen)
        self.model.encoder.train_from(stage.train_from)
        self.average = build_average(self.model, self.config.ema_decay)
        self.optimiser = build_optimiser(self.model, stage, self.config.weight_decay)
        self.modules = {"model": self.model, "average": self.average}
        if stage.share < 1:
            self.modules["start"] = copy.deepcopy(self.model)
        if tensors is not None:
            restore_tensors(tensors, self.modules, self.optimiser)
        parallel: nn.Module = self.model
        if self.distributed.size > 1:
            parallel = DistributedDataParallel(self.model, broadcast_buffers=False)
        arguments = (self.config, stage, self.progress, self.model, parallel, self.vocabulary)
        self.objective = SelfCritical(self.train_items, *arguments) if stage.self_critical else Imitation(*arguments)

    def batches(self, stage: Stage) -> EpochBatches:
        """The batches of the current epoch."""
        return EpochBatches(
            stage.train,
            self.captions if stage.captions is None else stage.captions,
            self.config.batch_size,
            self.config.seed,
            1000 * self.progress.stage + self.progress.epoch,
            self.distributed.rank,
            self.distributed.size,
            self.weights if stage.captions is None else None,
            self.files if stage.captions is None else None,
        )

    def save(self, wait: bool = True) -> None:
        """Save the state, from the first process. Without `wait` training goes on while it is written."""
        if self.distributed.is_first:
            self.state.save(self.progress, self.modules, self.optimiser)
            if wait:
                self.state.wait()

    def not_finite(self, loss: float, batch: Batch) -> TrainingError:
        """The error for a loss that is not finite; it names the step and the first images."""
        progress, of_images = self.progress, self.stages[self.progress.stage].captions is None
        names = [self.train_items[index].name for index in batch.indices[:4] if of_images]
        return TrainingError(
            f"the loss is {loss} in step {progress.step} (stage {progress.stage + 1}, epoch {progress.epoch + 1}, "
            f"batch {progress.batch}: {', '.join(names)} ...); the last checkpoint in {self.output} is kept. "
            "A lower learning rate may help."
        )
