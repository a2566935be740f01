"""No file that people feed it breaks it: each gives a caption or one sentence, soon, and within little memory."""

import json
import time

import pytest
from fuzz import BOMBS, MAX_PIXELS, SECONDS, cases, one_sentence, outcome, outcomes, peak_memory, pictures

from app.service import Service, Settings
from captioner.cli import SUFFIXES, main


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
def test_every_file_has_the_same_outcome_in_a_stream_as_alone(small):
    files = [data for _, data in cases(200, seed=3)]
    found = list(outcomes(small, iter(files)))
    assert found == [outcome(data) for data in files]
    assert 20 < found.count("image") < 180


def test_the_command_says_something_of_every_file(small_folder, tmp_path, capfd):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, data in cases(120, seed=1):
        suffix = "." + name.rpartition(".")[2]
        (photos / (name if suffix in SUFFIXES else f"{name}.jpg")).write_bytes(data)
    output = tmp_path / "captions.jsonl"
    arguments = ["--max-megapixels", str(MAX_PIXELS / 1e6), "--format", "jsonl", "--output", str(output)]
    search = ["--beam-size", "1", "--max-length", "3", "--batch-size", "16"]
    assert main([str(photos), "--model", str(small_folder), *arguments, *search]) == 1
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["path"] for record in records] == sorted(str(path) for path in photos.iterdir())
    errors = [record["error"] for record in records if "error" in record]
    assert 10 < len(errors) < 110
    assert all(map(one_sentence, errors))
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("captioner: ")] == [f"captioner: {error}" for error in errors]
    assert not any("Traceback" in line or "Warning" in line for line in said)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_the_service_answers_of_every_file(small, tmp_path):
    service = Service({"small": small}, max_pixels=MAX_PIXELS)
    requests = []
    for name, data in cases(60, seed=2):
        (tmp_path / name).write_bytes(data)
        requests.append((str(tmp_path / name), Settings(captions=1, beam_size=1, max_length=3)))
    answers = service.caption(requests)
    assert len(answers) == len(requests)
    sentences = [answer for answer in answers if isinstance(answer, str)]
    assert 5 < len(sentences) < 55
    assert all(one_sentence(sentence) and str(tmp_path) not in sentence for sentence in sentences)
