"""Losses are the papers' equations, term by term."""

import pytest
import torch

from captioner.network.attention import HardAttention
from captioner.network.decoder import TeacherForced
from captioner.vocabulary import PAD, START, UNKNOWN
from training.losses import self_critical_loss

WORDS = 9
SPECIAL = (PAD, START, UNKNOWN)


def result_of(choice: bool = False) -> TeacherForced:
    """Two images with two captions each, of 2, 3, 2 and no words."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]).bool()
    alpha = torch.rand(2, 2, 3, 1, 4, generator=generator).softmax(dim=-1) * mask[..., None, None]
    drawn = -torch.rand(2, 2, 3, generator=generator) * mask
    logits = torch.randn(7, WORDS, generator=generator, requires_grad=True)
    return TeacherForced(logits, torch.tensor([4, 2, 5, 6, 2, 8, 2]), alpha, mask, drawn if choice else None)


def by_word(output: TeacherForced, excluded=()) -> dict[tuple[int, int, int], torch.Tensor]:
    """log p of each word by its image, row and step, one at a time."""
    found = {}
    for place, logits, target in zip(output.mask.nonzero().tolist(), output.logits, output.targets, strict=True):
        kept = [word for word in range(WORDS) if word not in excluded]
        found[tuple(place)] = logits[target] - logits[kept].logsumexp(dim=0)
    return found


@pytest.mark.parametrize("excluded", [(), SPECIAL])
def test_log_probabilities_stand_where_their_words_do(excluded):
    output = result_of()
    found = output.log_probabilities(excluded)
    expected = by_word(output, excluded)
    for place in torch.ones_like(found).nonzero().tolist():
        assert float(found[tuple(place)].detach()) == pytest.approx(
            float(torch.as_tensor(expected.get(tuple(place), 0.0)).detach()), abs=1e-6
        )


@pytest.mark.parametrize("choice", [False, True])
def test_captions_are_made_likelier_by_their_advantage(choice):
    output = result_of(choice)
    advantage = torch.tensor([[2.0, -1.0], [0.5, 7.0]])
    expected = torch.zeros(())
    for (image, row, step), log_probability in by_word(output, SPECIAL).items():
        drawn = output.choice_log_probability[image, row, step] if choice else 0.0
        expected = expected - advantage[image, row] * (log_probability + drawn) / 4
    loss = self_critical_loss(output, advantage, captions=4)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    (ours,) = torch.autograd.grad(loss, output.logits)
    (theirs,) = torch.autograd.grad(expected, output.logits)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("reinforce", [1.0, 0.1])
def test_drawn_regions_are_rewarded_by_the_log_probabilities_over_the_baseline(reinforce):
    output = result_of(choice=True)
    expected = torch.zeros(())
    words = by_word(output)
    for image in range(2):
        for row in range(2):
            own = [(place, log_probability) for place, log_probability in words.items() if place[:2] == (image, row)]
            for place, _ in own:
                to_come = sum(
                    float(log_probability.detach()) + 1.5 for later, log_probability in own if later[2] >= place[2]
                )
                expected = expected - reinforce * to_come * output.choice_log_probability[place] / 7
            for place, _ in own:
                weights = output.alpha[place][0]
                expected = expected + 0.1 * (weights * weights.log()).sum() / 7
    attention = HardAttention(4, 4, 4, reinforce=reinforce, entropy=0.1)
    loss = attention.extra_loss(output, 7, -1.5)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    entropy_alone = attention.extra_loss(output, 7, None)
    assert float(entropy_alone) < 0
    assert not loss.requires_grad  # words learn by the other loss
