"""Validation: the dev images are captioned with the defaults of `Captioner.caption`, and the captions are scored."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from captioner.network.model import ShowAttendTell
from captioner.search import BLOCK_NGRAMS, LENGTH_PENALTY, MAX_LENGTH, beam_search
from captioner.vocabulary import Vocabulary

from .data.images import Source
from .data.items import CaptionedImage
from .distributed import Distributed
from .metrics import mean_of_each
from .scorers import quick_scores
from .words import tokenize

BATCH_SIZE = 32


class Validation:
    """The dev images of a run with their reference captions.

    Args:
        dev: the images; of one or several data sets.
        vocabulary: the model's.
        beam_size: of the search; its other options are the defaults of `Captioner.caption`.
        distributed: the processes that share the work.
    """

    def __init__(
        self, dev: Sequence[CaptionedImage], vocabulary: Vocabulary, beam_size: int, distributed: Distributed
    ) -> None:
        self.vocabulary, self.beam_size, self.distributed = vocabulary, beam_size, distributed
        self.references = [[tokenize(caption) for caption in item.captions] for item in dev]
        self.sets: dict[str, list[int]] = {}
        for index, item in enumerate(dev):
            self.sets.setdefault(item.dataset, []).append(index)

    def scores(self, model: ShowAttendTell, images: Source) -> dict[str, float]:
        """BLEU and CIDEr of the captions of `model`, and the share of distinct captions.

        Scores are means over the data sets; with several, the scores of each follow as "NAME CIDEr".
        """
        captions = self.captions(model, images)
        of_sets = {
            name: quick_scores([captions[i] for i in indices], [self.references[i] for i in indices])
            for name, indices in self.sets.items()
        }
        scores = mean_of_each(list(of_sets.values()))
        if len(of_sets) > 1:
            scores |= {f"{name} {metric}": of_set[metric] for name, of_set in of_sets.items() for metric in of_set}
        return scores | {"distinct": len({" ".join(words) for words in captions}) / len(captions)}

    def captions(self, model: ShowAttendTell, images: Source) -> list[list[str]]:
        """The words of each dev image's caption. Each process captions its share of the images."""
        distributed = self.distributed
        model.eval()
        own = range(len(self.references))[distributed.rank :: distributed.size]
        found: dict[int, list[str]] = {}
        for start in tqdm(range(0, len(own), BATCH_SIZE), "captioning dev", disable=distributed.quiet, leave=False):
            indices = own[start : start + BATCH_SIZE]
            with torch.inference_mode():
                annotations = model.annotate(images.load(indices, 0).to(distributed.device))
            best = beam_search(
                model.decoder,
                annotations,
                beam_size=self.beam_size,
                max_length=MAX_LENGTH,
                length_penalty=LENGTH_PENALTY,
                block_ngrams=BLOCK_NGRAMS,
            ).words[:, 0]
            found.update(zip(indices, map(self.vocabulary.decode, best.tolist()), strict=True))
        for others in distributed.gather(found):
            found.update(others)
        return [found[index] for index in range(len(self.references))]
