"""Self-critical training: the model's own captions are rewarded for their CIDEr-D (Rennie et al. 2017)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioner.network.attention import EXPECTED, Attention
from captioner.search import beam_search, gather_rows, sample
from captioner.vocabulary import PAD, START

from .data.batches import Batch
from .data.composed import add_composed
from .losses import self_critical_loss
from .objectives import Objective
from .rewards import CiderD, advantages


class Draw(NamedTuple):
    """Captions that the model made, each image's from the longest to the shortest, which are read fastest.

    captions: (images, samples, length) ids.
    regions: (images, samples, length - 1, layers), the regions that attention drew; None where it draws none.
    advantage: (images, samples), each caption's reward less its baseline.
    reward: the sum over the images of the mean reward of their captions.
    """

    captions: Tensor
    regions: Tensor | None
    advantage: Tensor
    reward: Tensor


class SelfCritical(Objective):
    """Policy gradient of the reward of captions that the model makes. The statistic is the sum of mean rewards.

    Captions are rewarded for the network that made them: dropout is off as they are made and as they are learnt,
    and the regions that attention drew for a caption are used again as it is read.

    Args:
        reward: knows the references of the training images, in their order.
        arguments: see `Objective`.
    """

    def __init__(self, reward: CiderD, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reward = reward

    def begin_epoch(self) -> None:
        """Set evaluation mode, in which only attention goes on drawing regions, where it does in training."""
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, Attention) and module.draws_regions:
                module.train()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """See `Objective.loss`."""
        images = batch.images.to(self.model.device, non_blocking=True)
        composed = self.compose(batch, images)
        count = len(images)
        images = self.features(images if composed is None else torch.cat([images, composed.images]))
        drawn = self.draw(images[:count].detach(), batch.indices)
        captions, regions, samples = drawn.captions, drawn.regions, drawn.captions.shape[1]
        if composed:
            _, captions = add_composed(images, captions, composed._replace(images=images[:0]))
            regions = None if regions is None else pad_regions(regions, captions)
        output = self.read(self.parallel, images, captions, regions=regions)
        output, loss_on_composed = self.split(output, batch, samples, composed)
        advantage = drawn.advantage * batch.image_weights.to(drawn.advantage)[:, None]
        loss = loss_on_composed + self_critical_loss(output, advantage, batch.image_count * samples)
        return loss, drawn.reward.to(loss)

    def record(self, batch: Batch, statistic: float) -> None:
        """Add the mean reward of the batch to that of the epoch."""
        self.progress.reward_sum += statistic / batch.image_count

    def draw(self, images: Tensor, indices: Sequence[int]) -> Draw:
        """Captions from the model as it is, with their rewards.

        They are sampled, or are the best that beam search finds (Cornia et al. 2020, section 3.3), from which a
        model that writes well learns sooner. They depend on the step and the image, not on the process.

        Args:
            images: (images, regions, channels), features.
            indices: of these images among the training images.
        """
        config, progress, decoder = self.config, self.progress, self.model.decoder
        decoder.remember_words()
        greedy = None
        with torch.no_grad(), self.autocast():
            annotations = self.model.annotate(images)
            if config.scst_search == "beam":
                found = beam_search(decoder, annotations, beam_size=config.scst_samples, max_length=config.max_length)
            else:
                seeds = [hash((config.seed, progress.stage, progress.step, index)) % 2**63 for index in indices]
                found = sample(
                    decoder, annotations, samples=config.scst_samples, max_length=config.max_length, seed=seeds
                )
            if config.scst_baseline == "greedy":
                self.model.eval()  # as in use: attention draws no regions
                likeliest = beam_search(decoder, annotations, beam_size=1, max_length=config.max_length)
                greedy = self.rewards(indices, likeliest.words)[:, 0]
                self.begin_epoch()
        rewards = self.rewards(indices, found.words)
        order = found.lengths.argsort(dim=1, descending=True)
        start = torch.full_like(found.words[..., :1], START)
        return Draw(
            torch.cat([start, gather_rows(found.words, order)], dim=2),
            None if found.drawn is None else gather_rows(found.drawn, order),
            gather_rows(advantages(rewards, greedy).to(order.device), order),
            rewards.mean(dim=1).sum(),
        )

    def rewards(self, indices: Sequence[int], words: Tensor) -> Tensor:
        """CIDEr-D of captions (images, rows, steps), the end of the sentence counted as a word: (images, rows)."""
        names = self.vocabulary.words
        return torch.tensor(
            [
                [self.reward.score(index, [names[word] for word in row if word != PAD]) for row in rows]
                for index, rows in zip(indices, words.tolist(), strict=True)
            ]
        )


def pad_regions(regions: Tensor, captions: Tensor) -> Tensor:
    """Drawn regions for captions with composed pictures behind them, which are seen by expectation.

    Args:
        regions: (images, samples, steps, layers).
        captions: (all images, rows, steps or more + 1).
    """
    images, rows, steps = (
        wanted - given
        for wanted, given in zip((*captions.shape[:2], captions.shape[2] - 1), regions.shape[:3], strict=True)
    )
    return nn.functional.pad(regions, (0, 0, 0, steps, 0, rows, 0, images), value=EXPECTED)
