"""Greedy, beam and sampled decoding find what they should, for many images as for one."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import small_model

from captioner import search as search_module
from captioner.arrays import gather_rows, to_numpy
from captioner.engine import Step
from captioner.network.attention import EXPECTED, HardAttention
from captioner.search import beam_search, follow, sample
from captioner.vocabulary import END, PAD, START, UNKNOWN


@pytest.fixture(scope="module")
def decoder():
    net = small_model(words=30).decoder
    with torch.no_grad():
        net.output_weight.mul_(6)  # opinions strong enough for beams to differ
        net.output_bias[END] = 1.0
    return net


@pytest.fixture(scope="module")
def annotations():
    return torch.randn(6, 6, 12, generator=torch.Generator().manual_seed(1)).relu()


def caption_of(hypotheses, image, row=0):
    return [word for word in hypotheses.words[image, row].tolist() if word != PAD]


class InNumpy:
    """A decoder whose arrays are NumPy's."""

    def __init__(self, decoder):
        self.decoder, self.heads = decoder, decoder.heads

    def encode(self, annotations, mask=None):
        return self.decoder.encode(torch.from_numpy(annotations), None if mask is None else torch.from_numpy(mask))

    def initial_state(self, memory, rows):
        state = self.decoder.initial_state(memory, rows)
        return type(state)(*map(to_numpy, state))

    def step(self, memory, state, tokens):
        step = self.decoder.step(memory, type(state)(*map(torch.from_numpy, state)), torch.from_numpy(tokens))
        return Step(to_numpy(step.logits), type(state)(*map(to_numpy, step.state)), to_numpy(step.alpha))


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize(
    "search",
    [
        lambda *of: beam_search(*of, beam_size=1),
        lambda *of: beam_search(*of, beam_size=4, block_ngrams=2, length_penalty=0.7),
        lambda *of: sample(*of, samples=3, seed=5),
        lambda *of: sample(*of, samples=2, seed=[1, 2, 3, -4, 5, 6], temperature=0.8, top_p=0.9, block_ngrams=1),
    ],
    ids=["greedy", "beam", "sampled", "nucleus"],
)
def test_numpy_and_torch_arrays_give_the_same_captions(annotations, search, kind):
    options = {"attention": "multi_head", "attention_options": {"heads": 3}, "attention_size": 12, "heads": 3}
    net = small_model(words=30, decoder=kind, **options).decoder
    mask = torch.tensor([True, True, False, True, False, True]).expand(6, -1)
    for here in (None, mask):
        ours = search(net, annotations, here)
        theirs = search(InNumpy(net), annotations.numpy(), None if here is None else here.numpy())
        assert isinstance(theirs.words, np.ndarray)
        assert theirs.log_probabilities.dtype == theirs.alpha.dtype == np.float32
        assert (ours.words.numpy() == theirs.words).all()
        for name in ("log_probabilities", "alpha", "scores"):
            assert np.allclose(getattr(ours, name).numpy(), getattr(theirs, name), atol=1e-5)


def test_captions_that_are_given_have_the_log_probabilities_of_a_search(decoder, annotations):
    found = beam_search(decoder, annotations, beam_size=3, max_length=8)
    assert found.words.shape[2] > int(found.lengths.min())  # some are padded
    for again in (
        follow(decoder, annotations, found.words),
        follow(InNumpy(decoder), annotations.numpy(), found.words.numpy()),
    ):
        assert np.allclose(again.log_probabilities, found.log_probabilities, atol=1e-5)
        assert np.allclose(again.alpha, found.alpha, atol=1e-5)
        assert np.allclose(again.scores, found.scores, atol=1e-5)


def test_a_beam_of_one_is_greedy_search(decoder, annotations):
    found = beam_search(decoder, annotations, beam_size=1, max_length=12)
    for image in range(len(annotations)):
        memory = decoder.encode(annotations[image : image + 1])
        state, words = decoder.initial_state(memory, 1), [START]
        while len(words) <= 12 and words[-1] != END:
            step = decoder.step(memory, state, torch.tensor([[words[-1]]]))
            state = step.state
            logits = step.logits[0, 0].clone()
            logits[[PAD, START, UNKNOWN]] = float("-inf")
            if len(words) == 1:
                logits[END] = float("-inf")
            words.append(int(logits.argmax()))
        assert caption_of(found, image) == words[1:]


@pytest.mark.parametrize(
    "search",
    [
        lambda net, a: beam_search(net, a, beam_size=1),
        lambda net, a: beam_search(net, a, beam_size=4, block_ngrams=2),
        lambda net, a: sample(net, a, samples=3, seed=5, temperature=0.8, top_p=0.9),
    ],
    ids=["greedy", "beam", "sampled"],
)
def test_a_batch_gives_what_each_image_gives_alone(decoder, annotations, search):
    together = search(decoder, annotations)
    for image in range(len(annotations)):
        alone = search(decoder, annotations[image : image + 1])
        for row in range(together.words.shape[1]):
            assert caption_of(together, image, row) == caption_of(alone, 0, row)
        steps = alone.words.shape[2]
        assert torch.allclose(together.log_probabilities[image, :, :steps], alone.log_probabilities[0], atol=1e-5)
        assert torch.allclose(together.alpha[image, :, :steps], alone.alpha[0], atol=1e-5)


class Counting(InNumpy):
    """A decoder in NumPy that counts the images of each of its steps."""

    def __init__(self, decoder):
        super().__init__(decoder)
        self.images = []

    def step(self, memory, state, tokens):
        self.images.append(len(tokens))
        return super().step(memory, state, tokens)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize(
    "search", [lambda *of: beam_search(*of, beam_size=2), lambda *of: sample(*of, samples=2, seed=3)]
)
def test_images_whose_captions_have_ended_are_left_out_of_further_steps(annotations, monkeypatch, kind, search):
    net = small_model(words=30, decoder=kind, heads=3).decoder
    with torch.no_grad():
        net.output_weight.mul_(6)
        net.output_bias[END] = 1.0  # captions end early, at different lengths
    given = annotations.numpy(), np.ones((6, 6), dtype=bool)
    monkeypatch.setattr(search_module, "LEFT_OUT", 1.0)
    kept, decoder = search(Counting(net), *given), Counting(net)
    for share in (0.3, 0.0):
        monkeypatch.setattr(search_module, "LEFT_OUT", share)
        found = search(decoder, *given)
        assert (found.words == kept.words).all()
        for name in ("log_probabilities", "alpha", "scores"):
            assert np.allclose(getattr(found, name), getattr(kept, name), atol=1e-5)
    assert decoder.images[0] == 6
    lengths = found.lengths.max(axis=1)
    assert lengths.min() < lengths.max()
    # The second search leaves every image out at once.
    assert decoder.images[-found.words.shape[2] :] == [(lengths > t).sum() for t in range(found.words.shape[2])]


class ToyState(NamedTuple):
    history: torch.Tensor


class Toy:
    """A decoder over seven words whose next word depends on all that was said, so that greed does not pay."""

    heads = 1

    def encode(self, annotations, mask=None):
        return annotations

    def initial_state(self, memory, rows):
        return ToyState(torch.zeros(memory.shape[0], rows, 1, dtype=torch.long))

    def step(self, memory, state, words):
        history = state.history * 7 + words[..., None]
        logits = torch.sin(history * 12.9898 + torch.arange(7) * 78.233 + memory[:, :1, :1]) * 3
        alpha = torch.full((*words.shape, 1, memory.shape[1]), 1 / memory.shape[1])
        return Step(logits, ToyState(history), alpha)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_captions(length_penalty):
    toy, memory = Toy(), torch.randn(3, 2, 1, generator=torch.Generator().manual_seed(2))
    found = beam_search(BigToy(toy), memory, beam_size=60, max_length=3, length_penalty=length_penalty)
    for image in range(3):
        best = max(
            (score(toy, memory[image : image + 1], caption, length_penalty), caption) for caption in every_caption(3)
        )
        assert tuple(caption_of(found, image)) == best[1]
        assert float(found.scores[image, 0]) == pytest.approx(best[0], abs=1e-5)


class BigToy:
    """The toy with more words that are never said, so that a beam may be wider than its vocabulary."""

    heads = 1

    def __init__(self, toy):
        self.encode, self.initial_state, self.toy = toy.encode, toy.initial_state, toy

    def step(self, memory, state, words):
        step = self.toy.step(memory, state, words)
        never = torch.full((*words.shape, 60), float("-inf"))
        return step._replace(logits=torch.cat([step.logits, never], dim=-1))


def every_caption(length):
    real = (4, 5, 6)
    for words in range(1, length):
        for caption in itertools.product(real, repeat=words):
            yield (*caption, END)
    yield from itertools.product(real, repeat=length)


def score(toy, memory, caption, length_penalty):
    state, previous, total = toy.initial_state(memory, 1), START, 0.0
    for t, word in enumerate(caption):
        step = toy.step(memory, state, torch.tensor([[previous]]))
        logits = step.logits[0, 0].clone()
        logits[[PAD, START, UNKNOWN]] = float("-inf")
        if t == 0:
            logits[END] = float("-inf")
        total += float(logits.log_softmax(dim=0)[word])
        state, previous = step.state, word
    return total / len(caption) ** length_penalty


@pytest.mark.parametrize("beam_size", [9, 12])
def test_a_beam_wider_than_the_words_a_caption_may_begin_with_is_refused(annotations, beam_size):
    net = small_model(words=12).decoder  # four of the twelve are special
    with pytest.raises(ValueError, match="beam_size"):
        beam_search(net, annotations, beam_size=beam_size, max_length=1)


@pytest.mark.parametrize("seed", range(3))
def test_special_words_are_never_said_and_no_caption_is_empty(annotations, seed):
    net = small_model(words=12, seed=seed).decoder
    with torch.no_grad():
        net.output_bias[[PAD, START, UNKNOWN, END]] = 10.0
    for found in (beam_search(net, annotations, beam_size=3), sample(net, annotations, samples=3)):
        for image, row in itertools.product(range(6), range(3)):
            words = caption_of(found, image, row)
            assert not {PAD, START, UNKNOWN} & set(words)
            assert words[0] != END


def test_a_caption_that_never_ends_is_cut_and_returned(annotations):
    net = small_model(words=12).decoder
    with torch.no_grad():
        net.output_bias[END] = -100.0
    for found in (beam_search(net, annotations, beam_size=3, max_length=7), sample(net, annotations, max_length=7)):
        assert found.words.shape[2] == 7
        assert (found.words > UNKNOWN).all()
        assert torch.isfinite(found.scores).all()


def test_log_probabilities_are_those_of_the_words_under_teacher_forcing(decoder, annotations):
    found = beam_search(decoder, annotations, beam_size=3, max_length=10)
    for image in range(len(annotations)):
        words = caption_of(found, image)
        result = decoder(annotations[image : image + 1], torch.tensor([[[START, *words]]]))
        logits = result.logits.clone()
        logits[:, [PAD, START, UNKNOWN]] = float("-inf")
        logits[0, END] = float("-inf")
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(words)[:, None]).squeeze(1)
        assert torch.allclose(found.log_probabilities[image, 0, : len(words)], expected, atol=1e-5)
        assert torch.allclose(found.alpha[image, 0, : len(words)], result.alpha[0, 0], atol=1e-5)


def test_sampled_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(decoder, annotations):
    found = sample(decoder, annotations, samples=2, max_length=8, temperature=0.7, seed=4)
    for image, row in itertools.product(range(len(annotations)), range(2)):
        words = caption_of(found, image, row)
        logits = decoder(annotations[image : image + 1], torch.tensor([[[START, *words]]])).logits.detach() / 0.7
        logits[:, [PAD, START, UNKNOWN]] = float("-inf")
        logits[0, END] = float("-inf")
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(words)[:, None]).squeeze(1)
        assert torch.allclose(found.log_probabilities[image, row, : len(words)], expected, atol=1e-5)
        assert (found.log_probabilities[image, row, len(words) :] == 0).all()


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("search", [lambda *of: beam_search(*of, beam_size=3), lambda *of: sample(*of, samples=3)])
def test_the_regions_that_were_drawn_for_a_caption_can_be_used_again(annotations, kind, search):
    net = small_model(words=30, decoder=kind, attention="hard", heads=3, dropout=0.5).decoder.eval()
    for module in net.modules():
        if isinstance(module, HardAttention):
            module.train()
            torch.nn.init.normal_(module.v.weight, std=10.0)  # where it looks depends on what it saw
    torch.manual_seed(0)
    with torch.no_grad():
        net.output_bias[END] = -1.0
        found = search(net, annotations, None)
        order = found.lengths.argsort(dim=1, descending=True)
        words, log_probabilities, drawn = (
            gather_rows(part, order) for part in (found.words, found.log_probabilities, found.drawn)
        )
        captions = torch.cat([torch.full_like(words[..., :1], START), words], dim=2)
        again = net(annotations, captions, drawn=drawn)
        other = net(annotations, captions)
    assert drawn.shape == (*words.shape, 2 if kind == "transformer" else 1)
    expected = (drawn == EXPECTED)[:, 0, 0, 0]
    assert expected.any()
    assert not expected.all()

    def log_probabilities_of(output):
        return output.log_probabilities(excluded=(PAD, START, UNKNOWN))[..., 1:]  # no caption is empty

    assert torch.allclose(log_probabilities_of(again), log_probabilities[..., 1:], atol=1e-5)
    assert torch.allclose(again.alpha, gather_rows(found.alpha, order), atol=1e-5)
    assert not torch.allclose(log_probabilities_of(other), log_probabilities[..., 1:], atol=1e-2)
    chosen = again.alpha[:, :, :, 0].log().gather(3, drawn[..., :1].clamp(min=0)).squeeze(3)
    if kind == "lstm":
        here = again.mask & ~expected[:, None, None]
        assert torch.allclose(again.choice_log_probability[here], chosen[here], atol=1e-5)
        assert (again.choice_log_probability[~here] == 0).all()


@pytest.mark.parametrize("search", [beam_search, lambda *args: sample(*args, samples=3, seed=0)])
def test_a_search_sees_nothing_of_masked_regions(decoder, annotations, search):
    mask = torch.tensor([True, True, False, True, False, True]).expand(6, -1)
    found = search(decoder, annotations, mask)
    changed = search(decoder, annotations.masked_fill(~mask[..., None], 1e6), mask)
    assert torch.equal(found.words, changed.words)
    assert torch.equal(found.scores, changed.scores)
    assert (found.alpha[..., ~mask[0]] == 0).all()


def test_hypotheses_come_best_first_and_are_all_different(decoder, annotations):
    found = beam_search(decoder, annotations, beam_size=5)
    assert (found.scores.diff(dim=1) <= 0).all()
    for image in range(6):
        assert len({tuple(caption_of(found, image, row)) for row in range(5)}) == 5


def test_a_larger_length_penalty_gives_longer_captions(decoder, annotations):
    short, long = (beam_search(decoder, annotations, beam_size=5, length_penalty=p).lengths[:, 0] for p in (0.0, 2.0))
    assert (long >= short).all()
    assert long.sum() > short.sum()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_of_words_comes_twice_where_that_is_blocked(annotations, n):
    net = small_model(words=9, seed=2).decoder
    with torch.no_grad():
        net.output_bias[END] = -5.0
    free = beam_search(net, annotations, beam_size=2, max_length=5)
    blocked = beam_search(net, annotations, beam_size=2, max_length=5, block_ngrams=n)
    sampled = sample(net, annotations, samples=2, max_length=5, block_ngrams=n)

    def repeats(found):
        captions = [caption_of(found, image, row) for image in range(6) for row in range(2)]
        runs = [[tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)] for caption in captions]
        return sum(len(of_one) - len(set(of_one)) for of_one in runs)

    assert repeats(blocked) == repeats(sampled) == 0
    assert n > 1 or repeats(free) > 0


def test_the_same_seed_draws_the_same_captions(decoder, annotations):
    one, same, other = (sample(decoder, annotations, samples=4, seed=seed).words for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)


def test_a_drawn_caption_that_has_ended_says_no_more_in_any_precision(decoder, annotations, monkeypatch):
    def chances(seed, samples, steps):
        drawn = np.full((samples, steps), 1 - 2**-20)  # with fewer digits this is 1, which lies beyond every word
        drawn[0, 1] = 0.0  # the first word that may come, which is the end
        return drawn

    monkeypatch.setattr(search_module, "random_numbers", chances)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(decoder, annotations.bfloat16(), samples=2, seed=1)
    ended = (found.words == END).cumsum(dim=2).bool()
    assert ended.any()
    assert (found.words[..., 1:][ended[..., :-1]] == PAD).all()


def test_without_a_seed_images_draw_independently(decoder, annotations):
    twice = annotations[:1].expand(40, -1, -1)
    assert len({tuple(row) for row in sample(decoder, twice).words[:, 0].tolist()}) > 10


@pytest.mark.parametrize("temperature", [1e-4, 1e-40])
def test_a_temperature_near_zero_is_greedy(decoder, annotations, temperature):
    greedy = beam_search(decoder, annotations, beam_size=1)
    cold = sample(decoder, annotations, temperature=temperature, seed=3)
    assert [caption_of(cold, image) for image in range(6)] == [caption_of(greedy, image) for image in range(6)]


def test_words_are_drawn_as_often_as_they_are_likely(decoder, annotations):
    many = annotations[:1].expand(4000, -1, -1)
    drawn = sample(decoder, many, max_length=1, seed=range(4000)).words[:, 0, 0]
    memory = decoder.encode(annotations[:1])
    logits = decoder.step(memory, decoder.initial_state(memory, 1), torch.tensor([[START]])).logits[0, 0].detach()
    logits[[PAD, START, UNKNOWN, END]] = float("-inf")
    expected = logits.softmax(dim=0)
    assert torch.allclose(torch.bincount(drawn, minlength=30) / 4000, expected, atol=0.04)

    kept = expected.sort(descending=True)
    nucleus = kept.indices[: int((kept.values.cumsum(0) < 0.5).sum()) + 1]
    narrow = sample(decoder, many, max_length=1, top_p=0.5, seed=range(4000)).words[:, 0, 0]
    assert set(narrow.tolist()) == set(nucleus.tolist())


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        (beam_search, {"beam_size": 0}, "beam_size must be at least 1"),
        (beam_search, {"beam_size": 31}, "more than the 26 words"),
        (beam_search, {"max_length": 0}, "max_length must be at least 1"),
        (sample, {"samples": 0}, "samples must be at least 1"),
        (sample, {"temperature": 0.0}, "temperature must be above 0"),
        (sample, {"temperature": float("inf")}, "temperature"),
        (sample, {"top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(decoder, annotations, search, options, message):
    with pytest.raises(ValueError, match=message):
        search(decoder, annotations, **options)
