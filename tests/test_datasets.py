import json
import os
from pathlib import Path

import pytest

from training.data.datasets import read_dataset
from training.data.items import DatasetError
from training.data.layouts import DATASETS
from training.words import tokenize

FLICKR8K = Path(__file__).parents[2] / "shared" / "flickr8k"


def write(root: Path, name: str, text: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def images(root: Path, folder: str, *names: str) -> None:
    for name in names:
        write(root, f"{folder}/{name}", b"jpeg")


def release(root: Path, captions: str | bytes = "a.jpg#0\tA dog .\na.jpg#1\tOne dog .\nb.jpg#0\tA cat .\n") -> Path:
    """A Flickr8k of two images: a.jpg to train on, b.jpg for dev."""
    images(root, "Flicker8k_Dataset", "a.jpg", "b.jpg")
    write(root, "Flickr8k_text/Flickr8k.token.txt", captions)
    write(root, "Flickr8k_text/Flickr_8k.trainImages.txt", "a.jpg\n")
    write(root, "Flickr8k_text/Flickr_8k.devImages.txt", "b.jpg\n")
    return root


def contents(name: str, root: Path) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """The splits, with each path relative to the root."""
    splits = read_dataset(name, root).splits
    return {
        split: [(item.path.relative_to(root).as_posix(), item.captions) for item in items]
        for split, items in splits.items()
    }


# Flickr8k


def test_the_release_of_flickr8k_is_read_with_its_splits(tmp_path):
    assert contents("flickr8k", release(tmp_path)) == {
        "train": [("Flicker8k_Dataset/a.jpg", ("A dog .", "One dog ."))],
        "dev": [("Flicker8k_Dataset/b.jpg", ("A cat .",))],
        "test": [],
    }
    assert read_dataset("flickr8k", str(tmp_path)).problems == ()


def test_flickr8k_unpacked_into_one_flat_folder_is_read(tmp_path):
    images(tmp_path, "Flicker8k_Dataset", "a.jpg")
    write(tmp_path, "Flickr8k.token.txt", "a.jpg#0\tA dog .\n")
    write(tmp_path, "Flickr_8k.testImages.txt", "a.jpg\n")
    assert contents("flickr8k", tmp_path)["test"] == [("Flicker8k_Dataset/a.jpg", ("A dog .",))]


def test_captions_of_images_in_no_split_are_no_problem(tmp_path):
    root = release(tmp_path, "a.jpg#0\tA dog .\nb.jpg#0\tA cat .\nunlisted.jpg#0\tA cow .\nunlisted.jpg.1#0\t\n")
    assert read_dataset("flickr8k", root).problems == ()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"no tab here", "Flickr8k_text/Flickr8k.token.txt:2: expected NAME.jpg#NUMBER, a tab and a caption"),
        (b"a.jpg\tA dog", "Flickr8k_text/Flickr8k.token.txt:2: expected NAME.jpg#NUMBER, a tab and a caption"),
        (b"a.jpg#1\t", "Flickr8k_text/Flickr8k.token.txt:2: the caption of a.jpg is empty"),
        (b"a.jpg#1\t . ", "Flickr8k_text/Flickr8k.token.txt:2: the caption of a.jpg is empty"),
        (b"a.jpg#1\tcaf\xe9", "Flickr8k_text/Flickr8k.token.txt:2: byte 12 is not UTF-8"),
        (
            b"a.jpg#0\tA hound",
            "Flickr8k_text/Flickr8k.token.txt:2: caption 0 of a.jpg is there twice; the first is kept",
        ),
    ],
)
def test_a_bad_line_is_skipped_and_reported_by_file_and_line(tmp_path, line, problem):
    dataset = read_dataset("flickr8k", release(tmp_path, b"a.jpg#0\tA dog\n" + line + b"\nb.jpg#0\tA cat\n"))
    assert dataset.problems == (problem,)
    assert [item.captions for split in dataset.splits.values() for item in split] == [("A dog",), ("A cat",)]


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_are_no_problem(tmp_path):
    root = release(tmp_path, b"\xef\xbb\xbfa.jpg#0\tA dog\r\n\r\nb.jpg#0\tA cat\r\n")
    assert read_dataset("flickr8k", root).problems == ()
    assert contents("flickr8k", root)["train"] == [("Flicker8k_Dataset/a.jpg", ("A dog",))]


def test_a_listed_image_without_file_without_caption_or_listed_twice_is_reported(tmp_path):
    root = release(tmp_path, "a.jpg#0\tA dog\ngone.jpg#0\tA cow\n")
    write(root, "Flickr8k_text/Flickr_8k.trainImages.txt", "a.jpg\ngone.jpg\n")
    write(root, "Flickr8k_text/Flickr_8k.devImages.txt", "b.jpg\na.jpg\n")
    assert read_dataset("flickr8k", root).problems == (
        f"Flickr8k_text/Flickr_8k.trainImages.txt:2: gone.jpg is not in {root / 'Flicker8k_Dataset'}",
        "Flickr8k_text/Flickr_8k.devImages.txt:1: b.jpg has no caption",
        "Flickr8k_text/Flickr_8k.devImages.txt:2: a.jpg is listed before, at Flickr8k_text/Flickr_8k.trainImages.txt:1",
    )
    assert contents("flickr8k", root)["train"] == [("Flicker8k_Dataset/a.jpg", ("A dog",))]


def test_the_image_folder_is_listed_only_once(tmp_path, monkeypatch):
    root = release(tmp_path)
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or real(folder))
    read_dataset("flickr8k", root)
    assert listed == [root / "Flicker8k_Dataset"]


def test_kaggles_flickr8k_is_split_by_sorted_name_in_the_official_proportion(tmp_path):
    names = [f"{number}.jpg" for number in range(10, 26)]
    images(tmp_path, "Images", *names)
    write(tmp_path, "captions.txt", "image,caption\n" + "".join(f'{name},"A dog , a cat"\n' for name in names[::-1]))
    splits = contents("flickr8k", tmp_path)
    assert splits["train"] == [(f"Images/{name}", ("A dog , a cat",)) for name in names[:12]]
    assert [path for path, _ in splits["dev"] + splits["test"]] == [f"Images/{name}" for name in names[12:]]
    assert len(splits["dev"]) == len(splits["test"]) == 2
    assert "no split lists" in read_dataset("flickr8k", tmp_path).layout


def test_kaggles_flickr8k_with_the_official_lists_uses_them(tmp_path):
    images(tmp_path, "Images", "a.jpg", "b.jpg", "c.jpg")
    write(tmp_path, "captions.txt", "image,caption\na.jpg,A dog\nb.jpg,A cat\nc.jpg,A cow\na.jpg,A dog\n")
    write(tmp_path, "Flickr_8k.testImages.txt", "a.jpg\n")
    write(tmp_path, "Flickr_8k.trainImages.txt", "b.jpg\n")
    splits = contents("flickr8k", tmp_path)
    assert splits["test"] == [("Images/a.jpg", ("A dog", "A dog"))]  # two people may write the same
    assert splits["train"] == [("Images/b.jpg", ("A cat",))]
    assert read_dataset("flickr8k", tmp_path).problems == ()


@pytest.mark.parametrize("line", ["only-a-name.jpg", "a.jpg,A dog, a cat", 'a.jpg,"never closed', 'a.jpg,"a" b'])
def test_a_malformed_line_of_kaggles_flickr8k_is_reported(tmp_path, line):
    images(tmp_path, "Images", "a.jpg")
    write(tmp_path, "captions.txt", f"image,caption\na.jpg,A dog\n{line}\n")
    (problem,) = read_dataset("flickr8k", tmp_path).problems
    assert problem == "captions.txt:3: expected an image, a comma and a caption, in quotes if it has commas"


# Flickr30k


def test_the_release_of_flickr30k_is_read(tmp_path):
    images(tmp_path, "flickr30k-images", "1.jpg", "2.jpg")
    write(tmp_path, "results_20130124.token", "1.jpg#0\tA dog .\n2.jpg#0\tA cat .\n")
    write(tmp_path, "train.txt", "1\n")  # as Flickr30k Entities lists them
    write(tmp_path, "test.txt", "2\n")
    assert contents("flickr30k", tmp_path) == {
        "train": [("flickr30k-images/1.jpg", ("A dog .",))],
        "dev": [],
        "test": [("flickr30k-images/2.jpg", ("A cat .",))],
    }


@pytest.mark.parametrize("folder", ["", "flickr30k_images/"])
def test_kaggles_flickr30k_is_read_and_its_malformed_line_is_reported(tmp_path, folder):
    images(tmp_path, f"{folder}flickr30k_images", "1.jpg")
    write(
        tmp_path,
        f"{folder}results.csv",
        "image_name| comment_number| comment\n1.jpg| 0| A dog , a | sign .\n1.jpg| 4   A dog runs .\n",
    )
    dataset = read_dataset("flickr30k", tmp_path)
    assert [item.captions for items in dataset.splits.values() for item in items] == [("A dog , a | sign .",)]
    assert dataset.problems == (
        f"{folder}results.csv:3: expected an image, a number and a caption with | between them",
    )


# COCO


def coco(root: Path, split: str, annotations: list, images: list) -> None:
    document = {"images": images, "annotations": annotations}
    write(root, f"annotations/captions_{split}.json", json.dumps(document))


@pytest.mark.parametrize("year", [2014, 2017])
@pytest.mark.parametrize("folder", ["", "images/"])
def test_coco_is_read_with_val_as_dev(tmp_path, year, folder):
    images(tmp_path, f"{folder}train{year}", "1.jpg")
    images(tmp_path, f"{folder}val{year}", "2.jpg")
    captions = [{"id": 7, "image_id": 1, "caption": "A dog\n runs. "}, {"id": 8, "image_id": 1, "caption": "A dog."}]
    coco(tmp_path, f"train{year}", captions, [{"id": 1, "file_name": "1.jpg"}])
    coco(tmp_path, f"val{year}", [{"id": 9, "image_id": 2, "caption": "A cat."}], [{"id": 2, "file_name": "2.jpg"}])
    assert contents("coco", tmp_path) == {
        "train": [(f"{folder}train{year}/1.jpg", ("A dog runs.", "A dog."))],
        "dev": [(f"{folder}val{year}/2.jpg", ("A cat.",))],
        "test": [],
    }


def test_what_is_wrong_in_cocos_json_is_reported_by_its_place(tmp_path):
    images(tmp_path, "val2017", "1.jpg")
    annotations = [
        {"id": 1, "image_id": 1, "caption": "A dog"},
        {"id": 2, "image_id": 1},
        {"id": 3, "image_id": 99, "caption": "A cat"},
        {"id": 4, "image_id": 1, "caption": None},
        {"id": 5, "image_id": 1, "caption": "\n"},
        {"id": 1, "image_id": 1, "caption": "A hound"},
        "nonsense",
    ]
    coco(tmp_path, "val2017", annotations, [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {}])
    dataset = read_dataset("coco", tmp_path)
    assert [item.captions for item in dataset.splits["dev"]] == [("A dog",)]
    reasons = dict(
        problem.removeprefix("annotations/captions_val2017.json:").split(": ", 1) for problem in dataset.problems
    )
    assert list(reasons) == [
        "images[2]",
        "annotations[1]",
        "annotations[2]",
        "annotations[3]",
        "annotations[6]",
        "annotations[4]",
        "annotations[5]",
        "images[1]",
    ]
    assert reasons["images[2]"] == "malformed: there is no 'file_name'"
    assert reasons["annotations[2]"] == "there is no image with the id 99"
    assert reasons["annotations[3]"] == "malformed: caption is not text"
    assert reasons["images[1]"] == f"val2017/2.jpg is not in {tmp_path}"


# Karpathy's splits


def karpathy(root: Path, name: str, *entries: object) -> None:
    write(root, f"dataset_{name}.json", json.dumps({"images": entries, "dataset": name}))


def entry(file: str, split: str, *captions: str, **more: str) -> dict:
    return {"filename": file, "split": split, "sentences": [{"raw": caption} for caption in captions], **more}


@pytest.mark.parametrize(("name", "folder"), [("flickr8k", "Flicker8k_Dataset"), ("flickr30k", "flickr30k-images")])
def test_karpathys_splits_of_flickr_are_read_and_win_over_other_layouts(tmp_path, name, folder):
    release(tmp_path)
    write(tmp_path, "results_20130124.token", "a.jpg#0\tA dog .\n")
    images(tmp_path, folder, "a.jpg", "b.jpg", "c.jpg")
    karpathy(
        tmp_path, name, entry("a.jpg", "test", "Dog."), entry("b.jpg", "val", "Cat."), entry("c.jpg", "train", "Cow.")
    )
    assert contents(name, tmp_path) == {
        "train": [(f"{folder}/c.jpg", ("Cow.",))],
        "dev": [(f"{folder}/b.jpg", ("Cat.",))],
        "test": [(f"{folder}/a.jpg", ("Dog.",))],
    }


def test_karpathys_coco_has_folders_and_trains_on_restval(tmp_path):
    images(tmp_path, "train2014", "1.jpg")
    images(tmp_path, "val2014", "1.jpg")
    karpathy(
        tmp_path,
        "coco",
        entry("1.jpg", "train", "A dog.", filepath="train2014"),
        entry("1.jpg", "restval", "A cat.", filepath="val2014"),
    )
    assert contents("coco", tmp_path)["train"] == [("train2014/1.jpg", ("A dog.",)), ("val2014/1.jpg", ("A cat.",))]


def test_what_is_wrong_in_karpathys_json_is_reported_by_its_place(tmp_path):
    images(tmp_path, "Images", "a.jpg", "b.jpg")
    karpathy(
        tmp_path,
        "flickr8k",
        entry("a.jpg", "train", "A dog.", " "),
        entry("b.jpg", "elsewhere", "A cat."),
        {"filename": "b.jpg", "split": "val"},
        entry("b.jpg", "val"),
        None,
    )
    problems = read_dataset("flickr8k", tmp_path).problems
    assert [problem.removeprefix("dataset_flickr8k.json:") for problem in problems] == [
        "images[1]: b.jpg is in an unknown split 'elsewhere'",
        "images[2]: malformed: there is no 'sentences'",
        "images[4]: malformed: 'NoneType' object is not subscriptable",
        "images[0]: the caption of a.jpg is empty",
        "images[3]: b.jpg has no caption",
    ]


# What cannot be read at all


@pytest.mark.parametrize("name", DATASETS)
def test_a_folder_without_the_data_set_lists_what_was_looked_for_and_how_to_get_it(tmp_path, name):
    with pytest.raises(DatasetError) as caught:
        read_dataset(name, tmp_path)
    message = str(caught.value)
    assert f"dataset_{name}.json" in message
    assert all(marker in message for layout in DATASETS[name] for marker in layout.markers)
    assert f"python -m training.prepare {name} --root {tmp_path}" in message


def test_an_unknown_name_or_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="there is no data set 'imagenet'; there are flickr8k, flickr30k, coco"):
        read_dataset("imagenet", tmp_path)
    with pytest.raises(DatasetError, match="not a folder"):
        read_dataset("coco", tmp_path / "nowhere")


@pytest.mark.parametrize("text", [b'{"images": [{"spl', b"\xff\xfe\x00\x01", b"[" * 200_000])
def test_json_that_cannot_be_parsed_is_refused_by_name(tmp_path, text):
    write(tmp_path, "dataset_coco.json", text)
    with pytest.raises(DatasetError, match=r"dataset_coco\.json is not JSON, or was cut short"):
        read_dataset("coco", tmp_path)


@pytest.mark.parametrize("document", [[], {}, {"images": "none"}])
def test_json_that_is_something_else_is_refused_by_name(tmp_path, document):
    write(tmp_path, "dataset_coco.json", json.dumps(document))
    with pytest.raises(DatasetError, match=r"dataset_coco\.json is not a caption file: it needs lists under images"):
        read_dataset("coco", tmp_path)


def test_data_of_which_nothing_can_be_used_are_refused_with_the_first_reason(tmp_path):
    write(tmp_path, "Flickr8k.token.txt", "a.jpg#0\tA dog\n")
    with pytest.raises(DatasetError, match=r"no image .* the first of 1 problems: .*token\.txt:1: a\.jpg is not in"):
        read_dataset("flickr8k", tmp_path)


def test_a_folder_without_permission_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(folder: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DatasetError, match=r"cannot read .*Flicker8k_Dataset: Permission denied"):
        read_dataset("flickr8k", release(tmp_path))


# The real data


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason=f"Flickr8k is not at {FLICKR8K}")
def test_the_real_flickr8k_has_no_problems():
    dataset = read_dataset("flickr8k", FLICKR8K)
    assert {split: len(items) for split, items in dataset.splits.items()} == {"train": 6000, "dev": 1000, "test": 0}
    assert all(len(item.captions) == 5 for items in dataset.splits.values() for item in items)
    assert dataset.problems == ()


# Words


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog , on the grass .", "a dog on the grass"),
        ("A dog. It RUNS fast!", "a dog it runs fast"),
        ("the man's t-shirt", "the man 's t-shirt"),
        ("the man’s “red” shirt", "the man 's red shirt"),
        ("They don't; he can't...", "they do n't he ca n't"),
        ("a dog--running - fast", "a dog running fast"),
        ('he says "hello."', "he says hello"),
        ("He's at St. Mary's in Washington D.C.", "he 's at st. mary 's in washington d.c."),
        ("a #7 jersey (red)", "a # 7 jersey red"),
        ("5 p.m., 10:30", "5 p.m. 10:30"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_words_are_those_of_the_scorers_tokenizer(caption, words):
    assert tokenize(caption) == words.split()
