"""The training loop: stages, resumable at any step, on one process or many."""

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from captioner.arrays import gather_rows
from captioner.checkpoint import (
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_tensors,
    replacing,
    save_checkpoint,
    save_tensors,
)
from captioner.images import Preprocessing
from captioner.network.attention import EXPECTED, HardAttention
from captioner.network.decoder import TeacherForced
from captioner.network.model import ShowAttendTell
from captioner.search import BLOCK_NGRAMS, LENGTH_PENALTY, MAX_LENGTH, beam_search, sample
from captioner.vocabulary import END, PAD, SPECIAL, START, Vocabulary
from training.batches import Batch, EpochBatches, ImageSource, Source, encode_captions
from training.composed import Composed, add_composed, compose, composed_loss, content_words, split_composed
from training.config import TrainConfig, data_weights
from training.datasets import CaptionedImage
from training.distributed import Distributed
from training.history import History
from training.losses import caption_loss, hard_attention_loss, self_critical_loss, word_log_probabilities
from training.metrics import quick_scores
from training.rewards import CiderD, advantages
from training.sources import parse_source
from training.words import tokenize

log = logging.getLogger("training")

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


def options_for_resuming(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON gives them back; of the data sets only their names, since a folder may be moved."""
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    options["data"] = [parse_source(source)[0] for source in config.data]
    return options


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and what is left whole."""


class Interrupted(Exception):
    """The user or the system asked the run to stop; its state has been saved."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stretch of training with its own learning rates.

    train_from: first block of the encoder that is tuned, "" for all of it, None for none.
    self_critical: whether captions that the model draws are rewarded, instead of those of people imitated.
    captions: ids of captions to learn in place of the training images' own, as `encode_captions` gives them.
    """

    name: str
    epochs: int
    learning_rate: float
    encoder_learning_rate: float
    train_from: str | None
    train: Source
    dev: Source
    self_critical: bool = False
    captions: Sequence[Sequence[Sequence[int]]] | None = None


@dataclasses.dataclass
class Progress:
    """Where a run is: with the tensors of the model, its average and the optimiser, all that resuming needs.

    Dropout and augmentation draw from generators seeded by the step and the epoch, so no generator's state has to
    be kept.

    baseline: moving average of a word's log-probability, which hard attention learns by.
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
    stale: int = 0
    baseline: float | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Trainer:
    """Trains a model stage by stage and keeps the best one in the run folder.

    Args:
        config: the options.
        model: the network, on the device to train on.
        train, dev: items whose images are readable.
        stages: what to do, in order.
        distributed: this process's place among the others.
    """

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
        self.config, self.model = config, model
        self.vocabulary, self.preprocessing = vocabulary, preprocessing
        self.stages, self.distributed = stages, distributed
        self.output = Path(config.output)
        self.names = [item.path.name for item in train]
        self.captions = [encode_captions(item, vocabulary, config.max_length) for item in train]
        weights = data_weights(config)
        self.weights = [weights.get(item.dataset, 1.0) for item in train]
        self.references = [[tokenize(caption) for caption in item.captions] for item in dev]
        self.dev_sets: dict[str, list[int]] = {}
        for index, item in enumerate(dev):
            self.dev_sets.setdefault(item.dataset, []).append(index)
        self.content = content_words(vocabulary.words).to(distributed.device)
        self.reward = None
        if any(stage.self_critical for stage in stages):
            self.reward = CiderD(
                [[*tokenize(caption), vocabulary.words[END]] for caption in item.captions] for item in train
            )
        self.average: AveragedModel
        self.progress = Progress()
        self.history = History(self.output) if distributed.is_first else None
        self.stop_requested = False

    def run(self) -> float:
        """Train to the end, from wherever `progress` is. Returns the best dev score.

        Raises:
            TrainingError: the loss is not finite, or a checkpoint cannot be written.
            Interrupted: SIGINT or SIGTERM came; the state has been saved first.
        """
        if not self.config.resume and (self.output / STATE).exists():
            raise TrainingError(
                f"{self.output} holds a run already; go on with it by --resume, or choose another --output"
            )
        resumed = self.restore() if self.config.resume else None
        with self.graceful_stop():
            while self.progress.stage < len(self.stages):
                self.run_stage(self.stages[self.progress.stage], resumed)
                resumed = None
                self.progress = dataclasses.replace(
                    self.progress, stage=self.progress.stage + 1, epoch=0, batch=0, step=0, stale=0
                )
        if self.history:
            self.history.close()
        return self.progress.best

    def run_stage(self, stage: Stage, resumed: dict[str, Tensor] | None) -> None:
        """Train one stage; a stage that follows another goes on from the best model so far."""
        if resumed is None and self.progress.best > -math.inf:
            self.model.load_state_dict(load_checkpoint(self.output).model.state_dict())
        self.model.encoder.train_from(stage.train_from)
        self.average = AveragedModel(self.model, avg_fn=self.moving_average)
        optimiser = self.optimiser(stage)
        if resumed is not None:
            self.fill(optimiser, resumed)
        parallel: nn.Module = self.model
        if self.distributed.size > 1:
            parallel = DistributedDataParallel(self.model, broadcast_buffers=False)

        if self.config.start_from and resumed is None and not self.progress.history:
            self.validate(stage, "start")
            self.save(optimiser)
        while self.progress.epoch < stage.epochs and self.progress.stale < self.config.patience:
            self.run_epoch(stage, parallel, optimiser)
            self.validate(stage, stage.name)
            self.progress.epoch += 1
            self.progress.batch, self.progress.seconds = 0, 0.0
            self.progress.loss_sum, self.progress.reward_sum = 0.0, 0.0
            self.save(optimiser)

    def run_epoch(self, stage: Stage, parallel: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Train on every batch of the epoch from `progress.batch` on."""
        progress, distributed = self.progress, self.distributed
        batches = EpochBatches(
            stage.train,
            self.captions if stage.captions is None else stage.captions,
            self.config.batch_size,
            self.config.seed,
            1000 * progress.stage + progress.epoch,
            distributed.rank,
            distributed.size,
            self.weights if stage.captions is None else None,
        )
        total_steps = stage.epochs * len(batches)
        # Cached features are read faster than another process could hand them over.
        workers = self.config.workers if isinstance(stage.train, ImageSource) else 0
        loader = batches.loader(progress.batch, workers, pin_memory=distributed.device.type == "cuda")
        if stage.self_critical:
            self.draw_regions()
        else:
            parallel.train()
        bar = tqdm(
            loader,
            f"{stage.name} epoch {progress.epoch + 1}/{stage.epochs}",
            len(batches),
            initial=progress.batch,
            disable=distributed.quiet,
            unit="batch",
        )
        for batch in bar:
            started = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * self.rate(progress.step, total_steps)
            loss, stop = self.step(stage, batch, parallel, optimiser)
            progress.loss_sum += loss
            progress.seconds += time.perf_counter() - started
            progress.batch += 1
            progress.step += 1
            progress.total_steps += 1
            bar.set_postfix(loss=f"{progress.loss_sum / progress.batch:.3f}")
            if self.history:
                self.history.step(loss, optimiser.param_groups[-1]["lr"])
            if stop:
                self.save(optimiser)
                raise Interrupted
            if progress.step % self.config.checkpoint_every == 0:
                self.save(optimiser)

    def step(
        self, stage: Stage, batch: Batch, parallel: nn.Module, optimiser: torch.optim.Optimizer
    ) -> tuple[float, bool]:
        """One step of gradient descent. Returns the loss over the whole batch, and whether any process is to stop."""
        config, distributed, progress = self.config, self.distributed, self.progress
        # Whatever is random in this step depends on nothing but its number: resuming needs no generator's state.
        torch.manual_seed(hash((config.seed, progress.stage, progress.step, distributed.rank)) % 2**63)
        loss, own = (self.self_critical if stage.self_critical else self.imitate)(stage, batch, parallel)
        loss = batch.weight * loss
        stop = torch.tensor(float(self.stop_requested), device=loss.device)
        whole, measured, stops = distributed.sum(torch.stack([loss, batch.weight * own, stop])).tolist()
        if not math.isfinite(whole):
            names = ", ".join(self.names[index] for index in batch.indices[:4] if stage.captions is None)
            raise TrainingError(
                f"the loss is {whole} in step {progress.step} (stage {progress.stage + 1}, epoch "
                f"{progress.epoch + 1}, batch {progress.batch}: {names} ...); "
                f"the last checkpoint in {self.output} is kept. A lower learning rate may help."
            )
        if stage.self_critical:
            progress.reward_sum += measured / batch.size
        else:
            now = measured / max(batch.words, 1)
            progress.baseline = now if progress.baseline is None else 0.9 * progress.baseline + 0.1 * now
        optimiser.zero_grad()
        # DistributedDataParallel takes the mean over the processes; the loss is made to be summed.
        (loss * distributed.size).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        optimiser.step()
        self.average.update_parameters(self.model)
        return whole, stops > 0

    def imitate(self, stage: Stage, batch: Batch, parallel: nn.Module) -> tuple[Tensor, Tensor]:
        """This process's share of the loss on people's captions, and the sum of their words' log-probabilities."""
        config, device = self.config, self.distributed.device
        images, captions = (part.to(device, non_blocking=True) for part in (batch.images, batch.captions))
        composed = self.compose(stage, batch, images)
        if composed:
            images, captions = add_composed(images, captions, composed)
        inputs = None
        share = config.scheduled_sampling * self.progress.epoch / max(stage.epochs - 1, 1)
        if share > 0:
            images = self.features(stage, images)
            inputs = self.own_words(images.detach(), captions, share)
        rows = batch.captions.shape[1]
        output, extra = self.read_composed(batch, rows, composed, self.read(parallel, images, captions, inputs))
        loss = extra + caption_loss(
            output,
            batch.words,
            batch.whole,
            config.label_smoothing,
            config.doubly_stochastic,
            batch.image_weights.to(device),
        )
        if output.choice_log_probability is None:
            return loss, loss.new_zeros(())
        told = word_log_probabilities(output).detach()
        hard = hard_attention_loss(
            output, told, batch.words, self.progress.baseline, config.hard_reinforce, config.hard_entropy
        )
        return loss + hard, told.sum()

    def compose(self, stage: Stage, batch: Batch, images: Tensor) -> Composed | None:
        """Pictures composed of this batch's photographs; None where the run or the stage has none."""
        count = min(round(self.config.composed * len(images)), len(images) // 2)
        if count == 0 or stage.captions is not None:
            return None
        chance = torch.Generator().manual_seed(torch.initial_seed())
        composed = compose(images, batch.captions, count, self.model.encoder.grid, chance)
        return Composed(*(part.to(images.device) for part in composed))

    def read_composed(
        self, batch: Batch, rows: int, composed: Composed | None, output: TeacherForced
    ) -> tuple[TeacherForced, Tensor]:
        """The output for the batch alone, of `rows` captions an image, and the loss on the composed pictures behind it.

        The loss is this process's share of the whole batch's.
        """
        if composed is None:
            return output, output.logits.new_zeros(())
        output, behind = split_composed(output, len(batch.indices), rows)
        loss = composed_loss(behind, composed.own, self.content, self.config.pointing)
        return output, self.config.composed * len(batch.indices) / batch.size * loss

    def own_words(self, images: Tensor, captions: Tensor, share: float) -> Tensor:
        """The captions with a share of their words drawn by the model that read the true ones before them.

        Scheduled sampling (Bengio et al. 2015), all words at once (Mihaylova and Martins 2019).
        """
        with torch.no_grad():
            output = self.read(self.model, images, captions)
        output.logits[:, : len(SPECIAL)] = float("-inf")
        drawn = torch.multinomial(output.logits.softmax(dim=-1), 1).squeeze(1)
        replaced = (torch.rand(drawn.shape, device=drawn.device) < share) & (output.targets != END)
        words = torch.where(replaced, drawn, output.targets)
        inputs = captions.clone()
        inputs[..., 1:] = captions[..., 1:].masked_scatter(output.mask, words)
        return inputs

    def draw_regions(self) -> None:
        """Set the mode of self-critical training: no dropout, and `hard` attention draws the regions that it sees.

        Captions are rewarded for the network that said them: dropout is off as they are drawn and as they are learnt,
        and the regions that were drawn for a caption are seen again as it is read.
        """
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, HardAttention):
                module.train()

    def self_critical(self, stage: Stage, batch: Batch, parallel: nn.Module) -> tuple[Tensor, Tensor]:
        """This process's share of the loss on captions that the model draws; the sum of its images' mean rewards."""
        images = batch.images.to(self.distributed.device, non_blocking=True)
        composed = self.compose(stage, batch, images)
        count = len(images)
        images = self.features(stage, images if composed is None else torch.cat([images, composed.images]))
        captions, regions, rewards, advantage = self.draw(images[:count].detach(), batch.indices)
        samples = captions.shape[1]
        if composed:
            _, captions = add_composed(images, captions, composed._replace(images=images[:0]))
            if regions is not None:  # composed pictures are seen by expectation
                more = (len(captions) - count, captions.shape[1] - samples, captions.shape[2] - 1 - regions.shape[2])
                regions = nn.functional.pad(regions, (0, 0, 0, more[2], 0, more[1], 0, more[0]), value=EXPECTED)
        read = self.read(parallel, images, captions, regions=regions)
        output, extra = self.read_composed(batch, samples, composed, read)
        advantage = advantage * batch.image_weights.to(advantage)[:, None]
        loss = extra + self_critical_loss(output, advantage, batch.size * samples)
        return loss, rewards.mean(dim=1).sum().to(loss)

    def draw(self, images: Tensor, indices: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Captions drawn from the model as it is, the regions drawn for them, their rewards and their advantages.

        They are drawn by chance, or are the best that beam search finds (Cornia et al. 2020, section 3.3), which a
        model that writes well learns from sooner. Which they are depends on the step and the image, not on the
        process that draws them.

        Returns:
            Captions (images, samples, length); regions (images, samples, length - 1, layers), None where attention
            draws none; rewards and advantages (images, samples).
        """
        config, model, progress, reward = self.config, self.model, self.progress, self.reward
        assert reward is not None, "made with the trainer where a stage needs it"
        seeds = [hash((config.seed, progress.stage, progress.step, index)) % 2**63 for index in indices]
        model.decoder.remember_words()
        decoder, length = model.decoder, config.max_length
        greedy = None
        with torch.no_grad(), self.autocast():
            annotations = model.annotate(images)
            if config.scst_search == "beam":
                drawn = beam_search(decoder, annotations, beam_size=config.scst_samples, max_length=length)
            else:
                drawn = sample(decoder, annotations, samples=config.scst_samples, max_length=length, seed=seeds)
            if config.scst_baseline == "greedy":
                model.eval()  # what the model says when it is used: hard attention does not draw
                likeliest = beam_search(decoder, annotations, beam_size=1, max_length=length).words
                greedy = self.rewards(reward, indices, likeliest)[:, 0]
                self.draw_regions()
        rewards = self.rewards(reward, indices, drawn.words)
        advantage = advantages(rewards, greedy)
        # From the longest to the shortest, which is read fastest.
        order = drawn.lengths.argsort(dim=1, descending=True)
        start = torch.full_like(drawn.words[..., :1], START)
        captions = torch.cat([start, gather_rows(drawn.words, order)], dim=2)
        regions = None if drawn.drawn is None else gather_rows(drawn.drawn, order)
        return captions, regions, rewards, gather_rows(advantage.to(captions.device), order)

    def features(self, stage: Stage, images: Tensor) -> Tensor:
        """What the encoder sees, computed once where the decoder reads it twice: the same in training as without."""
        if images.dim() < 4:
            return images
        with torch.set_grad_enabled(stage.train_from is not None):
            return cast(Tensor, self.model.encoder(images))

    def read(
        self,
        model: nn.Module,
        images: Tensor,
        captions: Tensor,
        inputs: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> TeacherForced:
        """Captions under teacher forcing, computed in the encoder's type; losses take logits in float32."""
        with self.autocast():
            output: TeacherForced = model(images, captions, inputs, regions)
        return output._replace(logits=output.logits.float())

    def autocast(self) -> torch.autocast:
        """Within it the decoder computes in the encoder's type, where that is a shorter one."""
        kind = self.model.encoder.autocast_dtype
        return torch.autocast(self.distributed.device.type, kind, enabled=kind is not None)

    def rewards(self, reward: CiderD, indices: Sequence[int], words: Tensor) -> Tensor:
        """CIDEr-D of captions (images, rows, steps), the end of the sentence counted as a word."""
        return torch.tensor(
            [
                [reward.score(index, [self.vocabulary.words[word] for word in row if word != PAD]) for row in rows]
                for index, rows in zip(indices, words.tolist(), strict=True)
            ]
        )

    def validate(self, stage: Stage, name: str) -> None:
        """Caption the dev images with the averaged weights, record the scores, keep the model if it is the best.

        They are captioned as `Captioner.caption` does it. A run that goes on from a model begins with a row of the
        name "start" for that model, epoch 0, so that the best of the run is never worse than it.
        """
        candidates = self.decode(stage)
        scores = self.score(candidates)
        progress, config = self.progress, self.config
        started = name == "start"
        row = {
            "stage": name,
            "epoch": 0 if started else progress.epoch + 1,
            "loss": "" if started else progress.loss_sum / max(progress.batch, 1),
            "reward": progress.reward_sum / max(progress.batch, 1) if stage.self_critical and not started else "",
            **scores,
            "distinct": len({" ".join(words) for words in candidates}) / max(len(candidates), 1),
            "seconds": progress.seconds,
            "images_per_second": 0.0 if started else len(self.names) / max(progress.seconds, 1e-9),
        }
        progress.history.append(row)
        log.info("%s", "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        better = scores[config.monitor] > progress.best
        progress.stale = 0 if better else progress.stale + 1
        if better:
            progress.best = scores[config.monitor]
        if self.history:
            self.history.epoch(progress.history)
            if better:
                about = {"training": dataclasses.asdict(config), "dev": row}
                save_checkpoint(
                    self.output, Checkpoint(self.averaged_model, self.vocabulary, self.preprocessing, about)
                )
        self.distributed.barrier()

    def score(self, candidates: Sequence[Sequence[str]]) -> dict[str, float]:
        """The scores of the dev captions: the mean over the data sets, and where there are several, those of each."""
        of_sets = {
            name: quick_scores([candidates[i] for i in indices], [self.references[i] for i in indices])
            for name, indices in self.dev_sets.items()
        }
        first = next(iter(of_sets.values()))
        scores = {metric: sum(of_set[metric] for of_set in of_sets.values()) / len(of_sets) for metric in first}
        if len(of_sets) > 1:
            scores |= {f"{name} {metric}": of_set[metric] for name, of_set in of_sets.items() for metric in of_set}
        return scores

    def decode(self, stage: Stage) -> list[list[str]]:
        """Captions of the dev images, each process making its share."""
        distributed, model = self.distributed, self.averaged_model.eval()
        indices = list(range(len(self.references)))[distributed.rank :: distributed.size]
        found: dict[int, list[str]] = {}
        for start in tqdm(range(0, len(indices), 32), "captioning dev", disable=distributed.quiet, leave=False):
            share = indices[start : start + 32]
            with torch.inference_mode():
                annotations = model.annotate(stage.dev.load(share, 0).to(distributed.device))
            best = beam_search(
                model.decoder,
                annotations,
                beam_size=self.config.monitor_beam,
                max_length=MAX_LENGTH,
                length_penalty=LENGTH_PENALTY,
                block_ngrams=BLOCK_NGRAMS,
            ).words[:, 0]
            found.update(zip(share, map(self.vocabulary.decode, best.tolist()), strict=True))
        for others in distributed.gather(found):
            found.update(others)
        return [found[index] for index in range(len(self.references))]

    def optimiser(self, stage: Stage) -> torch.optim.AdamW:
        """AdamW with the encoder's own learning rate, and weight decay on matrices and kernels only."""
        groups = []
        for part, peak in (("encoder.", stage.encoder_learning_rate), ("", stage.learning_rate)):
            own = [
                parameter
                for name, parameter in self.model.named_parameters()
                if parameter.requires_grad and name.startswith("encoder.") == bool(part)
            ]
            for decay in (0.0, self.config.weight_decay):
                chosen = [parameter for parameter in own if (parameter.dim() > 1) == (decay > 0)]
                if chosen:
                    groups.append({"params": chosen, "weight_decay": decay, "peak": peak})
        return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=self.model.device.type in ("cpu", "cuda"))

    def rate(self, step: int, total: int) -> float:
        """The learning rate as a share of its peak: a linear warm-up (at most a tenth of the steps), then a cosine."""
        config = self.config
        warm_up = min(1.0, (step + 1) / max(min(config.warmup_steps, total // 10), 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
        return warm_up * (config.final_rate + (1 - config.final_rate) * cosine)

    def moving_average(self, average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        """The exponential moving average, shorter at first so that it forgets the initial weights."""
        decay = min(self.config.ema_decay, (1 + int(updates)) / (10 + int(updates)))
        return torch.lerp(current, average, decay)

    @property
    def averaged_model(self) -> ShowAttendTell:
        """The model with the averaged weights, which is what is scored and kept."""
        return cast(ShowAttendTell, self.average.module)

    def save(self, optimiser: torch.optim.Optimizer) -> None:
        """Write everything that resuming needs into one file, whole or not at all."""
        if not self.distributed.is_first:
            return
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"average/{name}": tensor for name, tensor in self.average.state_dict().items()}
        names: dict[Any, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in optimiser.state.items():
            tensors |= {f"optimiser/{key}/{names[parameter]}": tensor for key, tensor in state.items()}
        metadata = {
            "progress": json.dumps(dataclasses.asdict(self.progress)),
            "config": json.dumps(options_for_resuming(self.config)),
        }
        try:
            with replacing(self.output / STATE) as (path,):
                save_tensors(path, {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, metadata)
        except OSError as error:
            raise TrainingError(
                f"cannot save the training state in {self.output}: {error.strerror or error}; "
                "the checkpoint from before is whole, so free some space and run again with --resume"
            ) from error

    def restore(self) -> dict[str, Tensor] | None:
        """Take up the progress of the last saved state; None where there is none, so training starts anew."""
        path = self.output / STATE
        if self.distributed.is_first:
            for name in (STATE, WEIGHTS):  # half written when an earlier process was killed
                for left in self.output.glob(f".{name}.????????"):
                    left.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            tensors, metadata = load_tensors(path)
            # An option that was not there yet when the run began is at its default.
            saved = options_for_resuming(TrainConfig()) | json.loads(metadata["config"])
            progress = Progress(**json.loads(metadata["progress"]))
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"cannot resume from {path}: {error}") from error
        now = options_for_resuming(self.config)
        changed = [key for key in now if key not in FREE_OPTIONS and saved[key] != now[key]]
        if changed:
            was = ", ".join(f"{key} was {saved[key]!r} and is {now[key]!r}" for key in changed)
            raise TrainingError(f"cannot resume {self.output} with other options: {was}")
        self.progress = progress
        if self.history:
            self.history.steps = progress.total_steps
        return tensors

    def fill(self, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
        """Put saved tensors back into the model, its average and the optimiser."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        self.model.load_state_dict(part("model/"))
        self.average.load_state_dict(part("average/"))
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        order = [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in part("optimiser/").items():
            kind, name = key.split("/", 1)
            state.setdefault(order.index(name), {})[kind] = tensor
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})

    @contextmanager
    def graceful_stop(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the run after the step under way, its state saved."""

        def request(*_: Any) -> None:
            self.stop_requested = True

        before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
