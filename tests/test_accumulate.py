"""A batch that is computed in parts trains as the whole batch does."""

import numpy as np
import pytest
import tiny
import torch
from test_training import KINDS, STAGES, TWO_PROCESSES, assert_same_run, losses, start

from captioner.vocabulary import PAD
from training import objectives
from training.data.batches import without_padding
from training.train import main


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accumulate")
    weights = tiny.encoder_weights(folder / "mobilenet_v2.safetensors")
    data = ["--data", f"flickr8k={tiny.draw(folder / 'data')}", "--cache", str(folder / "cache")]
    return [*data, "--encoder-weights", str(weights), *tiny.SMALL]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_batch_in_parts_has_the_losses_of_the_whole_batch(options, tmp_path, processes):
    # The last batch has 1 image, which cannot be divided, and which the second process does not have.
    flags = [*options, *STAGES, "--dropout", "0", "--batch-size", "11", "--workers", "0"]
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    flags += ["--accumulate", "3", "--output", str(tmp_path / "parts")]
    if processes == 1:
        assert main(flags) == 0
    else:
        process = start(flags, *TWO_PROCESSES, "training.train")
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
    assert_same_run(tmp_path / "parts", tmp_path / "whole", tolerance=1e-4)


@pytest.mark.parametrize("kind", ["hard", "transformer"])
def test_other_kinds_of_attention_are_trained_by_parts_of_a_batch_too(options, tmp_path, monkeypatch, kind):
    sizes, loss = [], objectives.Imitation.loss

    def counted(self, batch):
        sizes.append((len(batch.indices), len(batch.images), batch.image_count))
        return loss(self, batch)

    monkeypatch.setattr(objectives.Imitation, "loss", counted)
    flags = [*options, *KINDS[kind], "--epochs", "1", "--finetune-epochs", "0", "--scst-epochs", "1", "--heads", "2"]
    flags += ["--max-length", "8", "--batch-size", "8", "--accumulate", "3", "--output", str(tmp_path / "run")]
    assert main(flags) == 0
    assert sizes == [(3, 3, 8), (3, 3, 8), (2, 2, 8), (2, 2, 4), (2, 2, 4)]
    assert np.isfinite(losses(tmp_path / "run")).all()


def test_padding_that_all_captions_of_a_part_share_is_left_out():
    captions = torch.tensor([[[1, 5, 2, PAD], [1, 2, PAD, PAD], [PAD] * 4], [[1, 5, 6, PAD], [PAD] * 4, [PAD] * 4]])
    assert torch.equal(without_padding(captions), captions[:, :2, :3])
    assert torch.equal(without_padding(captions[1:]), captions[1:, :1, :3])
