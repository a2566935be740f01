"""Self-critical training: the model's own captions are rewarded for their CIDEr-D (Rennie et al. 2017)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioner.arrays import gather_rows
from captioner.network.attention import EXPECTED, Attention
from captioner.search import beam_search, sample
from captioner.vocabulary import END, PAD, START

from .data.batches import Batch
from .data.composed import add_composed
from .data.items import CaptionedImage
from .losses import self_critical_loss
from .objectives import Objective
from .rewards import CiderD, advantages
from .words import tokenize


class Generated(NamedTuple):
    """Captions that the model generated, sorted from the longest to the shortest within each image.

    captions: (images, samples, length) ids.
    regions: (images, samples, length - 1, layers), the regions that hard attention sampled; None for soft attention.
    advantage: (images, samples), each caption's reward minus its baseline.
    reward: scalar, the sum over the images of the mean reward of their captions.
    """

    captions: Tensor
    regions: Tensor | None
    advantage: Tensor
    reward: Tensor


class SelfCritical(Objective):
    """Policy gradient of the reward of captions that the model generates. The statistic is the sum of mean rewards.

    The gradient must be that of the network that generated the captions. So dropout is off when they are generated and
    when they are learnt, and both passes use the regions that attention sampled in the first.

    Args:
        train: the training images, whose captions are the references of the reward.
        arguments: see `Objective`.
    """

    def __init__(self, train: Sequence[CaptionedImage], *arguments: Any) -> None:
        super().__init__(*arguments)
        end = self.vocabulary.words[END]
        self.reward = CiderD([[*tokenize(caption), end] for caption in item.captions] for item in train)

    def begin_epoch(self) -> None:
        """Set evaluation mode, except for attention that samples regions, which does so in training mode only."""
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
        generated = self.generate(images[:count].detach(), batch.indices)
        captions, regions, samples = generated.captions, generated.regions, generated.captions.shape[1]
        if composed:
            _, captions = add_composed(images, captions, composed._replace(images=images[:0]))
            regions = None if regions is None else pad_regions(regions, captions)
        output = self.read(self.parallel, images, captions, regions=regions)
        output, loss_on_composed = self.split(output, batch, samples, composed)
        advantage = generated.advantage * batch.image_weights.to(generated.advantage)[:, None]
        loss = loss_on_composed + self_critical_loss(output, advantage, batch.image_count * samples)
        return loss, generated.reward.to(loss)

    def record(self, batch: Batch, statistic: float) -> None:
        """Add the mean reward of the batch to the sum over the epoch."""
        self.progress.reward_sum += statistic / batch.image_count

    def generate(self, images: Tensor, indices: Sequence[int]) -> Generated:
        """Generate captions and compute their rewards.

        Captions are sampled, or found by beam search (Cornia et al. 2020, section 3.3), from which a good model learns
        faster. They depend on the step and the image, not on the process.

        Args:
            images: (images, regions, channels), features.
            indices: of the images in the training set.
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
                self.model.eval()  # attention does not sample regions either
                likeliest = beam_search(decoder, annotations, beam_size=1, max_length=config.max_length)
                greedy = self.rewards(indices, likeliest.words)[:, 0]
                self.begin_epoch()
        rewards = self.rewards(indices, found.words)
        order = found.lengths.argsort(dim=1, descending=True)
        start = torch.full_like(found.words[..., :1], START)
        return Generated(
            torch.cat([start, gather_rows(found.words, order)], dim=2),
            None if found.drawn is None else gather_rows(found.drawn, order),
            gather_rows(advantages(rewards, greedy).to(order.device), order),
            rewards.mean(dim=1).sum(),
        )

    def rewards(self, indices: Sequence[int], words: Tensor) -> Tensor:
        """CIDEr-D of captions, (images, rows, steps) -> (images, rows); the end of the sentence counts as a word."""
        names = self.vocabulary.words
        return torch.tensor(
            [
                [self.reward.score(index, [names[word] for word in row if word != PAD]) for row in rows]
                for index, rows in zip(indices, words.tolist(), strict=True)
            ]
        )


def pad_regions(regions: Tensor, captions: Tensor) -> Tensor:
    """Sampled regions, padded for the composed pictures, where hard attention gives the expected context vector.

    Args:
        regions: (images, samples, steps, layers).
        captions: (images and pictures, rows, length), to whose size the regions are padded.
    """
    images, rows, steps = (
        wanted - given
        for wanted, given in zip((*captions.shape[:2], captions.shape[2] - 1), regions.shape[:3], strict=True)
    )
    return nn.functional.pad(regions, (0, 0, 0, steps, 0, rows, 0, images), value=EXPECTED)
