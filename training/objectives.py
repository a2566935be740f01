"""The objectives of training: the loss of a batch. Imitation is here, self-critical training in `self_critical`."""

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from captioner.network.decoder import TeacherForced
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import END, SPECIAL, Vocabulary

from .composed_loss import composed_loss, content_words, split_composed
from .config import TrainConfig
from .data.batches import Batch
from .data.composed import Composed, add_composed, compose
from .losses import caption_loss, entropy_loss
from .stages import Stage
from .state import Progress


class Objective(ABC):
    """The loss of a stage.

    Besides the loss, an objective has a statistic of each batch: the loop sums it over the processes and hands it to
    `record`.

    Args:
        config, stage: the options of the run and of the stage.
        progress: of the run; the objective's own figures are kept there.
        model: the network, on the device to train on.
        parallel: the network, or `DistributedDataParallel` around it, which gradients need to pass.
        vocabulary: the model's.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        progress: Progress,
        model: ShowAttendTell,
        parallel: nn.Module,
        vocabulary: Vocabulary,
    ) -> None:
        self.config, self.stage, self.progress = config, stage, progress
        self.model, self.parallel, self.vocabulary = model, parallel, vocabulary
        self.content = content_words(vocabulary.words).to(model.device)

    @abstractmethod
    def begin_epoch(self) -> None:
        """Set the network to training or evaluation mode."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This process's share of the loss and of the statistic, both scalars; their sums are those of the batch."""

    @abstractmethod
    def record(self, batch: Batch, statistic: float) -> None:
        """Record the statistic of the whole batch."""

    def compose(self, batch: Batch, images: Tensor) -> Composed | None:
        """Pictures composed of this batch's photographs; None if the run or the stage has none."""
        count = min(round(self.config.composed * len(images)), len(images) // 2)
        if count == 0 or self.stage.captions is not None:
            return None
        generator = torch.Generator().manual_seed(torch.initial_seed())
        composed = compose(images, batch.captions, count, self.model.encoder.grid, generator)
        return Composed(*(part.to(images.device) for part in composed))

    def split(
        self, output: TeacherForced, batch: Batch, rows: int, composed: Composed | None
    ) -> tuple[TeacherForced, Tensor]:
        """The output for the batch's own images, and the loss on the composed pictures after them.

        Args:
            output: for the batch's images followed by the composed pictures.
            batch: this process's share of the batch.
            rows: number of captions of each of the batch's own images.
            composed: the pictures; without them the loss is zero.
        """
        if composed is None:
            return output, output.logits.new_zeros(())
        own, pictures = split_composed(output, len(batch.indices), rows)
        loss = composed_loss(pictures, composed.own, self.content, self.config.pointing)
        return own, self.config.composed * len(batch.indices) / batch.image_count * loss

    def features(self, images: Tensor) -> Tensor:
        """The encoder's output, to be decoded more than once. Images that are features already are returned."""
        if images.dim() < 4:
            return images
        with torch.set_grad_enabled(self.stage.train_from is not None):
            return cast(Tensor, self.model.encoder(images))

    def read(
        self,
        network: nn.Module,
        images: Tensor,
        captions: Tensor,
        inputs: Tensor | None = None,
        regions: Tensor | None = None,
    ) -> TeacherForced:
        """The output under teacher forcing, computed in the encoder's floating-point type, with logits in float32.

        Args:
            network: `model` or `parallel`.
            images, captions, inputs, regions: see `ShowAttendTell.forward`.
        """
        with self.autocast():
            output: TeacherForced = network(images, captions, inputs, regions)
        return output._replace(logits=output.logits.float())

    def autocast(self) -> torch.autocast:
        """A context in which the decoder computes in the encoder's floating-point type."""
        dtype = self.model.encoder.autocast_dtype
        return torch.autocast(self.model.device.type, dtype, enabled=dtype is not None)


class Imitation(Objective):
    """Cross-entropy of the captions that people wrote, with the additional terms for attention.

    The statistic is the sum of the words' log-probabilities: attention that samples regions needs their moving average.
    """

    def begin_epoch(self) -> None:
        """Set training mode."""
        self.parallel.train()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Objective.loss`."""
        device = self.model.device
        images, captions = (part.to(device, non_blocking=True) for part in (batch.images, batch.captions))
        composed = self.compose(batch, images)
        if composed:
            images, captions = add_composed(images, captions, composed)
        inputs = None
        if self.share_of_own_words > 0:
            images = self.features(images)
            with torch.no_grad():
                first = self.read(self.model, images.detach(), captions)
            inputs = replace_words(captions, first, self.share_of_own_words)
        output = self.read(self.parallel, images, captions, inputs)
        output, loss_on_composed = self.split(output, batch, batch.captions.shape[1], composed)
        weights = batch.image_weights.to(device)
        loss = loss_on_composed + caption_loss(
            output,
            batch.word_count,
            batch.caption_count,
            self.config.label_smoothing,
            self.config.doubly_stochastic,
            weights,
        )
        if self.entropy_bound < 1:
            loss = loss + entropy_loss(output, self.entropy_bound, batch.caption_count, weights)
        attention = self.model.decoder.attention
        loss = loss + attention.extra_loss(output, batch.word_count, self.progress.baseline)
        if not attention.draws_regions:
            return loss, loss.new_zeros(())
        return loss, output.log_probabilities().detach().sum()

    @property
    def share_of_own_words(self) -> float:
        """The share of input words that are the model's own (scheduled sampling); it rises from 0 over the epochs."""
        return self.config.scheduled_sampling * self.progress.epoch / max(self.stage.epochs - 1, 1)

    @property
    def entropy_bound(self) -> float:
        """What the entropy of attention is kept below, as a share of its maximum; see `Stage.entropy_bound`."""
        half = self.stage.epochs // 2
        fallen = min(self.progress.epoch / half, 1) if half else 1
        return 1 - (1 - self.stage.entropy_bound) * fallen

    def record(self, batch: Batch, statistic: float) -> None:
        """Update the moving average of a word's log-probability."""
        mean, baseline = statistic / max(batch.word_count, 1), self.progress.baseline
        self.progress.baseline = mean if baseline is None else 0.9 * baseline + 0.1 * mean


def replace_words(captions: Tensor, output: TeacherForced, share: float) -> Tensor:
    """The captions with a share of their words replaced by words that the model predicts from the true ones before.

    Scheduled sampling (Bengio et al. 2015), for all words at once (Mihaylova and Martins 2019).

    Args:
        captions: (images, rows, length) ids.
        output: the model's output for them.
        share: probability that a word is replaced; `START` and `END` are never replaced.
    """
    special = torch.arange(len(SPECIAL), device=captions.device)
    probabilities = output.logits.index_fill(1, special, float("-inf")).softmax(dim=-1)
    sampled = torch.multinomial(probabilities, 1).squeeze(1)
    replaced = (torch.rand(sampled.shape, device=sampled.device) < share) & (output.targets != END)
    words = torch.where(replaced, sampled, output.targets)
    inputs = captions.clone()
    inputs[..., 1:] = captions[..., 1:].masked_scatter(output.mask, words)
    return inputs
