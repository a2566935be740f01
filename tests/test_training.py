"""Training learns, and neither a crash, nor a full disk, nor another number of processes changes what it computes."""

import contextlib
import csv
import errno
import inspect
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import small_model
from PIL import Image
from safetensors.torch import load_file

from captioner import Captioner
from captioner.arrays import gather_rows
from captioner.checkpoint import load_checkpoint, load_tensors, save_tensors
from captioner.images import Preprocessing
from captioner.network.attention import MECHANISMS
from captioner.network.encoder import Encoder
from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN
from training import objectives, self_critical, state, validation
from training.config import TrainConfig
from training.data import features
from training.data.datasets import read_dataset
from training.data.features import cached_maps, features_key
from training.data.images import ImageSource, MapSource
from training.distributed import Distributed
from training.history import History
from training.scorers import quick_scores
from training.train import main
from training.words import tokenize

TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ALONE = Distributed(0, 1, torch.device("cpu"))
PROJECT = Path(__file__).parents[1]
STAGES = """--epochs 2 --finetune-epochs 2 --finetune-from features.17 --scst-epochs 2 --scst-encoder-learning-rate 1e-5
--scst-samples 3 --scst-search sample --scst-share 0.6 --sharpen 2 --max-length 8 --checkpoint-every 1""".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.draw(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.encoder_weights(tmp_path_factory.mktemp("weights") / "mobilenet_v2.safetensors")


@pytest.fixture(scope="module")
def options(root, cache, weights):
    """Flags of a run without its output folder."""
    return ["--data", f"flickr8k={root}", "--cache", str(cache), "--encoder-weights", str(weights), *tiny.SMALL]


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run of all stages that was never stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main([*options, *STAGES, "--output", str(output), "--workers", "0"]) == 0
    return output


def history(output):
    with (output / "history.csv").open() as file:
        return list(csv.DictReader(file))


def losses(output):
    return [float(row["loss"] or "nan") for row in history(output)]


def assert_same_run(one, other, tolerance=1e-6):
    assert losses(one) == pytest.approx(losses(other), abs=tolerance)
    assert [row["CIDEr"] for row in history(one)] == [row["CIDEr"] for row in history(other)]
    weights, others = (load_file(path / state.STATE) for path in (one, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, others[name], atol=tolerance), name


def start(arguments, *launcher):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    launcher = launcher or (sys.executable, "-m", "training.train")
    return subprocess.Popen([*launcher, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_run_leaves_a_model_that_captions_and_a_record_of_itself(whole, root):
    assert {"model.safetensors", "history.csv", "curves.png", "tensorboard"} < set(os.listdir(whole))
    assert [row["stage"] for row in history(whole)] == ["frozen encoder"] * 2 + ["fine-tuning"] * 2 + [
        "self-critical"
    ] * 2
    assert Image.open(whole / "curves.png").width > 300
    assert list((whole / "tensorboard").glob("events*"))
    captioner = Captioner.from_pretrained(whole)
    assert captioner.caption(root / "Flicker8k_Dataset" / "00.png").words
    assert captioner.about["training"]["batch_size"] == 5
    best = max(float(row["CIDEr"]) for row in history(whole))
    assert captioner.about["dev"]["CIDEr"] == pytest.approx(best)


def test_dev_images_are_captioned_in_training_as_users_caption_them(whole, root, options):
    items = read_dataset("flickr8k", root).splits["dev"]
    captioner = Captioner.from_pretrained(whole)
    found = captioner.caption([item.path for item in items], beam_size=captioner.about["training"]["monitor_beam"])
    references = [[tokenize(text) for text in item.captions] for item in items]
    scores = quick_scores([caption.words for caption in found], references)
    assert scores["CIDEr"] == pytest.approx(captioner.about["dev"]["CIDEr"])
    assert scores["BLEU-4"] == pytest.approx(captioner.about["dev"]["BLEU-4"])
    assert TrainConfig().monitor_beam == inspect.signature(Captioner.stream).parameters["beam_size"].default


def test_drawn_pictures_are_learnt_by_heart(options, tmp_path, root):
    flags = ["--epochs", "60", "--finetune-epochs", "2", "--learning-rate", "0.01", "--finetune-learning-rate", "1e-4"]
    flags += ["--encoder-learning-rate", "1e-5", "--ema-decay", "0.5", "--label-smoothing", "0", "--dropout", "0"]
    assert main([*options, *flags, "--patience", "99", "--workers", "0", "--output", str(tmp_path / "run")]) == 0
    figures = losses(tmp_path / "run")
    assert min(figures) < 0.5 * figures[0]
    items = read_dataset("flickr8k", root).splits["train"]
    found = Captioner.from_pretrained(tmp_path / "run").caption([item.path for item in items])
    correct = [
        str(caption) in {text.removesuffix(" .") for text in item.captions}
        for caption, item in zip(found, items, strict=True)
    ]
    assert sum(correct) >= 10


class Saves:
    """Counts how often the state of a run has been saved, over all its processes."""

    def __init__(self, output):
        self.path, self.count, self.written = output / state.STATE, 0, None

    def wait(self, process, part, chance):
        """Wait for a random one of the 24 saves of a run, in one of six parts, and a moment more."""
        wanted = 4 * part + chance.randrange(4)
        while self.count < wanted and process.is_alive():
            if (now := modified(self.path)) != self.written:
                self.written, self.count = now, self.count + 1
            time.sleep(0.002)
        process.join(chance.uniform(0, 0.2 if wanted else 2))


# How often the test below kills a run; CAPTIONER_KILLS=30 is a longer trial.
KILLS = int(os.environ.get("CAPTIONER_KILLS", "6"))


def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(options, whole, tmp_path):
    """`kill -9` again and again, at moments spread over all three stages; each time the model folder can be loaded."""
    seed = time.time_ns()
    print("seed", seed)  # shown where the test fails
    chance = random.Random(seed)
    killed = runs = 0
    while killed < KILLS:
        output, runs = tmp_path / f"run{runs}", runs + 1
        saves = Saves(output)
        arguments = [*options, *STAGES, "--output", str(output), "--workers", "0", "--resume"]
        for part in range(min(6, KILLS - killed)):
            process = tiny.start(arguments)
            saves.wait(process, part, chance)
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL
            killed += 1
            if (output / "model.safetensors").exists():
                assert load_checkpoint(output).about["training"]["output"] == str(output)
        assert main(arguments) == 0
        assert_same_run(output, whole)
        assert not list(output.glob(".*.safetensors.*"))


# How often the test below fills the disk; CAPTIONER_FULL_DISKS=30 is a longer trial.
FULL_DISKS = int(os.environ.get("CAPTIONER_FULL_DISKS", "4"))


@pytest.fixture
def disk(tmp_path):
    """A file system of 128 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk, room, name="filler"):
    """A new file that leaves so many bytes of a disk free."""
    filler = disk / name
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while (excess := shutil.disk_usage(disk).free - room) > 0:
            file.write(bytes(min(excess, 2**20)))
    return filler


def test_a_run_whose_disk_is_full_at_any_moment_says_so_and_goes_on_when_there_is_room(options, whole, disk, tmp_path):
    """The cache of features, the training state, the model and the record of the run are all on that disk."""
    chance, errors = random.Random(FULL_DISKS), tmp_path / "errors"
    filled = runs = 0
    while filled < FULL_DISKS:
        output, runs = disk / f"run{runs}", runs + 1
        saves = Saves(output)
        arguments = [*options, "--cache", str(disk / f"cache{runs}"), *STAGES, "--workers", "0"]
        arguments += ["--output", str(output), "--resume"]
        for part in range(min(6, FULL_DISKS - filled)):
            process = tiny.start(arguments, errors=errors)
            saves.wait(process, part, chance)
            filler = fill(disk, chance.choice([0, chance.randrange(2**15), chance.randrange(2**24)]))
            process.join(600)
            if process.exitcode == 0:
                break
            printed = errors.read_text().splitlines()
            assert process.exitcode == 1, printed
            assert [line.startswith("error: ") for line in printed[-2:]] == [False, True], printed
            assert "cannot save" in printed[-1] or "no room" in printed[-1]
            assert not any("Traceback" in line for line in printed), printed
            print("filled", filled, saves.count, printed[-1])
            filled += 1
            if (output / "model.safetensors").exists():
                assert load_checkpoint(output).about["training"]["output"] == str(output)
            if (output / state.STATE).exists():
                load_tensors(output / state.STATE)
            assert not [path for folder in disk.iterdir() if folder.is_dir() for path in folder.glob(".*")]
            filler.unlink()
        filler.unlink(missing_ok=True)
        assert main(arguments) == 0
        assert_same_run(output, whole)
        shutil.rmtree(output)


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_run_and_ends_it(options, whole, tmp_path, number):
    output = tmp_path / "run"
    arguments = [*options, *STAGES, "--output", output, "--checkpoint-every", "1000"]
    process = start(arguments)
    while not (output / "history.csv").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    assert "--resume" in process.communicate()[1]
    assert process.returncode == 130
    assert len(history(output)) < 6
    assert main([*options, *STAGES, "--output", str(output), "--resume"]) == 0
    assert_same_run(output, whole)


def test_two_processes_compute_what_one_does(options, tmp_path):
    # A batch of 5 on two processes, and a last batch of 1 image, for which one process has nothing to do.
    flags = [*options, *STAGES, "--dropout", "0", "--batch-size", "11", "--workers", "0"]
    assert main([*flags, "--output", str(tmp_path / "one")]) == 0
    process = start([*flags, "--output", tmp_path / "two"], *TWO_PROCESSES, "training.train")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc only")
def test_memory_that_was_freed_is_used_again():
    """A process gets no new pages for an array of 64 MiB when it has freed one of that size."""
    code = """
import resource
from training.memory import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = bytearray(2**26)
    array[::4096] = bytes(2**14)
    del array
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


KINDS = {
    **{name: ["--attention", name] for name in MECHANISMS},
    "multi_head": ["--attention", "multi_head", "--attention-options", "heads=2"],
    "transformer": ["--decoder", "transformer", "--attention", "multi_head", "--attention-options", "heads=2"],
    "hard transformer": [
        *("--decoder", "transformer", "--attention", "hard"),
        *("--attention-options", "inference=expectation", "--attention-options", "reinforce=0.2"),
    ],
    "encoder self-attention": ["--encoder-self-attention", "1"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_is_trained_by_two_processes_as_by_one(options, tmp_path, root, kind):
    flags = [
        *options,
        *KINDS[kind],
        "--epochs",
        "1",
        "--finetune-epochs",
        "0",
        "--scst-epochs",
        "1",
        "--max-length",
        "8",
    ]
    flags += ["--dropout", "0", "--batch-size", "11", "--heads", "2", "--learning-rate", "1e-2"]
    assert main([*flags, "--output", str(tmp_path / "one")]) == 0
    process = start([*flags, "--output", tmp_path / "two"], *TWO_PROCESSES, "training.train")
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    if "hard" not in kind:  # which draws other regions in another process
        assert_same_run(tmp_path / "two", tmp_path / "one", tolerance=1e-4)

    captioner = Captioner.from_pretrained(tmp_path / "two")
    caption = captioner.caption(root / "Flicker8k_Dataset" / "00.png")
    assert caption.heads == captioner.model.decoder.heads
    for head in range(caption.heads):
        assert np.allclose(caption.maps(head).sum(axis=(1, 2)), 1, atol=1e-5)
        assert caption.heatmap(0, head=head).size == caption.image.size
    assert np.allclose(np.mean([caption.maps(head) for head in range(caption.heads)], axis=0), caption.attention)
    with pytest.raises(IndexError, match=f"no head {caption.heads}"):
        caption.figure(head=caption.heads)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_attention_is_trained_in_bfloat16_as_in_float32(options, tmp_path, kind):
    for precision in ("float32", "bfloat16"):
        flags = [*options, *KINDS[kind], "--epochs", "1", "--finetune-epochs", "0", "--scst-epochs", "1"]
        flags += ["--scst-search", "sample", "--max-length", "8", "--dropout", "0", "--heads", "2"]
        assert main([*flags, "--precision", precision, "--output", str(tmp_path / precision)]) == 0
    one, other = losses(tmp_path / "float32"), losses(tmp_path / "bfloat16")
    assert one != other
    if "hard" not in kind:  # which draws other regions where the weights differ a little
        assert one[0] == pytest.approx(other[0], rel=0.02)  # after it other captions may be drawn


def test_the_models_own_words_take_the_place_of_peoples():
    model = small_model(words=30).train().requires_grad_(False)
    features = torch.randn(40, 6, model.encoder.channels)
    captions = torch.tensor([START, 7, 8, 9, END, PAD]).expand(40, 2, 6)
    for share in (0.0, 0.5, 1.0):
        inputs = objectives.replace_words(captions, model(features, captions), share)
        assert torch.equal(inputs[..., [0, 4, 5]], captions[..., [0, 4, 5]])
        assert (inputs[..., 1:4] >= len(SPECIAL)).all()
        other = (inputs != captions)[..., 1:4].float().mean()
        assert share * 0.75 <= other <= share  # some words drawn are those that stood there


def test_scheduled_sampling_begins_after_the_first_epoch(options, whole, tmp_path):
    flags = [*options, *STAGES, "--scheduled-sampling", "0.5", "--workers", "0", "--output", str(tmp_path / "run")]
    assert main(flags) == 0
    ours, others = losses(tmp_path / "run"), losses(whole)
    assert ours[0] == others[0]
    assert ours[1] != others[1]
    assert ours[3] != others[3]


def test_a_model_that_was_trained_is_where_another_run_may_start(options, whole, root, tmp_path):
    flags = ["--start-from", str(whole), "--scst-epochs", "1", "--epochs", "0", "--finetune-epochs", "0"]
    flags += [
        "--scst-learning-rate",
        "1e-9",
        "--scst-baseline",
        "greedy",
        "--encoder",
        "resnet18",
        "--ema-decay",
        "0.9",
    ]
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 0
    before, after = Captioner.from_pretrained(whole), Captioner.from_pretrained(tmp_path / "run")
    photo = root / "Flicker8k_Dataset" / "03.png"
    assert after.caption(photo).words == before.caption(photo).words
    assert after.model.config == before.model.config
    first = history(tmp_path / "run")[0]
    assert (first["stage"], first["epoch"], first["loss"], first["reward"]) == ("start", "0", "", "")
    assert float(first["CIDEr"]) == pytest.approx(before.about["dev"]["CIDEr"])
    assert losses(tmp_path / "run")[1:] != []
    assert main([*options, *flags, "--output", str(tmp_path / "run"), "--resume"]) == 0
    assert len(history(tmp_path / "run")) == 2


@pytest.mark.parametrize(("later", "kept"), [(0.4, "start"), (0.6, "frozen encoder")])
def test_the_best_of_a_run_is_never_worse_than_the_model_it_started_from(
    options, whole, tmp_path, monkeypatch, later, kept
):
    scores = iter([0.5, later, 0.1])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    flags = ["--start-from", str(whole), "--epochs", "2", "--finetune-epochs", "0"]
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 0
    best = Captioner.from_pretrained(tmp_path / "run")
    assert best.about["dev"]["stage"] == kept
    before, after = (model.state_dict() for model in (Captioner.from_pretrained(whole).model, best.model))
    same = all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert same == (kept == "start")


def test_the_self_critical_stage_begins_with_sharper_attention(options, whole, tmp_path, monkeypatch):
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    flags = ["--start-from", str(whole), "--epochs", "0", "--finetune-epochs", "0", "--scst-epochs", "1"]
    assert main([*options, *flags, "--sharpen", "3", "--output", str(tmp_path / "run")]) == 0
    before, after = (load_checkpoint(path).model.state_dict() for path in (whole, tmp_path / "run"))
    for name, tensor in before.items():
        factor = 3 if name == "decoder.attention.v.weight" else 1
        assert torch.equal(factor * tensor, after[name]), name


def test_a_share_of_the_weights_before_the_self_critical_stage_is_kept(options, whole, tmp_path, monkeypatch):
    flags = ["--start-from", str(whole), "--epochs", "0", "--finetune-epochs", "0", "--scst-epochs", "1"]
    scores = iter([0.1, 0.9] * 2)  # the second model of each run is the best
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    after = {}
    for share in ("1", "0.25"):
        assert main([*options, *flags, "--scst-share", share, "--output", str(tmp_path / share)]) == 0
        after[share] = load_checkpoint(tmp_path / share).model.state_dict()
    before = load_checkpoint(whole).model.state_dict()
    assert not torch.equal(after["1"]["decoder.embedding.weight"], before["decoder.embedding.weight"])
    for name, weights in after["0.25"].items():
        expected = torch.lerp(before[name].double(), after["1"][name].double(), 0.25)
        assert not weights.is_floating_point() or torch.allclose(weights.double(), expected, atol=1e-6), name


@pytest.mark.parametrize(("sharpen", "kept"), [("1", ("frozen encoder", 1)), ("2", ("self-critical", 1))])
def test_the_best_sharper_model_is_kept_though_it_scores_less(options, tmp_path, monkeypatch, sharpen, kept):
    scores = iter([0.9, 0.4, 0.3])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    flags = ["--epochs", "1", "--finetune-epochs", "0", "--scst-epochs", "2", "--sharpen", sharpen]
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 0
    row = Captioner.from_pretrained(tmp_path / "run").about["dev"]
    assert (row["stage"], row["epoch"]) == kept


def test_of_equal_scores_the_model_with_the_higher_bleu_is_kept(options, tmp_path, monkeypatch):
    """As with own captions of a few pictures: the words of all dev pictures are the same, so CIDEr is 0."""
    scores = iter([0.1, 0.9, 0.9, 0.5])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": 0.0, "BLEU-4": next(scores)})
    flags = ["--epochs", "4", "--finetune-epochs", "0", "--output", str(tmp_path / "run")]
    assert main([*options, *flags]) == 0
    assert Captioner.from_pretrained(tmp_path / "run").about["dev"]["epoch"] == 2


def test_of_equal_scores_the_earliest_model_is_kept(options, tmp_path, monkeypatch):
    scores = iter([0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    flags = ["--epochs", "4", "--finetune-epochs", "0", "--output", str(tmp_path / "run")]
    assert main([*options, *flags]) == 0
    assert Captioner.from_pretrained(tmp_path / "run").about["dev"]["epoch"] == 2


@pytest.mark.parametrize("kind", ["additive", "hard", "hard transformer", "encoder self-attention"])
def test_captions_are_learnt_by_the_network_that_drew_them(options, tmp_path, monkeypatch, kind):
    """Without dropout, and from the regions that were drawn for them, in both passes alike."""
    drawn, checked = [], []
    search, loss = self_critical.sample, self_critical.self_critical_loss

    def remembered(*arguments, **flags):
        drawn.append(search(*arguments, **flags))
        return drawn[-1]

    def compared(output, *rest):
        found = drawn[-1]
        order = found.lengths.argsort(dim=1, descending=True)
        log_probabilities = gather_rows(found.log_probabilities, order)[..., 1:]  # the first word is never the end
        steps = log_probabilities.shape[2]
        again = output.log_probabilities(excluded=(PAD, START, UNKNOWN))[..., 1 : 1 + steps]
        assert torch.allclose(again, log_probabilities, atol=1e-4)
        checked.append((output.choice_log_probability is not None, found.drawn is not None))
        return loss(output, *rest)

    monkeypatch.setattr(self_critical, "sample", remembered)
    monkeypatch.setattr(self_critical, "self_critical_loss", compared)
    flags = [*options, *KINDS[kind], "--epochs", "0", "--finetune-epochs", "0", "--scst-epochs", "1", "--heads", "2"]
    flags += ["--scst-search", "sample", "--dropout", "0.5", "--max-length", "8", "--scst-learning-rate", "1e-2"]
    flags += ["--composed", "0.4", "--scst-baseline", "greedy"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 0
    assert checked == 3 * [(kind.startswith("hard"), kind.startswith("hard"))]


def test_rewarded_captions_earn_more(options, whole, tmp_path):
    flags = ["--start-from", str(whole), "--scst-epochs", "25", "--epochs", "0", "--finetune-epochs", "0"]
    flags += ["--scst-search", "sample", "--scst-samples", "16", "--scst-learning-rate", "5e-3", "--max-length", "8"]
    flags += ["--dropout", "0", "--patience", "99", "--ema-decay", "0.5", "--batch-size", "6"]
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 0
    rewards = [float(row["reward"]) for row in history(tmp_path / "run")[1:]]
    assert np.mean(rewards[-5:]) > 1.5 * np.mean(rewards[:2])


def test_a_run_is_never_overwritten_by_accident(options, whole, capsys):
    before = (whole / state.STATE).read_bytes()
    assert main([*options, *STAGES, "--output", str(whole)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert (whole / state.STATE).read_bytes() == before


def test_a_run_does_not_go_on_with_other_options(options, whole, capsys):
    assert main([*options, *STAGES, "--output", str(whole), "--resume", "--hidden-size", "20"]) == 1
    assert "hidden_size was 16 and is 20" in capsys.readouterr().err


def test_a_run_from_before_an_option_was_there_goes_on(options, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / state.STATE
    tensors, metadata = load_tensors(path)
    config = json.loads(metadata["config"])
    del config["scheduled_sampling"]
    save_tensors(path, tensors, metadata | {"config": json.dumps(config)})
    flags = [*options, *STAGES, "--output", str(tmp_path / "run"), "--resume"]
    assert main(flags) == 0
    assert main([*flags, "--scheduled-sampling", "0.5"]) == 1


def test_resuming_a_finished_run_changes_nothing(options, whole):
    before = losses(whole)
    assert main([*options, *STAGES, "--output", str(whole), "--resume"]) == 0
    assert losses(whole) == before


def test_a_damaged_training_state_is_refused_by_name(options, whole, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / state.STATE).write_bytes((whole / state.STATE).read_bytes()[:5000])
    assert main([*options, *STAGES, "--output", str(output), "--resume"]) == 1
    assert state.STATE in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(options, tmp_path, monkeypatch, capsys):
    calls = []
    real = objectives.caption_loss

    def fails_later(*arguments):
        calls.append(1)
        return real(*arguments) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(objectives, "caption_loss", fails_later)
    output = tmp_path / "run"
    assert main([*options, *STAGES, "--output", str(output)]) == 1
    message = capsys.readouterr().err
    assert "loss is nan" in message
    assert ".png" in message
    monkeypatch.undo()
    assert all(torch.isfinite(tensor).all() for tensor in load_file(output / state.STATE).values())
    assert main([*options, *STAGES, "--output", str(output), "--resume"]) == 0


@pytest.mark.parametrize(("epochs", "every"), [(0, 1), (1, 1), (4, 1), (2, 1000), (4, 1000)])
def test_a_full_disk_is_one_clear_error_and_the_state_before_is_whole(
    options, whole, tmp_path, monkeypatch, capsys, epochs, every
):
    """The disk is full as the state is saved after so many epochs; with 4 the new model is saved by then."""
    failed = []
    real = state.save_tensors

    def full_later(path, tensors, metadata):
        if len(json.loads(metadata["progress"])["history"]) == epochs + 1 and not failed:
            failed.append(path)
            path.write_bytes(b"half of a")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(state, "save_tensors", full_later)
    output = tmp_path / "run"
    arguments = [*options, *STAGES, "--checkpoint-every", str(every), "--output", str(output)]
    assert main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(output, whole)


@pytest.mark.parametrize("part", ["step", "epoch", "close"])
def test_a_full_disk_for_the_record_of_a_run_is_one_clear_error(options, whole, tmp_path, monkeypatch, capsys, part):
    calls = []
    real = getattr(History, part)

    def full_later(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if part == "close" else 2):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(History, part, full_later)
    output = tmp_path / "run"
    arguments = [*options, *STAGES, "--output", str(output)]
    assert main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: cannot save the run in {output}: No space left on device; ")
    assert main([*arguments, "--resume"]) == 0
    assert_same_run(output, whole)


def test_a_stage_ends_when_the_score_no_longer_rises(options, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0])
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": next(scores), "BLEU-4": 0.0})
    flags = ["--epochs", "8", "--finetune-epochs", "0", "--patience", "2"]
    assert main([*options, *flags, "--output", str(tmp_path / "run")]) == 0
    assert len(history(tmp_path / "run")) == 4


def test_images_that_cannot_be_read_are_reported_and_passed_over(options, tmp_path, capsys):
    broken = tiny.draw(tmp_path / "data")
    for name in ("03.png", "13.png"):
        path = broken / "Flicker8k_Dataset" / name
        path.write_bytes(path.read_bytes()[:60])
    flags = ["--data", f"flickr8k={broken}", *options[2:], "--epochs", "1", "--finetune-epochs", "0"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 0
    message = capsys.readouterr().err
    assert "03.png" in message
    assert "13.png" in message
    assert "11 training images, 5 dev images" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "coco=/no/such/root"], "/no/such/root"),
        (["--encoder", "mobilenet_v9"], "mobilenet_v9"),
        (["--encoder-weights", "nothing.pth"], "nothing.pth"),
        (["--encoder-self-attention", "1", "--heads", "3"], "size 16 cannot be divided into 3 heads"),
        (["--attention-options", "heads=2"], "attention 'additive' has no option 'heads'"),
        (["--attention", "multi_head", "--attention-options", "heads=3"], "cannot be divided into 3 heads"),
        (["--start-from", "/no/such/model"], "/no/such/model"),
        (["--device", "quantum"], "quantum"),
        (["--epochs", "0", "--finetune-from", "layer9"], "layer9"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(options, tmp_path, capsys, arguments, message):
    assert main([*options, "--output", str(tmp_path / "run"), *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


def test_features_are_computed_once_and_again_when_anything_that_decides_them_changes(
    root, weights, tmp_path, monkeypatch
):
    items = read_dataset("flickr8k", root).splits["dev"]
    encoder = Encoder(grid=(2, 2), weights=weights)
    preprocessing = Preprocessing(size=(64, 64))
    photographs = ImageSource(items, preprocessing, augment=False)
    features = cached_maps(encoder, photographs, tmp_path, ALONE, batch_size=4)
    with torch.no_grad():
        exact = encoder(torch.from_numpy(preprocessing([Image.open(item.path) for item in items])))
    assert np.allclose(features, exact.numpy(), rtol=2e-3, atol=1e-3)

    calls = []
    monkeypatch.setattr(type(encoder), "forward", lambda *_: calls.append(1))
    again = cached_maps(encoder, photographs, tmp_path, ALONE)
    assert not calls
    assert np.array_equal(again, features)
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]

    augmented = [ImageSource(items, preprocessing, augment=True, seed=seed) for seed in (0, 1)]
    keys = [
        features_key(encoder, photographs),
        features_key(encoder, ImageSource(items[1:], preprocessing, augment=False)),
        features_key(encoder, ImageSource(items, Preprocessing(size=(64, 32)), augment=False)),
        *(features_key(encoder, source, view) for source in augmented for view in (1, 2)),
    ]
    with torch.no_grad():
        next(encoder.parameters()).add_(1e-3)
    keys.append(features_key(encoder, photographs))
    for block in ("features.17", "features.18"):
        encoder.split(block)
        keys.append(features_key(encoder, photographs, below=True))
    assert len(set(keys)) == len(keys)


def test_an_interrupted_computation_of_features_is_not_taken_for_a_whole_one(root, weights, tmp_path, monkeypatch):
    items = read_dataset("flickr8k", root).splits["dev"]
    encoder = Encoder(grid=(2, 2), weights=weights)
    real, calls = type(encoder).forward, []

    def fails_later(self, images):
        calls.append(1)
        if len(calls) == 3:  # one blank image tells the shape
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(type(encoder), "forward", fails_later)
    photographs = ImageSource(items, Preprocessing(size=(64, 64)), augment=False)
    with pytest.raises(KeyboardInterrupt):
        cached_maps(encoder, photographs, tmp_path, ALONE, batch_size=2)
    assert not list(tmp_path.iterdir())
    features = cached_maps(encoder, photographs, tmp_path, ALONE, batch_size=2)
    assert (np.abs(features).sum(axis=(1, 2)) > 0).all()
    assert len(calls) == 3 + 4


def test_two_runs_at_once_fill_the_same_cache(root, weights, tmp_path, monkeypatch):
    items = read_dataset("flickr8k", root).splits["dev"]
    photographs = ImageSource(items, Preprocessing(size=(64, 64)), augment=False)
    reserve, both = features.reserve, threading.Barrier(2)

    def together(*arguments):
        reserved = reserve(*arguments)
        both.wait(timeout=60)  # each has begun to write before one goes on
        return reserved

    monkeypatch.setattr(features, "reserve", together)
    encoders = [Encoder(grid=(2, 2), weights=weights) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda encoder: cached_maps(encoder, photographs, tmp_path, ALONE), encoders))
    with torch.no_grad():
        exact = encoders[0](photographs.load(range(len(items)), 0)).numpy()
    for each in found:
        assert np.allclose(each, exact, rtol=2e-3, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == [f"features-{features_key(encoders[0], photographs)}.npy"]


def test_a_run_killed_as_it_fills_the_cache_leaves_nothing_that_the_next_one_keeps(options, root, tmp_path):
    flags = [*options, "--epochs", "1", "--finetune-epochs", "0", "--workers", "0", "--cache", str(tmp_path / "cache")]
    process = tiny.start([*flags, "--output", str(tmp_path / "one")], killed_at_image=7)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".features-")
    assert main([*flags, "--output", str(tmp_path / "one")]) == 0
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 2
    assert all(name.startswith("features-") for name in names)
    assert main([*flags, "--cache", str(tmp_path / "other"), "--output", str(tmp_path / "two")]) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_a_full_disk_is_reported_before_anything_is_computed(root, weights, tmp_path, monkeypatch):
    items = read_dataset("flickr8k", root).splits["dev"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    photographs = ImageSource(items, Preprocessing(size=(64, 64)), augment=False)
    with pytest.raises(OSError, match=r"no room for .* GB of cached features"):
        cached_maps(Encoder(grid=(2, 2), weights=weights), photographs, tmp_path, ALONE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pages", [0, 1, 8, 15, 16, 20])
def test_the_cache_has_all_its_room_or_none_of_it(root, weights, disk, monkeypatch, pages):
    """It takes 16 pages of 4 KiB; afterwards the disk is filled by something else."""
    items = read_dataset("flickr8k", root).splits["dev"]
    encoder = Encoder(grid=(2, 2), weights=weights)
    photographs = ImageSource(items, Preprocessing(size=(64, 64)), augment=False)
    (disk / "cache").mkdir()
    filler = fill(disk, 4096 * pages)
    reserve = features.reserve

    def and_fill(*arguments):
        file = reserve(*arguments)
        fill(disk, 0, "rest")
        return file

    monkeypatch.setattr(features, "reserve", and_fill)
    if pages < 16:
        with pytest.raises(OSError, match=r"no room for .* GB of cached features"):
            cached_maps(encoder, photographs, disk / "cache", ALONE, batch_size=2)
        assert not list((disk / "cache").iterdir())
        filler.unlink()
    found = cached_maps(encoder, photographs, disk / "cache", ALONE, batch_size=2)
    with torch.no_grad():
        exact = encoder(photographs.load(range(len(items)), 0)).numpy()
    assert np.allclose(found, exact, rtol=2e-3, atol=1e-3)


def test_the_maps_below_the_tuned_blocks_give_the_same_annotation_vectors(root, weights, tmp_path):
    items = read_dataset("flickr8k", root).splits["dev"]
    encoder = Encoder(grid=(2, 2), weights=weights)
    encoder.split("features.17")
    source = ImageSource(items, Preprocessing(size=(64, 64)), augment=True)
    views = MapSource([cached_maps(encoder, source, tmp_path, ALONE, view, below=True) for view in (0, 1)])
    with torch.no_grad():
        for epoch in range(4):
            exact = encoder(source.load([2, 0], epoch % 2))
            assert torch.allclose(encoder(views.load([2, 0], epoch)), exact, rtol=1e-2, atol=1e-2)


def test_a_bound_on_entropy_makes_attention_narrower(options, tmp_path, monkeypatch):
    scores = iter(range(100))  # the last model is the best
    monkeypatch.setattr(validation, "quick_scores", lambda *_: {"CIDEr": float(next(scores)), "BLEU-4": 0.0})
    entropy = {}
    flags = ["--epochs", "0", "--finetune-epochs", "10", "--finetune-learning-rate", "1e-2"]
    for bound in ("1", "0.3"):
        output = tmp_path / bound
        assert main([*options, *flags, "--attention-entropy", bound, "--output", str(output)]) == 0
        model = load_checkpoint(output).model.eval()
        with torch.no_grad():
            alpha = model(torch.rand(4, 3, 64, 64), torch.tensor([[[START, 4, 5, END]]] * 4)).alpha
        entropy[bound] = float(torch.special.entr(alpha).sum(dim=-1).mean()) / math.log(alpha.shape[-1])
    assert entropy["0.3"] < entropy["1"] - 0.02


def test_the_real_data_set_is_read_and_its_photographs_train(flickr8k, weights, tmp_path):
    dataset = read_dataset("flickr8k", flickr8k)
    assert [len(dataset.splits[name]) for name in ("train", "dev")] == [6000, 1000]
    small = tmp_path / "part"
    (small / "Flickr8k_text").mkdir(parents=True)
    (small / "Flicker8k_Dataset").symlink_to(flickr8k / "Flicker8k_Dataset")
    text = flickr8k / "Flickr8k_text"
    (small / "Flickr8k_text" / "Flickr8k.token.txt").symlink_to(text / "Flickr8k.token.txt")
    for split in ("train", "dev"):
        name = f"Flickr_8k.{split}Images.txt"
        (small / "Flickr8k_text" / name).write_text("\n".join((text / name).read_text().split()[:16]) + "\n")
    flags = ["--data", f"flickr8k={small}", "--cache", str(tmp_path), "--epochs", "2", "--finetune-epochs", "1"]
    flags += ["--encoder-weights", str(weights)]
    assert main([*tiny.SMALL, *flags, "--output", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run")[1] < losses(tmp_path / "run")[0]


def test_the_recipe_for_coco_runs_as_it_is(tmp_path):
    """Its own sizes and all three stages, on four drawn pictures, with random weights and one epoch each.

    Graphs for ONNX Runtime are left out: they take half a minute, and are tested with smaller networks.
    """
    (tmp_path / "annotations").mkdir()
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        folder = tmp_path / f"{split}2014"
        folder.mkdir()
        for number in numbers:
            Image.new("RGB", (64, 48), (40 * number, 200 - 40 * number, 90)).save(folder / f"{number}.jpg")
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
        captions = [
            {"id": 9 * n + k, "image_id": n, "caption": f"{k} pictures of colour {'abcdef'[n]}."}
            for n in numbers
            for k in range(5)
        ]
        annotations = json.dumps({"images": images, "annotations": captions})
        (tmp_path / "annotations" / f"captions_{split}2014.json").write_text(annotations)
    weights = tiny.encoder_weights(tmp_path / "resnet101.safetensors", "resnet101")
    flags = ["--config", str(PROJECT / "training" / "recipes" / "coco_resnet101.toml"), "--data", f"coco={tmp_path}"]
    flags += ["--encoder-weights", str(weights), "--cache", str(tmp_path / "cache"), "--no-compile", "--workers", "0"]
    flags += ["--epochs", "1", "--finetune-epochs", "1", "--scst-epochs", "1", "--device", "cpu", "--no-export"]
    assert main([*flags, "--output", str(tmp_path / "run")]) == 0
    assert [row["stage"] for row in history(tmp_path / "run")] == ["frozen encoder", "fine-tuning", "self-critical"]
    caption = Captioner.from_pretrained(tmp_path / "run").caption(tmp_path / "val2014" / "4.jpg")
    assert caption.attention.shape[1:] == (14, 14)
