"""Files of your own captions are read like the public data sets, and what is wrong in them is named by line."""

import json
from pathlib import Path

import pytest

from training.data.items import DatasetError
from training.data.sources import parse_source, read_captions, read_sources, split_by_hash


@pytest.fixture
def folder(tmp_path):
    """Pictures a.jpg to d.jpg and inner/e.jpg; nothing opens them, so they are empty."""
    (tmp_path / "inner").mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "inner/e.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, name: str, *lines: object) -> Path:
    """A file of these lines; what is not text becomes JSON."""
    path = folder / name
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", "utf-8")
    return path


def contents(path: Path) -> dict[str, dict[str, tuple[str, ...]]]:
    """Split -> path relative to the file's folder -> captions."""
    return {
        split: {item.path.relative_to(path.parent).as_posix(): item.captions for item in items}
        for split, items in read_captions("own", path).splits.items()
    }


def problems(path: Path) -> list[str]:
    """The problems without the name of the file."""
    return [problem.removeprefix(f"{path.name}:") for problem in read_captions("own", path).problems]


EXPECTED = {
    "train": {"a.jpg": ("A dog.", "One dog, running"), "inner/e.jpg": ("A cow",)},
    "dev": {"b.jpg": ("A cat",), "c.jpg": ("A hen",)},
    "test": {"d.jpg": ("A fish",)},
}


def test_a_csv_file_is_read_with_its_splits(folder):
    path = write(
        folder,
        "pets.csv",
        "number,file_name,split,text",
        "1,a.jpg,train,A dog.",
        '2,a.jpg,train,"One dog, running"',
        "3,b.jpg,val, A   cat ",
        "4,c.jpg,validation,A hen",
        "5,d.jpg,test,A fish",
        "6,./inner/e.jpg,Train,A cow",
    )
    assert contents(path) == EXPECTED
    assert read_captions("own", path).problems == ()


def test_a_json_lines_file_is_read_and_text_may_be_a_list(folder):
    path = write(
        folder,
        "pets.jsonl",
        {"file_name": "a.jpg", "text": ["A dog.", "One dog, running"], "split": "train"},
        {"file_name": "b.jpg", "text": "A cat", "split": "dev"},
        {"file_name": "c.jpg", "text": "A hen", "split": "dev", "more": 1},
        {"file_name": "d.jpg", "text": "A fish", "split": "test"},
        {"file_name": "inner/e.jpg", "text": "A cow", "split": "train"},
    )
    assert contents(path) == EXPECTED
    assert read_captions("own", path).problems == ()


def test_windows_line_ends_a_byte_order_mark_blank_lines_and_line_breaks_in_a_caption_are_no_problem(folder):
    path = folder / "pets.csv"
    path.write_bytes(
        b'\xef\xbb\xbffile_name,text,split\r\n\r\na.jpg,"A dog\r\nruns",train\r\n,,\r\nb.jpg,caf\xc3\xa9,dev\r\n'
    )
    assert contents(path) == {"train": {"a.jpg": ("A dog runs",)}, "dev": {"b.jpg": ("café",)}, "test": {}}
    assert read_captions("own", path).problems == ()


def test_a_path_may_be_absolute_or_lead_out_of_the_folder(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x.jpg"
    elsewhere.touch()
    (folder / "texts").mkdir()
    path = write(folder / "texts", "pets.csv", "file_name,text,split", "../a.jpg,A dog,dev", f"{elsewhere},An X,dev")
    items = read_captions("own", path).splits["dev"]
    assert [item.path.resolve() for item in items] == [(folder / "a.jpg").resolve(), elsewhere.resolve()]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("gone.jpg,A cow,dev", "there is no picture {folder}/gone.jpg"),
        ("inner,A cow,dev", "there is no picture {folder}/inner"),
        ("\0.jpg,A cow,dev", "there is no picture {folder}/\0.jpg"),
        ("x" * 300 + "/y.jpg,A cow,dev", "there is no picture {folder}/" + "x" * 300 + "/y.jpg"),
        (",A cow,dev", "file_name is empty"),
        ("c.jpg,,dev", "the caption of c.jpg is empty"),
        ("c.jpg, . ,dev", "the caption of c.jpg is empty"),
        ("c.jpg,A cow,trian", "c.jpg is in an unknown split 'trian'; there are train, dev and test"),
        ("c.jpg,A cow,", "c.jpg has no split, but others have; name it for all or for none"),
        ("a.jpg,A hound,dev", "a.jpg is in dev here, and was in train before"),
        ("a.jpg,A  dog,train", "a.jpg has the same caption before; the first is kept"),
        ("c.jpg,A cow, a dog,dev", "expected 3 columns, found 4; a caption with commas needs quotes"),
        ("c.jpg", "expected 3 columns, found 1; a caption with commas needs quotes"),
        ('c.jpg,"A cow,dev', "malformed: ',' expected after '\"'"),
        ('c.jpg,"A" cow,dev', "malformed: ',' expected after '\"'"),
    ],
)
def test_a_bad_line_of_a_csv_file_is_skipped_and_named(folder, line, problem):
    path = write(folder, "pets.csv", "file_name,text,split", "a.jpg,A dog,train", line, 'b.jpg,"A cat",dev')
    assert problems(path) == [f"3: {problem.format(folder=folder)}"]
    assert contents(path) == {"train": {"a.jpg": ("A dog",)}, "dev": {"b.jpg": ("A cat",)}, "test": {}}


def test_a_quote_that_is_never_closed_costs_one_line(folder):
    path = write(folder, "pets.csv", "file_name,text,split", 'a.jpg,"A dog,train', "b.jpg,A cat,dev", "c.jpg,A hen,dev")
    assert problems(path) == ["2: malformed: unexpected end of data"]
    assert list(contents(path)["dev"]) == ["b.jpg", "c.jpg"]


def test_a_line_that_is_not_utf8_is_skipped_and_named(folder):
    path = write(folder, "pets.csv", "file_name,text,split", "a.jpg,A dog,train", "b.jpg,A cat,dev")
    path.write_bytes(path.read_bytes() + b"c.jpg,caf\xe9,dev\n")
    assert problems(path) == ["4: byte 10 is not UTF-8"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "malformed: Expecting property name"),
        ("[1]", "malformed: expected an object with file_name and text"),
        ({"file_name": "c.jpg"}, "malformed: expected an object with file_name and text"),
        (
            {"file_name": 3, "text": "A cow"},
            "malformed: file_name and split should be strings, text a string or a list",
        ),
        ({"file_name": "c.jpg", "text": [None]}, "malformed: file_name and split should be strings"),
        ({"file_name": "c.jpg", "text": "A cow", "split": 1}, "malformed: file_name and split should be strings"),
        ({"file_name": "c.jpg", "text": []}, "the caption of c.jpg is empty"),
        ({"file_name": "c.jpg", "text": "A \ud83d"}, "malformed: 'utf-8' codec can't encode"),
        ("[" * 100_000, "malformed: "),
    ],
)
def test_a_bad_line_of_a_json_lines_file_is_skipped_and_named(folder, line, problem):
    path = write(
        folder,
        "pets.jsonl",
        {"file_name": "a.jpg", "text": "A dog", "split": "train"},
        line,
        {"file_name": "b.jpg", "text": "A cat", "split": "dev"},
    )
    (found,) = problems(path)
    assert found.startswith(f"2: {problem}")
    assert contents(path) == {"train": {"a.jpg": ("A dog",)}, "dev": {"b.jpg": ("A cat",)}, "test": {}}


def test_an_empty_caption_in_a_list_leaves_the_others(folder):
    lines = [{"file_name": f"{name}.jpg", "text": ["", f"A {name}"], "split": "dev"} for name in "ab"]
    path = write(folder, "pets.jsonl", *lines)
    assert problems(path) == ["1: the caption of a.jpg is empty", "2: the caption of b.jpg is empty"]
    assert contents(path)["dev"] == {"a.jpg": ("A a",), "b.jpg": ("A b",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.jpg,A dog\n",
            r"pets\.csv needs the columns file_name and text in its first line, which has \['a\.jpg', 'A",
        ),
        ("file_name;text\na.jpg;A dog\n", r"first line, which has \['file_name;text'\]"),
        ("", r"needs the columns file_name and text in its first line, which has \[\]"),
        ("file_name,text\n", r"no picture of .*pets\.csv can be used$"),
        ("file_name,text\nx.jpg,A dog\n", r"no picture .*; the first of 1 problems: pets\.csv:2: there is no picture"),
        (b"\xff\xfef\0i\0l\0e\0", r"first line.*; the first of 1 problems: pets\.csv:1: byte 1 is not UTF-8"),
        (None, r"cannot read the captions in .*pets\.csv: No such file"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_one_clear_error(folder, text, message):
    path = folder / "pets.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=message):
        read_captions("own", path)


# Splits


NAMES = [f"photos/{number:04d}.jpg" for number in range(2000)]


def of_split(splits, wanted):
    return {name for name, split in splits.items() if split == wanted}


def test_without_splits_eight_in_ten_are_for_training():
    splits = split_by_hash(NAMES)
    shares = {split: len(of_split(splits, split)) / len(NAMES) for split in ("train", "dev", "test")}
    assert shares == {
        "train": pytest.approx(0.8, abs=0.03),
        "dev": pytest.approx(0.1, abs=0.03),
        "test": shares["test"],
    }


def test_a_split_depends_on_no_order_and_stays_when_pictures_are_added():
    all_of_them = split_by_hash(NAMES)
    some = split_by_hash(NAMES[100::-1])
    assert some == {name: all_of_them[name] for name in NAMES[:101]}


@pytest.mark.parametrize("count", [4, 10, 20])
def test_a_few_pictures_have_two_for_dev_wherever_their_hashes_fall(count):
    for first in range(0, 2000, count):
        splits = split_by_hash(NAMES[first : first + count])
        assert len(of_split(splits, "dev")) >= 2
        # None leaves training or test but for dev.
        whole = split_by_hash(NAMES)
        assert all(whole[name] == split for name, split in splits.items() if split != "dev")


def test_the_split_of_a_file_is_by_the_path_as_it_stands_there(folder):
    lines = [{"file_name": f"{name}.jpg", "text": "A pet"} for name in "abcd"]
    expected = split_by_hash([f"{name}.jpg" for name in "abcd"])
    found = contents(write(folder, "pets.jsonl", *lines))
    assert {name: split for split, items in found.items() for name in items} == expected
    assert "split by a hash" in read_captions("own", folder / "pets.jsonl").layout


# Names


@pytest.mark.parametrize(
    ("source", "name", "place"),
    [
        ("flickr8k", "flickr8k", "data/flickr8k"),
        ("flickr8k=elsewhere", "flickr8k", "elsewhere"),
        ("photos/pets.csv", "pets", "photos/pets.csv"),
        ("photos/Pets.JSONL", "Pets", "photos/Pets.JSONL"),
        ("zoo=photos/a=b.csv", "zoo", "photos/a=b.csv"),
    ],
)
def test_a_source_is_a_name_and_a_place(source, name, place):
    assert parse_source(source) == (name, Path(place))


def test_own_captions_carry_their_name_and_two_of_one_name_are_refused(folder):
    path = write(folder, "pets.csv", "file_name,text,split", "a.jpg,A dog,train")
    one, two = read_sources([str(path), f"zoo={path}"])
    assert (one.name, two.name) == ("pets", "zoo")
    assert [item.dataset for item in two.splits["train"]] == ["zoo"]
    with pytest.raises(DatasetError, match="two data sets have the name pets; name each with NAME="):
        read_sources([str(path), str(path)])


def test_a_name_that_is_neither_says_what_there_is():
    with pytest.raises(DatasetError, match=r"no data set 'captions\.txt'; there are .*\.csv or \.jsonl"):
        read_sources(["captions.txt"])
