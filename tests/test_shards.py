"""Shards hold what the data set holds, and training from them computes what training from files does."""

import functools
import http.server
import io
import itertools
import json
import os
import tarfile
import threading

import pytest
import tiny
import torch
from PIL import Image
from test_training import assert_same_run, losses

from captioner.images import load_image
from training import shard, trainer
from training.data import shards as reader
from training.data.batches import EpochBatches, epoch_order, file_numbers
from training.data.items import DatasetError
from training.data.sources import read_sources, shard_source, source_name
from training.distributed import Distributed
from training.train import main

STAGES = """--epochs 1 --finetune-epochs 2 --scst-epochs 1 --finetune-from features.17 --scst-encoder-learning-rate 1e-5
--scst-samples 3 --max-length 8 --checkpoint-every 1 --workers 0""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data sets, their shards, and weights for an encoder."""
    folder = tmp_path_factory.mktemp("shards")
    tiny.draw(folder / "a", train=7, dev=3)
    tiny.draw_karpathy(folder / "b", train=4, dev=2)
    tiny.encoder_weights(folder / "mobilenet_v2.safetensors")
    flags = [*files(folder), "--images", "3", "--output", str(folder / "shards"), "--cache", str(folder / "cache")]
    assert shard.main(flags) == 0
    return folder


def files(folder):
    return ["--data", f"flickr8k={folder / 'a'}", "--data", f"coco={folder / 'b'}"]


@pytest.fixture(scope="module")
def options(folder):
    weights = ["--encoder-weights", str(folder / "mobilenet_v2.safetensors")]
    return [*weights, "--cache", str(folder / "cache"), *tiny.SMALL, *STAGES, "--data-weight", "coco=2"]


@pytest.fixture(scope="module")
def run(folder, options, tmp_path_factory):
    """A run on the files."""
    output = tmp_path_factory.mktemp("files") / "run"
    assert main([*files(folder), *options, "--output", str(output)]) == 0
    return output


@pytest.fixture
def server(folder):
    """The shards over http, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder / "shards"))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def read(source, cache):
    return read_sources([source], str(cache))


def picture(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    """A shard as another program may write it."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_shards_hold_the_images_as_they_are_with_their_captions_and_splits(folder, tmp_path):
    assert sorted(os.listdir(folder / "shards")) == [
        *("dev-000.tar", "dev-001.tar", "train-000.tar", "train-001.tar", "train-002.tar", "train-003.tar")
    ]
    there = read(f"{folder}/shards/*.tar", tmp_path)
    before = read_sources(files(folder)[1::2])
    assert [dataset.name for dataset in there] == ["flickr8k", "coco"]
    for ours, theirs in zip(there, before, strict=True):
        assert ours.problems == ()
        for split, items in theirs.splits.items():
            for one, other in zip(ours.splits[split], items, strict=True):
                assert (one.name, one.captions, one.dataset) == (other.name, other.captions, other.dataset)
                assert one.source() == other.path.read_bytes()
    assert len({item.key for dataset in there for items in dataset.splits.values() for item in items}) == 16


def test_the_same_data_give_the_same_bytes_and_webdataset_reads_them(folder, tmp_path):
    assert shard.main([*files(folder), "--images", "3", "--output", str(tmp_path / "again")]) == 0
    for path in sorted((folder / "shards").iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    from webdataset import WebDataset

    found = list(WebDataset(f"{folder}/shards/train-{{000..003}}.tar", shardshuffle=False))
    assert [json.loads(sample["json"])["name"] for sample in found] == [
        *(f"{number:02d}.png" for number in range(7)),
        *(f"{number}.png" for number in range(4)),
    ]
    assert len({sample["__key__"] for sample in found}) == 11
    assert load_image(found[0]["png"]).size == (80, 60)


def test_shards_may_be_made_of_shards(folder, tmp_path):
    flags = ["--data", f"{folder}/shards/*.tar", "--images", "100", "--cache", str(tmp_path)]
    assert shard.main([*flags, "--output", str(tmp_path / "large")]) == 0
    assert sorted(os.listdir(tmp_path / "large")) == ["dev-000.tar", "train-000.tar"]
    for one, other in zip(
        read(f"{tmp_path}/large/*.tar", tmp_path), read(f"{folder}/shards/*.tar", tmp_path), strict=True
    ):
        assert [item.source() for item in one.splits["train"]] == [item.source() for item in other.splits["train"]]


def test_shards_are_written_whole_or_not_at_all_and_what_was_interrupted_goes_on(folder, tmp_path, monkeypatch):
    real, written = shard.write_shard, []

    def fails(path, name, items):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(name)
        real(path, name, items)

    flags = [*files(folder), "--images", "3", "--output", str(tmp_path / "shards")]
    monkeypatch.setattr(shard, "write_shard", fails)
    assert shard.main(flags) == 1
    assert not (tmp_path / "shards").exists()
    (hidden,) = tmp_path.iterdir()
    (hidden / ".train-003.tar.abcdef01").touch()  # as a killed process leaves it
    monkeypatch.setattr(shard, "write_shard", lambda *arguments: written.append(arguments[1]) or real(*arguments))
    assert shard.main(flags) == 0
    assert len(written) == len(set(written)) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert sorted(os.listdir(tmp_path / "shards")) == sorted(os.listdir(folder / "shards"))


def test_a_folder_with_files_is_not_written_to(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert shard.main([*files(folder), "--output", str(tmp_path)]) == 1
    assert f"{tmp_path} exists already; give a new folder by --output" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.parametrize("kind", ["local", "http", "pipe"])
def test_training_from_shards_computes_what_training_from_files_does(folder, options, run, tmp_path, server, kind):
    address, asked = server
    cache = tmp_path / "cache"
    data = {
        "local": ["--data", f"{folder}/shards/train-{{000..003}}.tar", "--data", f"{folder}/shards/dev-*.tar"],
        "http": ["--data", f"{address}/{{train-00{{0..3}},dev-00{{0..1}}}}.tar"],
        "pipe": ["--data", f"pipe:cat {folder}/shards/{{train-00{{0..3}},dev-00{{0..1}}}}.tar"],
    }[kind]
    flags = [*data, *options, "--cache", str(cache), "--output", str(tmp_path / "run")]
    assert main(flags) == 0
    assert_same_run(tmp_path / "run", run)
    assert losses(run)
    if kind == "http":
        copies = sorted(path.name.partition("-")[2] for path in (cache / "shards").glob("*.tar"))
        assert copies == sorted(os.listdir(folder / "shards"))
        assert main([*flags, "--resume"]) == 0
        assert len(asked) == 6


def test_a_run_on_shards_goes_on_at_the_image_where_it_stopped(folder, options, run, tmp_path, monkeypatch):
    flags = ["--data", f"{folder}/shards/*.tar", *options, "--output", str(tmp_path / "run"), "--resume"]
    step, steps = trainer.Trainer.step, []

    def step_and_stop(self, *arguments):
        steps.append(1)
        self.stop.received = len(steps) in (2, 5, 8)
        return step(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "step", step_and_stop)
    assert [main(flags) for _ in range(4)] == [130, 130, 130, 0]
    assert_same_run(tmp_path / "run", run)


class Reads:
    """Gives images as their indices."""

    def load(self, indices, epoch):
        return torch.tensor(list(indices))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_read_once_an_epoch_on_any_number_of_ranks(size, workers, monkeypatch):
    count, batch_size = 103, 8
    files = [number // 10 for number in range(count)]
    monkeypatch.setattr(epoch_order, "__defaults__", (None, 25))
    for epoch in range(2):
        shares = [
            EpochBatches(Reads(), [[[1, 2]]] * count, batch_size, 0, epoch, rank, size, None, files)
            for rank in range(size)
        ]
        loaded = [
            [int(index) for batch in share.loader(0, workers, False) if batch.weight for index in batch.images]
            for share in shares
        ]
        assert sorted(itertools.chain(*loaded)) == list(range(count))
        resumed = [int(index) for batch in shares[0].loader(5, workers, False) for index in batch.images]
        assert loaded[0][-len(resumed) :] == resumed


def test_images_of_many_shards_are_shuffled_a_buffer_at_a_time():
    count, size, buffer = 1000, 50, 100
    files = [number // size for number in range(count)]

    def order(seed):
        return epoch_order(count, torch.Generator().manual_seed(seed), files, buffer)

    found = order(1)
    assert sorted(found) == list(range(count))
    assert found == order(1)
    assert found != order(2)
    for start in range(0, count, buffer):
        block = found[start : start + buffer]
        assert len({files[index] for index in block}) == 2
        assert block != sorted(block)
        assert len({files[index] for index in block[:20]}) == 2  # both shards are mixed
    assert [files[index] for index in found[::buffer]] != sorted(files[index] for index in found[::buffer])


def test_few_images_in_shards_come_in_the_order_of_files(folder, tmp_path):
    items = [item for dataset in read(f"{folder}/shards/*.tar", tmp_path) for item in dataset.splits["train"]]
    assert file_numbers(items) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    orders = [epoch_order(11, torch.Generator().manual_seed(0), files) for files in (None, file_numbers(items))]
    assert orders[0] == orders[1]
    assert file_numbers(read_sources(files(folder)[1::2])[0].splits["train"]) is None


def test_shards_of_other_programs_are_read(tmp_path):
    members = {
        "000.jpg": picture("red"),
        "000.json": b'{"caption": "a red  picture", "status": "success"}',
        "001.txt": b"a blue picture\n\nblue\n",
        "001.png": picture("blue"),
        "sub/002.input.PNG": picture("green"),
        "sub/002.json": b'{"captions": ["green", "..."], "split": "validation", "name": "green.png"}',
    }
    write_tar(tmp_path / "00000.tar", members)
    write_tar(tmp_path / "val-0.tar", {"a.png": picture(), "a.txt": b"dev"})
    write_tar(tmp_path / "Validation_0.tar", {"a.png": picture(), "a.txt": b"dev"})
    write_tar(tmp_path / "trainers.tar", {"a.png": picture(), "a.txt": b"no split in this name"})
    (dataset,) = read(f"{tmp_path}/*.tar", tmp_path / "cache")
    assert dataset.problems == ()
    assert dataset.name == reader.UNNAMED
    assert [(item.name, item.captions) for item in dataset.splits["train"]] == [
        ("000.jpg", ("a red picture",)),
        ("001.png", ("a blue picture", "blue")),
        ("a.png", ("no split in this name",)),
    ]
    assert [item.captions for item in dataset.splits["dev"]] == [("green",), ("dev",), ("dev",)]
    (named,) = read(f"mine={tmp_path}/*.tar", tmp_path / "cache")
    assert {item.dataset for item in named.splits["train"]} == {"mine"}


def test_what_cannot_be_used_in_a_shard_is_named_and_skipped(tmp_path):
    members = {
        "good.png": picture(),
        "good.txt": b"a good one",
        "broken.png": picture()[:40],
        "broken.txt": b"a broken one",
        "silent.png": picture(),
        "blind.txt": b"no image",
        "odd.png": picture(),
        "odd.json": b"{",
        "list.png": picture(),
        "list.json": b"[1]",
        "number.png": picture(),
        "number.json": b'{"captions": [1]}',
        "split.png": picture(),
        "split.json": b'{"captions": ["a"], "split": "left"}',
        "type.png": picture(),
        "type.json": b'{"captions": ["a"], "split": ["dev"]}',
        "half.png": picture(),
        "half.json": b'{"captions": ["a \\ud800"]}',
        "binary.png": picture(),
        "binary.txt": b"\xff",
    }
    path = write_tar(tmp_path / "train.tar", members)
    (dataset,) = read(str(path), tmp_path / "cache")
    assert [item.name for item in dataset.splits["train"]] == ["good.png"]
    for name, problem in {
        "broken.png": "is not an image that can be read",
        "silent": "it has no caption",
        "blind": "it has no image",
        "odd": "Expecting property name",
        "list": "should hold an object",
        "number": "a string or a list of strings",
        "split": "its split 'left' is unknown",
        "type": "should be strings",
        "half": "surrogates not allowed",
        "binary": "can't decode byte",
    }.items():
        (found,) = (line for line in dataset.problems if line.startswith(f"{path}: {name}"))
        assert problem in found


@pytest.mark.parametrize(("member", "after", "usable"), [(4, 0, 2), (4, 20, 2), (4, 600, 2), (3, 550, 1)])
def test_the_images_before_the_damage_of_a_shard_are_used(folder, tmp_path, member, after, usable):
    """The shard is cut off some bytes after one of its files begins; image and captions are files by turns."""
    shard = folder / "shards" / "train-000.tar"
    whole, path = shard.read_bytes(), tmp_path / "train.tar"
    with tarfile.open(shard) as tar:
        path.write_bytes(whole[: tar.getmembers()[member].offset + after])
    (dataset,) = read(str(path), tmp_path / "cache")
    assert len(dataset.splits["train"]) == usable
    assert any(line.startswith(f"{path}: the shard") for line in dataset.problems)
    path.write_bytes(whole)  # a changed shard is indexed again
    (dataset,) = read(str(path), tmp_path / "cache")
    assert len(dataset.splits["train"]) == 3
    assert dataset.problems == ()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{folder}/shards/train-{{000..009}}.tar", "there is no shard .*train-004.tar"),
        ("{folder}/none-*.tar", "there is no shard .*none-"),
        ("{folder}/shards/train-{{000..003.tar", "names no shards"),
        ("{folder}/shards/train-00{{0,0}}.tar", "train-000.tar is named twice"),
        ("{folder}/empty.tar", "no image in the shards .*empty.tar can be used: .*damaged"),
        ("http://127.0.0.1:{port}/none.tar", "cannot fetch the shard .*none.tar: .*404"),
        ("s3://bucket/train.tar", "cannot fetch the shard s3://bucket/train.tar: .*no gopen handler"),
        ("pipe:cat {folder}/none.tar", "the command of the shard pipe:cat .* failed"),
        ("pipe:head -c 3000 {folder}/shards/train-000.tar", "is not a whole tar file; its copy was removed"),
    ],
)
def test_shards_that_cannot_be_read_are_one_clear_error(folder, tmp_path, server, source, message):
    (folder / "empty.tar").touch()
    port = server[0].rpartition(":")[2]
    with pytest.raises(DatasetError, match=message):
        read(source.format(folder=folder, port=port), tmp_path)
    assert not list(tmp_path.glob("**/*.tar"))


def test_the_processes_of_a_machine_share_the_indexing(folder, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(reader, "index_file", lambda address, _: made.append(address))
    monkeypatch.setattr(Distributed, "barrier", lambda self: (_ for _ in ()).throw(StopIteration))
    for rank in range(3):
        processes = Distributed(rank, 6, torch.device("cpu"), rank, 3)
        with pytest.raises((StopIteration, RuntimeError)):
            read_sources([f"{folder}/shards/*.tar"], str(tmp_path), processes)
    assert sorted(made) == sorted(map(str, (folder / "shards").iterdir()))


@pytest.mark.parametrize(
    ("source", "name", "place"),
    [
        ("shards/train-{000..127}.tar", "", "shards/train-{000..127}.tar"),
        ("mine=shards/*.tar", "mine", "shards/*.tar"),
        ("https://host/a.tar?x=1", "", "https://host/a.tar?x=1"),
        ("a.b-c=https://host/a.tar", "a.b-c", "https://host/a.tar"),
        (
            "pipe:aws --profile=me s3 cp s3://b/train-{0..9}.tar -",
            "",
            "pipe:aws --profile=me s3 cp s3://b/train-{0..9}.tar -",
        ),
    ],
)
def test_a_source_in_shards_is_a_name_and_a_place(source, name, place):
    assert shard_source(source) == (name, place)
    assert source_name(source) == name
    assert shard_source("flickr8k=data/flickr8k") is None
    assert reader.file_name("pipe:aws s3 cp s3://b/train-{0..9}.tar -") == "train-{0..9}.tar"
