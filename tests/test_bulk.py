"""Shards and tables: a file of captions for each, whole or not at all, and only those that are missing."""

import io
import itertools
import json
import os
import tarfile

import numpy as np
import pytest
from conftest import PHOTOS
from PIL import Image

from captioner import bulk, cli
from captioner.bulk import Job, caption_shard, plan, remaining
from captioner.shards import ShardError, expand, read_shard

QUICK = {"beam_size": 2, "max_length": 4}


def picture(number: int, size: tuple[int, int] = (12, 16)) -> bytes:
    """A PNG of noise, another for each number."""
    data = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


def write_tar(path, members):
    """A tar file of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_shard(path, numbers):
    """A shard of pictures, each with a text beside it."""
    pairs = (((f"{n:05d}.png", picture(n)), (f"{n:05d}.json", b"{}")) for n in numbers)
    return write_tar(path, itertools.chain.from_iterable(pairs))


@pytest.fixture
def shards(tmp_path):
    """Three shards of four pictures each."""
    folder = tmp_path / "shards"
    folder.mkdir()
    return [write_shard(folder / f"{n:03d}.tar", range(4 * n, 4 * n + 4)) for n in range(3)]


def run(small_folder, *arguments):
    return cli.main([*map(str, arguments), "--model", str(small_folder), "--max-length", "4", "--beam-size", "2"])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_shard_gives_a_file_with_the_captions_of_its_pictures(small, small_folder, shards, tmp_path, capsys):
    output = tmp_path / "captions"
    assert run(small_folder, tmp_path / "shards" / "{000..002}.tar", "--output", output, "--alternatives", 1) == 0
    assert capsys.readouterr() == ("", "")
    assert sorted(os.listdir(output)) == ["000.jsonl", "001.jsonl", "002.jsonl"]
    for number in range(3):
        images = [picture(n) for n in range(4 * number, 4 * number + 4)]
        expected = [caption.to_dict() for caption in small.caption(images, alternatives=1, **QUICK)]
        for n, row in enumerate(rows(output / f"{number:03d}.jsonl")):
            key = f"{4 * number + n:05d}"
            assert row == {"key": key, "path": f"{key}.png", **expected[n]}


def test_the_same_command_again_does_the_missing_shards_only(small_folder, shards, tmp_path):
    output = tmp_path / "captions"
    output.mkdir()
    (output / "001.jsonl").write_text("as it was")
    (output / ".000.jsonl.12345678").write_text("of a process that was killed")
    assert run(small_folder, *shards, "--output", output) == 0
    assert (output / "001.jsonl").read_text() == "as it was"
    changed = (output / "000.jsonl").stat().st_mtime_ns
    assert run(small_folder, *shards, "--output", output) == 0
    assert (output / "000.jsonl").stat().st_mtime_ns == changed
    assert sorted(os.listdir(output)) == ["000.jsonl", "001.jsonl", "002.jsonl"]


def test_a_damaged_picture_is_a_row_and_a_damaged_shard_a_sentence(small_folder, shards, tmp_path, capsys):
    output = tmp_path / "captions"
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: len(data) // 2])
    members = [("a.jpg", b"no image"), ("b.txt", b"text"), ("._c.png", b"of a Mac"), ("d/e.f.PNG", picture(1))]
    write_tar(shards[2], members)
    assert run(small_folder, *shards, "nowhere.tar", "--output", output) == 1
    assert sorted(os.listdir(output)) == ["000.jsonl", "002.jsonl"]
    damaged, without, good = rows(output / "002.jsonl")
    assert damaged.keys() == {"key", "path", "error"}
    assert (damaged["key"], damaged["path"]) == ("a", "a.jpg")
    assert damaged["error"].startswith(f"{shards[2]}: a.jpg is not an image")
    assert without == {"key": "b", "path": None, "error": f"{shards[2]}: the sample b has no picture"}
    assert (good["key"], good["path"]) == ("d/e", "d/e.f.PNG")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"captioner: {shards[1]} is damaged or cut short: ")
    assert second == (
        f"captioner: {shards[2]}: 2 of 3 pictures could not be captioned; their rows in {output / '002.jsonl'} say why"
    )
    assert third == "captioner: nowhere.tar does not exist"


def test_a_shard_that_is_cut_or_damaged_anywhere_is_not_taken_for_a_whole_one(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    for length in (0, 1, 511, 512, 513, 2000, end - 1, end // 512 * 512):
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"a.tar is damaged or cut short"):
            list(read_shard(str(path)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset for member in archive]
    for start in starts:  # in the check sum of every header
        path.write_bytes(data[: start + 148] + b"77777777" + data[start + 156 :])
        with pytest.raises(ShardError, match=r"a.tar is damaged or cut short"):
            list(read_shard(str(path)))


def test_samples_have_the_keys_that_webdataset_gives_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    names = ["a.jpg", "a.json", "b/c.d.png", "e.f/g.png", "h.png", ".i.png", "noend", "l.PNG", "./m.png"]
    path = write_tar(tmp_path / "a.tar", [(name, picture(n)) for n, name in enumerate(names)])
    found = {sample.key: sample.image for sample in read_shard(str(path))}
    expected = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
        expected[sample["__key__"]] = next(data for name, data in sample.items() if not name.startswith("__"))
    assert found == expected


def test_links_and_folders_in_an_archive_are_left_out(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("folder.png/"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        archive.add(PHOTOS / "cat.jpg", "cat.jpg")
    assert [sample.path for sample in read_shard(str(path))] == ["cat.jpg"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{2..0}.tar", ["2.tar", "1.tar", "0.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a}{}.tar", ["{a}{}.tar"]),
    ],
)
def test_braces_stand_for_what_they_do_in_bash(pattern, names):
    assert expand(pattern) == names


def test_a_file_whose_name_has_braces_is_itself_and_too_many_shards_are_refused(tmp_path):
    path = tmp_path / "{0..1}.tar"
    path.touch()
    assert expand(str(path)) == [str(path)]
    for pattern in ("{0..999999999999}.tar", "{0..2000}{0..2000}.tar"):
        with pytest.raises(ShardError, match="stands for more than 1,000,000 shards"):
            expand(pattern)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.tar"], "--output names a folder"),
        (["a.tar", "a.jpg", "--output", "x"], "a.tar is a shard and a.jpg is not"),
        (["a.tar", "--output", "x", "--format", "text"], "shards have no --format text"),
        (["a.tar", "--output", "x", "--heatmaps", "y"], "shards have no heatmaps"),
        (["a.jpg", "--format", "parquet"], "--format parquet is for shards"),
    ],
)
def test_options_that_do_not_suit_shards_are_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_what_goes_wrong_is_one_sentence(small_folder, shards, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    same = write_shard(tmp_path / "more" / "000.tar", [])
    for arguments, status, message in (
        ([shards[0], same, "--output", tmp_path / "x"], 2, "would both be captioned into"),
        ([shards[0], "--output", tmp_path / "x", "--alternatives", 40], 2, "alternatives 40 is too many"),
        ([shards[0], "--output", shards[1]], 1, f"cannot write to {shards[1]}"),
    ):
        assert run(small_folder, *arguments) == status
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_captions_below_the_confidence_asked_for_are_errors(small, shards, tmp_path):
    outcome = caption_shard(small, Job(str(shards[0]), tmp_path / "a.jsonl"), min_confidence=1, **QUICK)
    assert (outcome.pictures, outcome.failed) == (4, 4)
    assert rows(tmp_path / "a.jsonl")[0]["error"].startswith(f"{shards[0]}: 00000.png: confidence 0.")


def test_processes_share_the_shards_and_each_is_of_one(tmp_path):
    names = [f"{n}.tar" for n in range(7)]
    shares = [plan(names, tmp_path, "jsonl", rank, 3) for rank in range(3)]
    assert sorted(job.shard for share in shares for job in share) == names
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    (tmp_path / "3.jsonl").touch()
    assert [job.shard for job in remaining(shares[0])] == ["0.tar", "6.tar"]


def table(path, column, kind=None, **others):
    arrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": arrow.array(column, kind), **others}), path, row_group_size=3)
    return path


def test_a_table_may_hold_bytes_paths_or_structs(small, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(picture(0))
    outside = tmp_path / "1.png"
    outside.write_bytes(picture(1))
    bytes_, paths = [picture(0), picture(1), b"no image", None], ["photos/0.png", str(outside), "gone.png", None]
    structs = [
        {"bytes": picture(0), "path": "zero.png"},
        {"bytes": None, "path": str(outside)},
        {"bytes": b"no image", "path": None},
        None,
    ]
    expected = [caption.to_dict() for caption in small.caption([picture(0), picture(1)], **QUICK)]
    for name, column in (("bytes", bytes_), ("paths", paths), ("structs", structs)):
        path = table(tmp_path / f"{name}.parquet", column)
        caption_shard(small, Job(str(path), tmp_path / f"{name}.jsonl"), **QUICK)
        zero, one, damaged, none = rows(tmp_path / f"{name}.jsonl")
        assert {key: zero[key] for key in expected[0]} == expected[0]
        assert {key: one[key] for key in expected[0]} == expected[1]
        assert ("gone.png does not exist" if name == "paths" else f"{path}: row 2 is not an image") in damaged["error"]
        assert none == {"key": "3", "path": None, "error": f"{path}: row 3 has no picture"}
        assert [row["path"] for row in (zero, one)] == {
            "bytes": [None, None],
            "paths": ["photos/0.png", str(outside)],
            "structs": ["zero.png", str(outside)],
        }[name]


def test_captions_in_parquet_are_those_in_json_lines(small, small_folder, shards, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    monkeypatch.setattr(bulk, "ROWS", 3)
    write_tar(shards[0], [("a.png", b"damaged"), (os.fsdecode(b"\xff.png"), picture(0)), ("c.png", picture(1))])
    assert run(small_folder, *shards, "--output", tmp_path / "lines") == 1
    assert run(small_folder, *shards, "--output", tmp_path / "tables", "--format", "parquet") == 1
    for number in range(3):
        lines = rows(tmp_path / "lines" / f"{number:03d}.jsonl")
        found = parquet.read_table(tmp_path / "tables" / f"{number:03d}.parquet").to_pylist()
        without_nulls = [{name: value for name, value in row.items() if value is not None} for row in found]
        assert without_nulls == lines


@pytest.mark.parametrize(
    ("column", "asked", "message"),
    [
        ([1, 2], "image", "the column 'image' holds int64, and should hold the bytes or paths of pictures"),
        ([{"x": 1}], "image", "the column 'image' holds struct<x: int64>"),
        ([b""], "photo", "has no column 'photo'; it has image"),
    ],
)
def test_a_table_without_pictures_is_a_sentence(small_folder, tmp_path, capsys, column, asked, message):
    path = table(tmp_path / "a.parquet", column)
    assert run(small_folder, path, "--column", asked, "--output", tmp_path / "captions") == 1
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path / "captions") == []


def test_a_damaged_table_is_a_sentence(tmp_path):
    path = table(tmp_path / "a.parquet", [picture(n) for n in range(9)])
    data = path.read_bytes()
    for length in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"a.parquet is damaged or cut short|a.parquet cannot be read"):
            list(read_shard(str(path)))
