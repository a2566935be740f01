"""The Transformer's parts against torch's own layers, and its cached steps against reading whole captions."""

import math

import pytest
import torch
from torch import nn

from captioner.config import ModelConfig
from captioner.network.transformer import AnnotationLayer, AnnotationTransformer, TransformerDecoder, sinusoids
from captioner.vocabulary import PAD, START

SIZE, HEADS, WORDS = 16, 4, 11


def copy_attention(theirs: nn.MultiheadAttention, query: nn.Linear, *others: nn.Linear, out: nn.Linear) -> None:
    parts = (query, *others)
    theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
    theirs.in_proj_bias.copy_(torch.cat([torch.zeros(SIZE) if part.bias is None else part.bias for part in parts]))
    theirs.out_proj.load_state_dict(out.state_dict())


def copy_layer(theirs: nn.Module, ours: nn.Module) -> None:
    theirs.linear1.load_state_dict(ours.feed_forward[0].state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward[3].state_dict())
    for number, norm in enumerate(ours.norms, 1):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())


@torch.no_grad()
def test_self_attention_over_the_regions_is_torchs_encoder_layer():
    torch.manual_seed(0)
    ours = AnnotationLayer(SIZE, HEADS, dropout=0.5).eval()
    theirs = nn.TransformerEncoderLayer(
        SIZE, HEADS, 4 * SIZE, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    copy_layer(theirs, ours)
    copy_attention(
        theirs.self_attn, ours.attention.query, ours.attention.key, ours.attention.value, out=ours.attention.out
    )
    x = torch.randn(3, 6, SIZE)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours(x, mask)[mask], theirs(x, src_key_padding_mask=~mask)[mask], atol=1e-5)


@torch.no_grad()
def test_regions_know_their_row_and_column():
    transformer = AnnotationTransformer(SIZE, (2, 3), layers=1, heads=HEADS, dropout=0.0).eval()
    alike = torch.ones(1, 6, SIZE)
    vectors = transformer(alike)[0]
    assert min(float((vectors[i] - vectors[j]).abs().max()) for i in range(6) for j in range(i)) > 1e-3
    nn.init.zeros_(transformer.columns)
    vectors = transformer(alike)[0]
    assert torch.allclose(vectors[0:3], vectors[0:1].expand(3, -1), atol=1e-6)
    assert not torch.allclose(vectors[0], vectors[3], atol=1e-3)


def decoder_of(attention="multi_head", channels=SIZE, **options) -> TransformerDecoder:
    torch.manual_seed(0)
    options = {"attention_options": {"heads": HEADS} if attention == "multi_head" else {}, **options}
    sizes = {"hidden_size": SIZE, "attention_size": SIZE, "heads": HEADS}
    return TransformerDecoder(ModelConfig(WORDS, attention=attention, **sizes, **options), channels).eval()


def captions_of(images=2, rows=3, length=7):
    torch.manual_seed(1)
    captions = torch.randint(4, WORDS, (images, rows, length))
    captions[..., 0] = START
    captions[0, 1, 4:] = PAD
    captions[1, 2] = PAD
    return captions


@torch.no_grad()
def test_the_decoder_is_torchs_decoder():
    ours = decoder_of()
    layer = nn.TransformerDecoderLayer(SIZE, HEADS, 4 * SIZE, activation="gelu", batch_first=True, norm_first=True)
    theirs = nn.TransformerDecoder(layer, 2, norm=ours.norm).eval()
    for own, other in zip(ours.layers, theirs.layers, strict=True):
        copy_layer(other, own)
        back = own.self_attention
        copy_attention(other.self_attn, back.query, back.key, back.value, out=back.out)
        cross = own.attention
        copy_attention(other.multihead_attn, cross.U, cross.W, cross.V, out=cross.O)
    annotations, captions = torch.randn(2, 5, SIZE), captions_of()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    inputs, targets = captions[..., :-1].flatten(0, 1), captions[..., 1:]
    steps = inputs.shape[1]
    read = theirs(
        ours.embedding(inputs) * SIZE**0.5 + sinusoids(0, steps, SIZE),
        annotations.repeat_interleave(3, dim=0),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(steps),
        memory_key_padding_mask=~mask.repeat_interleave(3, dim=0),
    )
    logits = read @ ours.output_weight.T + ours.output_bias
    result = ours(annotations, captions, mask)
    mask_of_words = targets != PAD
    assert torch.allclose(result.logits, logits.view(2, 3, steps, WORDS)[mask_of_words], atol=1e-5)
    assert torch.equal(result.targets, targets[mask_of_words])
    assert torch.equal(result.mask, mask_of_words)
    assert result.alpha.shape == (2, 3, steps, 2 * HEADS, 5)
    assert torch.allclose(
        result.alpha.sum(dim=-1), mask_of_words[..., None].expand(-1, -1, -1, 2 * HEADS).float(), atol=1e-5
    )
    assert (result.alpha[1, ..., 3:] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["multi_head", "additive", "none", "hard"])
def test_cached_steps_are_what_reading_the_whole_caption_gives(attention):
    decoder = decoder_of(attention, layers=3, channels=10)
    annotations, captions = torch.randn(2, 5, 10), captions_of()[:, :2]
    captions[captions == PAD] = 5
    whole = decoder(annotations, captions)
    memories = decoder.encode(annotations)
    state = decoder.initial_state(memories, 2)
    logits = whole.logits.view(2, 2, 6, WORDS)
    for t in range(6):
        step = decoder.step(memories, state, captions[..., t])
        state = step.state
        assert torch.allclose(step.logits, logits[:, :, t], atol=1e-5)
        assert torch.allclose(step.alpha, whole.alpha[:, :, t], atol=1e-6)
        assert step.beta is None
        assert state.keys_values.shape == (2, 2, 3, t + 1, 2 * SIZE)
        assert step.word_alpha.shape == (2, 2, 3, HEADS, t + 1)
    assert whole.alpha.shape[3] == decoder.heads == 3 * (HEADS if attention == "multi_head" else 1)


@torch.no_grad()
def test_steps_give_the_weights_of_self_attention_over_the_words_so_far():
    layers = nn.ModuleList(nn.MultiheadAttention(SIZE, HEADS, batch_first=True) for _ in range(2))
    decoder = decoder_of()
    read = [layer.self_attention for layer in decoder.layers]
    seen: list[torch.Tensor] = []
    for own, other in zip(read, layers, strict=True):
        copy_attention(other, own.query, own.key, own.value, out=own.out)
        own.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    annotations, captions = torch.randn(2, 5, SIZE), captions_of()[:1, :1].expand(2, -1, -1)
    decoder(annotations, captions)
    whole = [layer(x, x, x, average_attn_weights=False)[1] for layer, x in zip(layers, seen, strict=True)]
    assert whole[0].shape == (2, HEADS, 6, 6)
    memories = decoder.encode(annotations)
    state = decoder.initial_state(memories, 1)
    for t in range(6):
        step = decoder.step(memories, state, captions[..., t])
        state = step.state
        for number, theirs in enumerate(whole):
            expected = theirs[:, :, t, : t + 1] / theirs[:, :, t, : t + 1].sum(dim=-1, keepdim=True)
            assert torch.allclose(step.word_alpha[:, 0, number], expected, atol=1e-6)
    assert step.word_alpha.std() > 1e-3


def test_no_position_attends_to_those_after_it():
    decoder = decoder_of()
    annotations, captions = torch.randn(1, 5, SIZE), captions_of()[:1, :1]
    changed = captions.clone()
    changed[..., 4:] = (changed[..., 4:] - 3) % (WORDS - 4) + 4
    first, second = decoder(annotations, captions).logits, decoder(annotations, changed).logits
    assert torch.allclose(first[:4], second[:4], atol=1e-6)
    assert not torch.allclose(first[4:], second[4:], atol=1e-3)


def test_hard_cross_attention_returns_what_it_drew():
    decoder = decoder_of("hard").train()
    captions = captions_of()
    torch.manual_seed(2)
    output = decoder(torch.randn(2, 5, SIZE), captions)
    assert output.choice_log_probability.shape == output.mask.shape
    assert (output.choice_log_probability[~output.mask] == 0).all()
    assert (output.choice_log_probability <= 0).all()


def test_tied_embeddings_have_no_output_matrix():
    assert decoder_of(tie_embeddings=True).output_weight is None
    captions = captions_of()
    assert decoder_of(tie_embeddings=True)(torch.randn(2, 5, SIZE), captions).logits.shape[1] == WORDS


def test_position_encodings_are_the_papers():
    table = sinusoids(3, 4, 6)
    for row in range(4):
        for i in range(3):
            angle = (3 + row) / 10000 ** (2 * i / 6)
            assert float(table[row, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[row, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


@pytest.mark.parametrize("heads", [0, 3])
def test_vectors_that_cannot_be_divided_among_the_heads_are_refused(heads):
    with pytest.raises(ValueError, match=f"size 16 cannot be divided into {heads} heads"):
        AnnotationLayer(SIZE, heads, 0.0)
