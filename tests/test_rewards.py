"""CIDEr-D is the scorer's, and an advantage is what its paper says."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from training.data.datasets import read_dataset
from training.rewards import CiderD, advantages
from training.words import tokenize

WORD = st.sampled_from("a b c d e".split())
SENTENCE = st.lists(WORD, min_size=1, max_size=9)


def by_the_scorer(references, captions):
    truths = {i: [" ".join(reference) for reference in of_image] for i, of_image in enumerate(references)}
    return Cider().compute_score(truths, {i: [" ".join(caption)] for i, caption in enumerate(captions)})[1]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.lists(SENTENCE, min_size=1, max_size=4), SENTENCE), min_size=1, max_size=6))
def test_random_captions_get_what_the_scorer_gives(images):
    references, captions = [of_image for of_image, _ in images], [caption for _, caption in images]
    reward = CiderD(references)
    ours = [reward.score(i, caption) for i, caption in enumerate(captions)]
    assert ours == pytest.approx(list(by_the_scorer(references, captions)), abs=1e-6)


def test_real_captions_get_what_the_scorer_gives(flickr8k):
    items = read_dataset("flickr8k", flickr8k).splits["dev"]
    references = [[tokenize(caption) for caption in item.captions] for item in items]
    chance = random.Random(0)
    captions = []
    for of_image in references:
        own, other = chance.choice(of_image), chance.choice(chance.choice(references))
        captions.append(chance.choice([own, other, own[: len(own) // 2] + other, chance.sample(own, len(own))]))
    reward = CiderD(references)
    ours = [reward.score(i, caption) for i, caption in enumerate(captions)]
    assert ours == pytest.approx(list(by_the_scorer(references, captions)), abs=1e-6)
    assert max(ours) > 1


def test_ids_are_words_too_and_an_empty_caption_earns_nothing():
    words, numbers = CiderD([[["a", "b"]], [["c"]]]), CiderD([[[1, 2]], [[3]]])
    assert words.score(0, ["a", "b"]) == numbers.score(0, [1, 2]) > 0
    assert words.score(0, []) == 0
    assert words.score(1, ["a", "b"]) == 0


def test_an_advantage_is_over_the_other_samples_or_over_greedy_search():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert torch.allclose(advantages(rewards), torch.tensor([[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]))
    assert torch.equal(advantages(rewards, torch.tensor([2.0, 1.0]))[1], torch.tensor([-1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match="one sample"):
        advantages(rewards[:, :1])
