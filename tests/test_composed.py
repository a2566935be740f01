"""Pictures composed of two photographs, and the loss that keeps attention on the right one."""

import pytest
import torch
from conftest import small_model

from captioner.vocabulary import END, PAD, SPECIAL, START
from training.composed_loss import chosen_rows, composed_loss, content_words, split_composed
from training.data.batches import pad_captions
from training.data.composed import ROWS, add_composed, compose, join

GRID = (2, 4)


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def captions_of(*counts):
    """For each image so many captions; every word names its image."""
    return pad_captions([[[START, 10 + i, 10 + i, END]] * count for i, count in enumerate(counts)])


def plain_maps(images, channels=5):
    """Maps whose values are the number of the image."""
    return torch.arange(images).float()[:, None, None, None].expand(-1, channels, *GRID)


def test_a_composed_picture_is_the_middle_halves_of_two_photographs():
    first, second = torch.arange(4.0).expand(1, 1, 2, 4), 10 + torch.arange(4.0).expand(1, 1, 2, 4)
    assert join(first, second, -1)[0, 0].tolist() == [[1, 2, 11, 12]] * 2
    odd = torch.arange(5.0).expand(1, 1, 1, 5)
    assert join(odd, 10 + odd, -1)[0, 0, 0].tolist() == [1, 2, 3, 11, 12]


@pytest.mark.parametrize("kind", ["maps", "features", "pixels"])
@pytest.mark.parametrize("seed", range(6))
def test_each_caption_owns_the_regions_that_show_its_photograph(kind, seed):
    images = plain_maps(6)
    if kind == "features":
        images = images.flatten(2).transpose(1, 2)
    if kind == "pixels":
        images = images.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    composed = compose(images, captions_of(5, 3, 1, 5, 2, 1), 3, GRID, chance(seed))
    assert composed.images.shape == (3, *images.shape[1:])
    regions = composed.images
    if kind == "pixels":
        regions = torch.nn.functional.avg_pool2d(regions, 8)
    if kind != "features":
        regions = regions.flatten(2).transpose(1, 2)
    for picture in range(3):
        for row in range(2 * ROWS):
            caption = composed.captions[picture, row]
            photograph = picture if row < ROWS else picture + 3
            if caption[0] == PAD:
                assert not caption.any()
                continue
            assert caption[1] == 10 + photograph
            assert torch.equal(composed.own[picture, row] > 0, regions[picture, :, 0] == photograph)


def test_a_photograph_with_one_caption_is_given_it_once():
    composed = compose(plain_maps(2), captions_of(1, 4), 1, GRID, chance())
    assert (composed.captions[0, :, 0] == START).tolist() == [True, False, True, True]


def test_the_output_is_divided_where_the_batch_ends():
    model = small_model(40, grid=GRID)
    captions = captions_of(2, 3, 1, 2)
    features = torch.randn(4, 8, model.encoder.channels)
    composed = compose(features, captions, 2, GRID, chance())
    whole = model(*add_composed(features, captions, composed))
    batch, behind = split_composed(whole, 4, 3)
    alone, composed_alone = model(features, captions), model(composed.images, composed.captions)
    assert torch.equal(batch.targets, alone.targets)
    assert torch.allclose(batch.logits, alone.logits, atol=1e-5)
    assert torch.equal(batch.mask, alone.mask)
    assert torch.equal(behind.targets, composed_alone.targets)
    assert torch.allclose(behind.logits, composed_alone.logits, atol=1e-5)
    assert torch.allclose(behind.alpha, composed_alone.alpha, atol=1e-5)


def test_only_words_that_name_something_have_a_place():
    assert content_words([*SPECIAL, "a", "dog", "in", "grass"]).tolist() == [False] * 5 + [True, False, True]


def test_the_photograph_with_more_weight_at_the_first_content_word_is_chosen():
    share = torch.tensor([[[0.9, 0.2], [0.9, 0.2], [0.3, 0.9], [0.9, 0.9]]])
    named = torch.tensor([[[True, True], [True, True], [True, True], [False, False]]])
    assert chosen_rows(share, named).tolist() == [[True, True, False, False]]
    named = torch.tensor([[[False, True], [False, True], [True, True], [False, False]]])
    assert chosen_rows(share, named).tolist() == [[False, False, True, True]]


def test_training_on_composed_pictures_moves_attention_to_the_photograph_that_is_described():
    torch.manual_seed(0)
    model = small_model(40, grid=GRID, dropout=0.0)
    captions = captions_of(2, 2)
    features = torch.randn(2, 8, model.encoder.channels)
    features[1] += 1
    content = content_words([*SPECIAL, *(f"word{n}" for n in range(36))])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)

    def loss_and_share():
        composed = compose(features, captions, 1, GRID, chance())
        output = model(composed.images, composed.captions)
        share = torch.einsum("prtk,prk->prt", output.alpha[..., 0, :], composed.own)
        chosen = chosen_rows(share, output.mask)[..., None] & output.mask
        return composed_loss(output, composed.own, content, 1.0), share[chosen].mean().item()

    before = loss_and_share()[1]
    for _ in range(30):
        optimiser.zero_grad()
        loss_and_share()[0].backward()
        optimiser.step()
    assert before < 0.7
    assert loss_and_share()[1] > 0.95
