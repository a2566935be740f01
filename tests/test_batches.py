"""Batches: every image once, all its captions with it, augmented the same way whenever the same epoch comes again."""

import random

import numpy as np
import pytest
import torch
from conftest import PHOTOS
from PIL import Image

from captioner.images import Preprocessing
from captioner.network.decoder import TeacherForced
from captioner.vocabulary import END, PAD, START, Vocabulary
from training.data.batches import CaptionTable, EpochBatches, encode_captions, pad_captions
from training.data.images import FeatureSource, ImageSource, augment, names_no_side
from training.data.items import CaptionedImage
from training.losses import caption_loss, entropy_loss

PREPROCESSING = Preprocessing(size=(32, 32))
ITEMS = [CaptionedImage(path, ("a photo", "one more photo of it")) for path in sorted(PHOTOS.glob("*.jpg"))]


def epoch_of(count=11, batch_size=4, epoch=0, rank=0, size=1, seed=0):
    features = np.arange(count, dtype=np.float16).reshape(count, 1, 1)
    captions = [[[START, 4 + index, 5, END], [START, 4 + index, END]] for index in range(count)]
    return EpochBatches(FeatureSource(features), captions, batch_size, seed, epoch, rank, size)


def seen(batches):
    return [int(value) for batch in batches for value in batch.images.flatten() if batch.weight]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_image_is_seen_once_an_epoch_over_all_processes(size):
    shares = [list(epoch_of(rank=rank, size=size)) for rank in range(size)]
    assert sorted(index for share in shares for index in seen(share)) == list(range(11))
    assert {len(share) for share in shares} == {3}


def test_the_processes_share_the_batches_of_one_process():
    alone = list(epoch_of())
    shares = [list(epoch_of(rank=rank, size=2)) for rank in range(2)]
    for position, whole in enumerate(alone):
        together = [index for share in shares for index in seen([share[position]])]
        assert sorted(together) == sorted(seen([whole]))
        assert all(share[position].word_count == whole.word_count for share in shares)
        assert all(share[position].caption_count == whole.caption_count for share in shares)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert seen(epoch_of()) == seen(epoch_of())
    assert seen(epoch_of()) != seen(epoch_of(epoch=1))
    assert seen(epoch_of()) != seen(epoch_of(seed=1))


def test_images_come_with_their_own_captions_and_indices():
    for batch in epoch_of():
        for image, captions, index in zip(batch.images, batch.captions, batch.indices, strict=True):
            assert index == int(image)
            assert captions.tolist() == [[START, 4 + index, 5, END], [START, 4 + index, END, PAD]]
        assert batch.image_count == (4 if len(batch.indices) == 4 else 3)
        assert batch.word_count == int((batch.captions[..., 1:] != PAD).sum())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_may_start_in_the_middle(workers):
    batches = epoch_of()
    assert seen(batches.loader(1, workers, pin_memory=False)) == seen([batches[1], batches[2]])


def test_captions_are_padded_to_the_longest_and_the_most():
    assert pad_captions([[[1, 4, 2]], [[1, 2], [1, 2]]]).tolist() == [[[1, 4, 2], [0, 0, 0]], [[1, 2, 0], [1, 2, 0]]]


def test_captions_are_encoded_longest_first_and_a_cut_one_has_no_end():
    vocabulary = Vocabulary(["a", "dog", "runs", "fast"])
    item = CaptionedImage(PHOTOS, ("A dog .", "a dog runs fast", "a dog runs"))
    encoded = encode_captions(item, vocabulary, max_length=3)
    assert encoded == [[START, 4, 5, 6, END], [START, 4, 5, END], [START, 4, 5, 6]]


def test_a_table_of_captions_gives_back_what_it_was_made_of():
    captions = [[[START, 4, 5, END], [START, 4, END]], [[START, 70_000, END]], [], [[START], [START, END]]]
    table = CaptionTable(captions)
    assert [table[index] for index in range(len(table))] == captions


def test_augmentation_is_the_same_for_the_same_epoch_and_another_for_the_next():
    source = ImageSource(ITEMS, PREPROCESSING, augment=True, seed=3)
    first = source.load([0, 1], epoch=5)
    assert torch.equal(first, source.load([0, 1], epoch=5))
    assert torch.equal(first[1:], source.load([1], epoch=5))
    assert not torch.equal(first, source.load([0, 1], epoch=6))
    assert not torch.equal(first, ImageSource(ITEMS, PREPROCESSING, augment=True, seed=4).load([0, 1], epoch=5))


def test_without_augmentation_an_image_is_what_the_library_reads():
    plain = ImageSource(ITEMS, PREPROCESSING, augment=False)
    pixels = PREPROCESSING([Image.open(ITEMS[0].path).convert("RGB")])
    assert torch.equal(plain.load([0], epoch=1), torch.from_numpy(pixels))


def test_an_image_is_never_mirrored_where_a_caption_names_a_side():
    sides = Image.new("RGB", (40, 40), "black")
    sides.paste("white", (0, 0, 20, 40))
    left_is_brighter = {True: set(), False: set()}
    for may_flip in (True, False):
        for seed in range(40):
            pixels = np.asarray(augment(sides, (32, 32), may_flip, random.Random(seed)).convert("L")).astype(int)
            left_is_brighter[may_flip].add(bool(pixels[:, :4].mean() > pixels[:, -4:].mean()))
    assert left_is_brighter == {True: {True, False}, False: {True}}


@pytest.mark.parametrize(
    ("captions", "answer"),
    [
        (["A dog", "a cat"], True),
        (["a dog", "A dog on the LEFT ."], False),
        (["right-hand"], False),
        (["bright"], True),
    ],
)
def test_sides_are_found_as_words(captions, answer):
    assert names_no_side(captions) is answer


def test_augmented_images_have_the_size_asked_for_whatever_their_own():
    for size in ((1, 1), (3, 90), (200, 10)):
        assert augment(Image.new("RGB", size), (32, 48), True, random.Random(0)).size == (48, 32)


def result_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, 9, (7,), generator=generator)
    alpha = torch.rand(2, 2, 3, 1, 4, generator=generator)
    real = torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 1, 0], [0, 0, 0]]]).bool()  # the last row has no caption
    return TeacherForced(torch.randn(7, 9, generator=generator), targets, alpha * real[..., None, None], real)


def test_the_loss_is_the_papers_equation():
    output = result_of()
    probabilities = output.logits.log_softmax(dim=1)
    expected = 0.0
    for row, target in enumerate(output.targets):
        expected -= 0.9 * probabilities[row, target] / 7 + 0.1 * probabilities[row].mean() / 7
    for image, row in ((0, 0), (0, 1), (1, 0)):
        for region in range(4):
            expected += 0.3 * (1 - output.alpha[image, row, :, 0, region].sum()) ** 2 / 3
    assert float(caption_loss(output, 7, 3, 0.1, 0.3)) == pytest.approx(float(expected), rel=1e-5)


def test_entropy_above_the_bound_is_lost_and_below_it_nothing():
    even = torch.full((4,), 0.25)
    narrow = torch.tensor([1.0, 0.0, 0.0, 0.0])
    half = torch.tensor([0.5, 0.5, 0.0, 0.0])  # half the entropy of an even map
    none = torch.zeros(4)
    alpha = torch.stack([torch.stack([even, half, none]), torch.stack([narrow, half, narrow]), torch.zeros(3, 4)])
    alpha = alpha[None, :, :, None].clone().requires_grad_()
    real = torch.tensor([[[1, 1, 0], [1, 1, 1], [0, 0, 0]]]).bool()
    output = TeacherForced(torch.randn(5, 9), torch.zeros(5).long(), alpha, real)
    means = [0.75, 0.5 / 3]
    for bound in (0.1, 0.5, 0.8):
        loss = entropy_loss(output, bound, 2, torch.tensor([3.0]))
        assert float(loss) == pytest.approx(3 * sum(max(0, mean - bound) for mean in means) / 2, abs=1e-5)
    entropy_loss(output, 0.1, 2, torch.tensor([3.0])).backward()
    assert alpha.grad.isfinite().all()
    assert (alpha.grad[0, 2] == 0).all()


def parts_of(output):
    return [
        TeacherForced(output.logits[:5], output.targets[:5], output.alpha[:1], output.mask[:1]),
        TeacherForced(output.logits[5:], output.targets[5:], output.alpha[1:], output.mask[1:]),
    ]


def test_the_shares_of_two_processes_add_up():
    output = result_of()
    weights = torch.tensor([1.0, 2.0])
    entropy = [entropy_loss(part, 0.3, 3, weights[i : i + 1]) for i, part in enumerate(parts_of(output))]
    assert float(sum(entropy)) == pytest.approx(float(entropy_loss(output, 0.3, 3, weights)), rel=1e-6)
    whole = caption_loss(output, 7, 3, 0.1, 0.3)
    parts = parts_of(output)
    assert float(sum(caption_loss(part, 7, 3, 0.1, 0.3) for part in parts)) == pytest.approx(float(whole), rel=1e-6)
