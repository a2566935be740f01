"""The decoder is the paper's equations: checked against them written out one caption and one word at a time."""

import itertools

import pytest
import torch

from captioner.config import ModelConfig
from captioner.network.decoder import AttentionLSTM
from captioner.vocabulary import END, PAD, START

WORDS, CHANNELS, REGIONS = 11, 7, 5


def decoder(tied: bool = False, dropout: float = 0.0) -> AttentionLSTM:
    torch.manual_seed(3)
    sizes = {"embedding_size": 6, "hidden_size": 8, "attention_size": 4}
    config = ModelConfig(WORDS, dropout=dropout, tie_embeddings=tied, **sizes)
    network = AttentionLSTM(config, CHANNELS).double()
    with torch.no_grad():
        network.output_bias.normal_()
    return network


def batch(masked: bool):
    """Three images with captions of several lengths, one of them missing, from the longest to the shortest."""
    generator = torch.Generator().manual_seed(4)
    annotations = torch.randn(3, REGIONS, CHANNELS, generator=generator, dtype=torch.double)
    captions = torch.full((3, 3, 7), PAD)
    for image, lengths in enumerate([(5, 3, 1), (4, 4, 2), (2, 1, 0)]):
        for row, length in enumerate(lengths):
            if length:
                words = torch.randint(4, WORDS, (length,), generator=generator).tolist()
                captions[image, row, : length + 2] = torch.tensor([START, *words, END])
    mask = torch.ones(3, REGIONS, dtype=torch.bool)
    mask[0, 3:], mask[2, 1] = False, False
    return annotations, captions, mask if masked else None


def by_the_equations(net: AttentionLSTM, annotations, captions, mask):
    """Logits and attention weights of every word of every caption, in order, straight from the paper."""
    E = net.embedding.weight
    output = E if net.output_weight is None else net.output_weight
    all_logits, all_alpha = [], []
    for image in range(captions.shape[0]):
        seen = [i for i in range(REGIONS) if mask is None or mask[image, i]]
        a = [annotations[image, i] for i in seen]
        for caption in captions[image].tolist():
            mean = sum(a) / len(a)
            h = torch.tanh(net.initial_hidden.weight @ mean + net.initial_hidden.bias)
            c = torch.tanh(net.initial_cell.weight @ mean + net.initial_cell.bias)
            for previous, word in itertools.pairwise(caption):
                if word == PAD:
                    break
                att = net.attention
                e = [att.v.weight[0] @ torch.tanh(att.W.weight @ x + att.W.bias + att.U.weight @ h) for x in a]
                alpha = torch.softmax(torch.stack(e), dim=0)
                beta = torch.sigmoid(net.beta.weight[0] @ h + net.beta.bias[0])
                z = beta * sum(weight * x for weight, x in zip(alpha, a, strict=True))
                y = E[previous]
                gates = net.word_to_gates.weight @ y + net.word_to_gates.bias
                gates = gates + net.state_to_gates.weight @ torch.cat([z, h])
                i, f, o, g = gates.split(8)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                deep = (
                    y + net.hidden_to_output.weight @ h + net.hidden_to_output.bias + net.context_to_output.weight @ z
                )
                all_logits.append(output @ torch.tanh(deep) + net.output_bias)
                all_alpha.append(torch.zeros(REGIONS, dtype=torch.double).index_put((torch.tensor(seen),), alpha))
    return torch.stack(all_logits), torch.stack(all_alpha)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_weights_and_all_gradients_are_those_of_the_equations(tied, masked):
    net = decoder(tied)
    annotations, captions, mask = batch(masked)
    annotations.requires_grad_()
    result = net(annotations, captions, mask)
    real = captions[..., 1:] != PAD
    logits, alpha = by_the_equations(net, annotations, captions, mask)
    assert torch.allclose(result.logits, logits, atol=1e-12)
    assert torch.allclose(result.alpha[:, :, :, 0][real[:, :, : result.alpha.shape[2]]], alpha, atol=1e-12)
    assert result.targets.tolist() == captions[..., 1:][real].tolist()

    parameters = [annotations, *net.parameters()]
    weights = torch.randn_like(logits)
    ours = torch.autograd.grad((result.logits * weights).sum() + result.alpha.square().sum(), parameters)
    theirs = torch.autograd.grad((logits * weights).sum() + alpha.square().sum(), parameters)
    names = ["annotations", *(name for name, _ in net.named_parameters())]
    for name, one, other in zip(names, ours, theirs, strict=True):
        if name == "embedding.weight":  # the row of PAD is never trained
            one, other = one[1:], other[1:]
        assert torch.allclose(one, other, atol=1e-10), name


def test_other_words_may_be_read_than_are_to_be_said():
    net = decoder()
    annotations, captions, mask = batch(masked=True)
    others = torch.where(captions >= 4, (captions - 4 + 3) % (WORDS - 4) + 4, captions)
    result = net(annotations, captions, mask, inputs=others)
    logits, _ = by_the_equations(net, annotations, others, mask)
    assert torch.allclose(result.logits, logits, atol=1e-12)
    assert torch.equal(result.targets, net(annotations, captions, mask).targets)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_finite_differences(tied):
    net = decoder(tied)
    annotations, captions, mask = batch(masked=True)
    captions = captions[:, :2, :5]
    weights = torch.randn(int((captions[..., 1:] != PAD).sum()), WORDS, dtype=torch.double)

    def loss(annotations, *_):
        result = net(annotations, captions, mask)
        return (result.logits.log_softmax(dim=-1) * weights).sum() + result.alpha.sum(dim=2).square().sum()

    trained = [parameter for name, parameter in net.named_parameters() if name != "embedding.weight"]
    assert torch.autograd.gradcheck(loss, (annotations.requires_grad_(), *trained), fast_mode=True)


def test_the_order_of_an_images_captions_changes_only_the_order_of_the_results():
    net = decoder()
    annotations, captions, _ = batch(masked=False)
    straight, turned = net(annotations, captions), net(annotations, captions.flip(1))
    assert torch.allclose(straight.alpha, turned.alpha.flip(1), atol=1e-12)
    assert torch.allclose(straight.logits.sum(dim=0), turned.logits.sum(dim=0), atol=1e-10)


def test_steps_one_after_another_give_what_teacher_forcing_gives():
    net = decoder().eval()
    annotations, captions, mask = batch(masked=True)
    whole = net(annotations, captions, mask)
    for remember in (False, True):
        if remember:
            net.remember_words()
        memory = net.encode(annotations, mask)
        state = net.initial_state(memory, rows=3)
        logits = []
        for t in range(captions.shape[2] - 1):
            step = net.step(memory, state, captions[..., t])
            state = step.state
            logits.append(step.logits)
            assert ((step.beta > 0) & (step.beta < 1)).all()
        stepped = torch.stack(logits, dim=2)[captions[..., 1:] != PAD]
        assert torch.allclose(stepped, whole.logits, atol=1e-12)


def test_remembered_words_are_forgotten_when_training_goes_on():
    net = decoder().eval()
    net.remember_words()
    assert net.eval().gates_of_words is not None
    assert net.train().gates_of_words is None


def loaded(net, other):
    net.load_state_dict(other.state_dict())


def stepped(net, other):
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    for parameter, wanted in zip(net.parameters(), other.parameters(), strict=True):
        parameter.grad = (parameter - wanted).detach()
    optimiser.step()


def in_place(net, other):
    for parameter, wanted in zip(net.parameters(), other.parameters(), strict=True):
        parameter.data.add_(wanted.data - parameter.data)


@pytest.mark.parametrize("change", [loaded, stepped, in_place])
@pytest.mark.parametrize("weight", ["embedding.weight", "word_to_gates.weight", "word_to_gates.bias"])
def test_remembered_words_are_not_those_of_weights_that_are_gone(change, weight):
    net, other = decoder().eval(), decoder().eval()
    with torch.no_grad():
        other.get_parameter(weight).add_(1.0)
    net.remember_words()
    change(net, other)
    memory = net.encode(torch.ones(1, REGIONS, CHANNELS, dtype=torch.double))
    words = torch.tensor([[START, 5]])
    ours, theirs = (each.step(memory, each.initial_state(memory, rows=2), words).logits for each in (net, other))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_words_are_remembered_as_long_as_the_weights_stay():
    net = decoder().eval()
    net.remember_words()
    gates = net.gates_of_words
    net.encode(torch.ones(1, REGIONS, CHANNELS, dtype=torch.double))
    assert net.gates_of_words is gates


@pytest.mark.parametrize("where", [{"device": "meta"}, {"dtype": torch.bfloat16}], ids=str)
def test_remembered_words_move_with_the_weights(where):
    net = decoder().eval()
    net.remember_words()
    net.to(**where)
    memory = net.encode(torch.ones(1, REGIONS, CHANNELS, dtype=net.output_bias.dtype, device=net.output_bias.device))
    words = torch.tensor([[START]], device=net.output_bias.device)
    first = net.step(memory, net.initial_state(memory, rows=1), words)
    assert net.step(memory, first.state, words).logits.dtype == net.output_bias.dtype


def test_what_stands_in_masked_regions_does_not_matter():
    net = decoder()
    annotations, captions, mask = batch(masked=True)
    before = net(annotations, captions, mask).logits
    annotations[~mask] = 1e6
    assert torch.equal(net(annotations, captions, mask).logits, before)


def test_dropout_acts_in_training_only():
    net = decoder(dropout=0.5)
    annotations, captions, _ = batch(masked=False)
    assert not torch.equal(net(annotations, captions).logits, net(annotations, captions).logits)
    net.eval()
    assert torch.equal(net(annotations, captions).logits, net(annotations, captions).logits)


def test_captions_of_any_lengths_give_what_the_steps_give_one_by_one():
    """Each step leaves out the images and the rows without a word; the results are in the order of the images."""
    network = decoder().eval()
    generator = torch.Generator().manual_seed(1)
    annotations = torch.randn(4, REGIONS, CHANNELS, generator=generator, dtype=torch.double)
    lengths = torch.tensor([[3, 1, 0], [7, 7, 2], [0, 0, 0], [5, 4, 4]])
    words = torch.randint(4, WORDS, (4, 3, 9), generator=generator)
    captions = torch.where(torch.arange(9) < lengths[..., None] + 1, words, PAD)
    captions[..., 0] = START
    output = network(annotations, captions)
    memory = network.encode(annotations)
    state = network.initial_state(memory, 3)
    logits, alpha = [], []
    for t in range(8):
        step = network.step(memory, state, captions[..., t])
        logits, alpha, state = [*logits, step.logits], [*alpha, step.alpha], step.state
    mask = captions[..., 1:] != PAD
    assert torch.equal(output.mask, mask)
    assert torch.allclose(output.logits, torch.stack(logits, dim=2)[mask])
    assert torch.allclose(output.alpha, torch.stack(alpha, dim=2) * mask[..., None, None])
