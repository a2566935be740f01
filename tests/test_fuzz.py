"""No file that people feed it breaks it: each gives a caption or one sentence, soon, and within little memory."""

import time

import pytest
from fuzz import (
    BATCH,
    BOMBS,
    GREY,
    SECONDS,
    by_every_way,
    cases,
    one_sentence,
    outcome,
    page,
    peak_memory,
    pictures,
    tiff,
)

from captioner.cli import main


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_file_gives_an_image_or_one_sentence():
    assert outcome(pictures()["RGB-0.jpeg"]) == "image"
    before = peak_memory(reset=True)
    results = []
    for name, data in cases(400, seed=0):
        began = time.process_time()
        results.append(outcome(data))
        assert time.process_time() - began < SECONDS, name
        assert one_sentence(results[-1]), name
    assert 50 < results.count("image") < 350
    assert peak_memory() - before < 300


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", BOMBS)
def test_files_made_to_be_expensive_are_not(name):
    data = BOMBS[name]()
    before, began = peak_memory(reset=True), time.process_time()
    assert one_sentence(outcome(data)), name
    assert time.process_time() - began < SECONDS
    assert peak_memory() - before < 300


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_file_has_the_same_outcome_by_every_way(small, small_folder, tmp_path):
    """A file in a stream, a folder that the command captions, or an upload, among fifty others."""
    files, slowest, found = list(cases(200, seed=3)), {}, []
    with page(small) as url:
        for first in range(0, len(files), BATCH):
            batch = files[first : first + BATCH]
            found += by_every_way(batch, tmp_path / str(first), small, small_folder, url, slowest)
    assert len(found) == 200
    assert 20 < found.count("image") < 180
    assert slowest.keys() == {"load_image", "stream", "command", "page"}
    assert not list(tmp_path.glob("*/"))


def test_the_command_says_what_is_wrong_with_a_file_once(small_folder, tmp_path, capsys, caplog):
    """Pillow logs that a TIFF has more samples than it can decode, and raises it too."""
    path = tmp_path / "samples.tiff"
    path.write_bytes(tiff([*GREY[:-1], (277, 3, 1, 260)], bytes(64 * 48)))
    assert main([str(path), "--model", str(small_folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not caplog.records
