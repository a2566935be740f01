"""Shards on a Ray cluster of two workers and shared by processes: the results are those of the command."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_bulk import picture, rows, run, write_shard, write_tar

from captioner import Captioner, bulk, cli
from captioner import ray as captioner_ray
from captioner.modelfile import MODEL_FILE, read_model, save_model
from captioner.pretrained import model_folders
from captioner.ray import ATTEMPTS, CaptionShards
from training.bulk import main

# A model of the package: its engine is light, so that workers start in a few seconds.
OPTIONS = ["--model", "small", "--beam-size", "2", "--max-length", "4"]


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    before = dict(os.environ)
    # Workers import this checkout, and have the processor as much as other processes.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


def writer_of(path: Path) -> int | None:
    """The process that has a file open, other than this one."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(path) and int(link.parts[2]) != os.getpid():
                return int(link.parts[2])
        except OSError:
            continue  # it has ended
    return None


def kill_a_worker(output: Path, killed: list[int]) -> None:
    """Kill the first worker that is seen to write captions; its process is appended to `killed`."""
    end = time.monotonic() + 120
    while not killed and time.monotonic() < end:
        for temporary in output.glob(".*.parquet.*"):
            if process := writer_of(temporary):
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                return
        time.sleep(0.02)


def test_a_cluster_gives_what_the_command_gives_though_a_worker_is_killed(cluster, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the workers: sums in another order differ in the last digit
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    shards = [write_shard(tmp_path / f"{n}.tar", range(8 * n, 8 * n + 8)) for n in range(5)]
    write_tar(shards[3], [("good.png", picture(1)), ("bad.png", b"damaged")])
    shards[4].write_bytes(shards[4].read_bytes()[:-12000])
    shards = [*map(str, shards)]
    monkeypatch.chdir(tmp_path)  # not the folder of the workers, to which relative paths are given all the same
    names = [os.path.basename(shard) for shard in shards]
    output, expected = tmp_path / "ray", tmp_path / "command"
    output.mkdir()
    (output / "1.parquet").write_text("done before")
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(output, killed))
    killer.start()
    assert main(["--input", *names, "--output", "ray", "--engine", "ray", *OPTIONS]) == 1
    killer.join()
    assert killed
    err = capsys.readouterr().err
    assert f"{names[3]}: 1 of 2 pictures could not be captioned" in err
    assert f"{shards[4]} is damaged or cut short" in err
    assert sorted(os.listdir(output)) == ["0.parquet", "1.parquet", "2.parquet", "3.parquet"]
    assert (output / "1.parquet").read_text() == "done before"
    cli.main([*shards, "--output", str(expected), "--format", "parquet", *OPTIONS, "--batch-size", "32"])
    for number in (0, 2, 3):
        found = parquet.read_table(output / f"{number}.parquet").to_pylist()
        assert found == parquet.read_table(expected / f"{number}.parquet").to_pylist()
    # Nothing is left to do but the damaged shard.
    assert main(["--input", *names[:4], "--output", "ray", "--engine", "ray", *OPTIONS]) == 0


def test_captions_are_columns_of_a_dataset(cluster, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="Ray Data needs pyarrow")
    pictures = [picture(n) for n in range(9)]
    (tmp_path / "0.png").write_bytes(pictures[0])
    values = [{"bytes": None, "path": str(tmp_path / "0.png")}, *({"bytes": data} for data in pictures[1:])]
    table = arrow.table({"number": list(range(11)), "photo": [*values, {"bytes": b"damaged"}, None]})
    dataset = cluster.data.from_arrow(table)
    options = {"beam_size": 2, "max_length": 4}
    # Without matrices in 8 bits: then a number hardly depends on what is computed together.
    description, weights = read_model(model_folders()["small"] / MODEL_FILE)
    exact = tmp_path / "model" / MODEL_FILE
    exact.parent.mkdir()
    save_model(exact, replace(description, graphs=description.graphs._replace(quantized_step=None)), weights)
    found = captioner_ray.caption_dataset(dataset, "photo", model=str(exact), workers=2, **options).take_all()
    found = {row["number"]: row for row in found}
    expected = Captioner.from_pretrained(exact).caption(pictures, **options)
    for number, caption in enumerate(expected):
        row = found[number]
        assert row["error"] is None
        assert row["caption"] == str(caption)
        assert row["log_probability"] == pytest.approx(caption.log_probability, abs=1e-5)
        assert [word["word"] for word in row["words"]] == list(caption.words)
        assert [other["caption"] for other in row["alternatives"]] == [str(each) for each in caption.alternatives]
    assert found[9]["caption"] is None
    assert "is not an image" in found[9]["error"]
    assert found[10]["error"] == "a row has no picture"


def test_a_shard_that_fails_is_tried_again_and_given_up_in_the_end(small_folder, tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "0.tar", range(2))
    row = {"shard": str(shard), "target": str(tmp_path / "captions" / "0.jsonl")}
    actor = CaptionShards(str(small_folder), "cpu", "a run", {"beam_size": 1, "max_length": 2})
    failures = [OSError(5, "Input/output error")] * (ATTEMPTS - 1)
    whole = bulk.replacing

    def failing(path):
        if failures:
            raise failures.pop()
        return whole(path)

    monkeypatch.setattr(bulk, "replacing", failing)
    assert actor(row) == row | {"pictures": 2, "failed": 0, "error": ""}
    failures.extend([OSError(28, "No space left on device")] * ATTEMPTS)
    expected = f"{shard} could not be captioned in {ATTEMPTS} attempts: No space left on device"
    assert actor(row) == row | {"pictures": 0, "failed": 0, "error": expected}
    (tmp_path / "captions" / ".0.jsonl.a run").write_bytes(b"." * ATTEMPTS)  # as many workers died
    assert actor(row)["error"] == f"{shard} could not be captioned in {ATTEMPTS} attempts: its worker died"
    assert os.listdir(tmp_path / "captions") == ["0.jsonl"]


def test_a_dataset_without_the_column_or_with_captions_is_an_error(small_folder):
    arrow = pytest.importorskip("pyarrow")
    actor = captioner_ray.CaptionTable(str(small_folder), "cpu", "image", {})
    with pytest.raises(ValueError, match="no column 'image'; it has photo"):
        actor(arrow.table({"photo": [b""]}))
    with pytest.raises(ValueError, match="a column 'caption' already"):
        actor(arrow.table({"image": [b""], "caption": ["a dog"]}))


def test_processes_of_torchrun_share_the_shards(small_folder, tmp_path, monkeypatch):
    shards = [str(write_shard(tmp_path / f"{n}.tar", range(2 * n, 2 * n + 2))) for n in range(5)]
    write_tar(tmp_path / "4.tar", [("bad.png", b"damaged")])
    output = tmp_path / "captions"
    arguments = ["--input", *shards, "--output", str(output), "--format", "jsonl", "--device", "cpu"]
    options = ["--model", str(small_folder), "--beam-size", "2", "--max-length", "4"]
    done: set[str] = set()
    for rank in range(3):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 3)):
            monkeypatch.setenv(name, str(value))
        # A process that fails would end the others: they are told of the damaged picture by a sentence.
        assert main([*arguments, *options]) == 0
        new = set(os.listdir(output)) - done
        assert len(new) == (2, 2, 1)[rank]
        done |= new
    run(small_folder, *shards, "--output", tmp_path / "command")
    for number in range(5):
        assert rows(output / f"{number}.jsonl") == rows(tmp_path / "command" / f"{number}.jsonl")


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("x", "2"), ("0", "-1")])
def test_a_rank_that_there_is_not_is_one_sentence(tmp_path, monkeypatch, capsys, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert main(["--input", "a.tar", "--output", str(tmp_path)]) == 2
    assert (
        f"RANK, WORLD_SIZE, LOCAL_RANK should be as torchrun sets them, and are {rank}, {size}, 0"
        in capsys.readouterr().err
    )


def test_without_ray_the_message_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    shard = write_shard(tmp_path / "0.tar", [])
    assert main(["--input", str(shard), "--output", str(tmp_path / "x"), "--engine", "ray", *OPTIONS]) == 2
    assert "pip install 'captioner[ray]'" in capsys.readouterr().err
