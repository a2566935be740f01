"""One run on several data sets, with cached views, captions without pictures and composed pictures."""

import csv
import gzip
import math

import pytest
import tiny
import torch
from test_training import assert_same_run, losses

from captioner import Captioner
from captioner.network.decoder import TeacherForced
from training import self_critical, trainer
from training.data.batches import EpochBatches
from training.data.images import FeatureSource
from training.losses import caption_loss
from training.train import main

STAGES = """--epochs 1 --finetune-epochs 2 --scst-epochs 1 --finetune-from features.17 --scst-encoder-learning-rate 1e-5
--scst-samples 3 --max-length 8 --views 2 --attention-entropy 0.8
--composed 0.4 --checkpoint-every 1 --workers 0""".split()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    tiny.draw(folder / "a", train=7, dev=3)
    tiny.draw_karpathy(folder / "b", train=4, dev=2)
    weights = tiny.encoder_weights(folder / "mobilenet_v2.safetensors")
    language = folder / "captions.txt.gz"
    with gzip.open(language, "wt") as file:
        file.write("a red circle\nthere is a blue square\n\nsquare on grey\n" * 4)
    data = ["--data", f"flickr8k={folder / 'a'}", "--data", f"coco={folder / 'b'}", "--data-weight", "coco=2"]
    return [*data, "--cache", str(folder), "--encoder-weights", str(weights), "--language", str(language), *tiny.SMALL]


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    assert main([*options, *STAGES, "--output", str(output)]) == 0
    return output


def rows(output):
    with (output / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_dev_scores_are_given_for_each_set_and_their_mean_picks_the_model(run):
    assert [row["stage"] for row in rows(run)] == ["language", "frozen encoder", *["fine-tuning"] * 2, "self-critical"]
    for row in rows(run):
        for metric in ("BLEU-4", "CIDEr"):
            mean = (float(row[f"flickr8k {metric}"]) + float(row[f"coco {metric}"])) / 2
            assert float(row[metric]) == pytest.approx(mean)
    dev = Captioner.from_pretrained(run).about["dev"]
    assert dev["CIDEr"] == pytest.approx(max(float(row["CIDEr"]) for row in rows(run)))
    assert {"flickr8k CIDEr", "coco CIDEr"} < dev.keys()


def test_words_of_all_sets_are_known(run):
    assert {"circle", "triangle"} < set(Captioner.from_pretrained(run).vocabulary.words)


def test_self_critical_training_counts_documents_in_the_training_captions_of_all_sets(options, tmp_path, monkeypatch):
    made = []

    class Kept(self_critical.CiderD):
        def __init__(self, corpus):
            super().__init__(corpus)
            made.append(self)

    monkeypatch.setattr(self_critical, "CiderD", Kept)
    stages = (
        "--language-epochs 0 --epochs 0 --finetune-epochs 0 --scst-epochs 1 --scst-samples 2 --max-length 8".split()
    )
    assert main([*options, *stages, "--output", str(tmp_path / "run")]) == 0
    (reward,) = made
    # Seven images of circles and squares and four of triangles, one caption or more each; dev images do not count.
    assert reward.log_documents == pytest.approx(math.log(7 + 4))
    assert (reward.documents["circle",] + reward.documents["square",], reward.documents["triangle",]) == (7, 4)
    assert reward.documents["a", "red"] == 2 + 1  # pictures 0 and 6 of the one set, picture 0 of the other


@pytest.mark.parametrize("stop", [2, 6, 9])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(options, run, tmp_path, stop, monkeypatch):
    flags = [*options, *STAGES, "--output", str(tmp_path / "run"), "--resume"]
    step, steps = trainer.Trainer.step, []

    def step_and_stop(self, *arguments):
        steps.append(1)
        self.stop.received = len(steps) == stop
        return step(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "step", step_and_stop)
    assert main(flags) == 130
    assert main(flags) == 0
    assert_same_run(run, tmp_path / "run")
    assert losses(run)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-weight", "flickr30k=2"], "flickr30k, which is no data set of this run"),
        (["--data", "flickr8k=elsewhere"], "two data sets have the name flickr8k"),
        (["--language", "/no/such/file"], "cannot read the captions in /no/such/file"),
    ],
)
def test_what_does_not_fit_is_named(options, tmp_path, capsys, flags, message):
    if flags[0] == "--data":
        flags[1] = f"flickr8k={next(o for o in options if o.startswith('flickr8k=')).partition('=')[2]}"
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["coco", "coco=", "coco=-1", "=2", "coco=nan"])
def test_a_weight_that_is_none_is_wrong_usage(value, capsys):
    with pytest.raises(SystemExit):
        main(["--data-weight", value])
    assert "NAME=WEIGHT" in capsys.readouterr().err


def test_an_image_of_weight_two_counts_twice_in_the_loss():
    torch.manual_seed(0)
    alpha, real = torch.rand(2, 1, 3, 1, 4), torch.tensor([[[True, True, False]], [[True, True, True]]])
    logits, targets = torch.randn(5, 6), torch.randint(6, (5,))

    def loss(weights, images):
        kept = torch.cat([real[i] for i in images])[:, None]
        words = [[0, 1], [2, 3, 4]]
        chosen = [word for i in images for word in words[i]]
        output = TeacherForced(logits[chosen], targets[chosen], alpha[images], kept)
        return caption_loss(output, 8, 3, 0.1, 0.5, weights)

    assert loss(torch.tensor([1.0, 2.0]), [0, 1]) == pytest.approx(float(loss(None, [0, 1, 1])))


def test_words_and_captions_of_a_batch_are_counted_by_the_weights_of_their_sets():
    import numpy as np

    captions = [[[1, 5, 2]], [[1, 5, 6, 2], [1, 5, 2]]]
    features = FeatureSource(np.zeros((2, 1, 1), np.float16))
    batch = EpochBatches(features, captions, 2, 0, 0, weights=[1.0, 3.0])[0]
    assert (batch.word_count, batch.caption_count) == (2 + 3 * 5, 1 + 3 * 2)
    assert sorted(batch.image_weights.tolist()) == [1, 3]
