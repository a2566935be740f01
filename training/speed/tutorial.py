"""The usual tutorial implementation of an LSTM with additive attention, with which training and search are compared.

Every caption has its own copy of the image's annotation vectors, the keys are computed again at every step, and beams
are expanded for one image at a time. It uses the same weights, and gives the same results.
"""

from typing import cast

import torch
from torch import Tensor, nn

from captioner.network.attention import AdditiveAttention
from captioner.network.decoder import AttentionLSTM, State
from captioner.search import allowed
from captioner.vocabulary import END, PAD, START

from .measure import Skipped


def check_tutorial(decoder: nn.Module) -> None:
    """Raise Skipped where there is no tutorial implementation of a decoder of this kind."""
    if not isinstance(decoder, AttentionLSTM) or decoder.attention.name != "additive":
        raise Skipped("the tutorial implementation is an LSTM with additive attention; this model is another one")


def tutorial_step(decoder: AttentionLSTM, annotations: Tensor, state: State, words: Tensor) -> tuple[Tensor, State]:
    """One step for a batch of captions, each with its own annotation vectors; nothing is cached.

    annotations (captions, regions, channels), state (captions, hidden), words (captions,).
    """
    attention = cast(AdditiveAttention, decoder.attention)
    embedded = decoder.dropout(decoder.embedding(words))
    matched = torch.tanh(attention.W(annotations) + attention.U(state.hidden)[:, None])
    scores = attention.v(matched).squeeze(2)
    alpha = scores.softmax(dim=1)
    context = torch.sigmoid(decoder.beta(state.hidden)) * (annotations * alpha.unsqueeze(2)).sum(dim=1)
    gates = decoder.word_to_gates(embedded) + decoder.state_to_gates(torch.cat([context, state.hidden], dim=1))
    write, forget, read, candidate = gates.chunk(4, dim=1)
    cell = torch.sigmoid(forget) * state.cell + torch.sigmoid(write) * torch.tanh(candidate)
    state = State(torch.sigmoid(read) * torch.tanh(cell), cell)
    return decoder.predict(embedded, state.hidden, context), state


def tutorial_loss(decoder: AttentionLSTM, annotations: Tensor, captions: Tensor) -> Tensor:
    """Cross-entropy of `captions` (captions, length), each with its own annotation vectors; sorted by length."""
    lengths = (captions != PAD).sum(dim=1) - 1
    order = lengths.argsort(descending=True)
    annotations, captions, lengths = annotations[order], captions[order], lengths[order]
    mean = annotations.mean(dim=1)
    state = State(torch.tanh(decoder.initial_hidden(mean)), torch.tanh(decoder.initial_cell(mean)))
    loss = annotations.new_zeros(())
    for t in range(int(lengths.max())):
        rows = int((lengths > t).sum())
        state = State(state.hidden[:rows], state.cell[:rows])
        logits, state = tutorial_step(decoder, annotations[:rows], state, captions[:rows, t])
        loss = loss + nn.functional.cross_entropy(logits, captions[:rows, t + 1], reduction="sum")
    return loss / int(lengths.sum())


def tutorial_beam(decoder: AttentionLSTM, annotations: Tensor, beam_size: int, max_length: int) -> list[int]:
    """The words of the best caption of one image, with annotations (1, regions, channels).

    As in `beam_search`, finished and unfinished captions are ranked together, by mean log-probability.
    """
    mean = annotations.mean(dim=1)
    state = State(torch.tanh(decoder.initial_hidden(mean)), torch.tanh(decoder.initial_cell(mean)))
    beams: list[tuple[float, list[int], Tensor, Tensor]] = [(0.0, [START], state.hidden[0], state.cell[0])]
    for _ in range(max_length):
        growing = [beam for beam in beams if beam[1][-1] != END]
        if not growing:
            break
        candidates = [beam for beam in beams if beam[1][-1] == END]
        state = State(torch.stack([beam[2] for beam in growing]), torch.stack([beam[3] for beam in growing]))
        words = torch.tensor([beam[1][-1] for beam in growing], device=annotations.device)
        logits, state = tutorial_step(decoder, annotations.expand(len(growing), -1, -1), state, words)
        logits = allowed(logits[None], torch.empty(1, len(growing), len(growing[0][1]) - 1, dtype=torch.long), 0)[0]
        best = logits.log_softmax(dim=1).topk(beam_size, dim=1)
        for row, beam in enumerate(growing):
            for value, word in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True):
                candidates.append((beam[0] + value, [*beam[1], word], state.hidden[row], state.cell[row]))
        beams = sorted(candidates, key=lambda beam: -beam[0] / (len(beam[1]) - 1))[:beam_size]
    return beams[0][1][1:]
