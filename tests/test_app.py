"""The demo's server: captions as data, the API, many people at once, and what it refuses."""

import base64
import csv
import dataclasses
import io
import json
import threading
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gradio_client
import numpy as np
import pytest
from conftest import PHOTOS, run_app
from PIL import Image

from app.__main__ import by_display_name, main, parse
from app.auth import Passwords
from app.guard import NOT_UPLOADED
from app.service import Refused, Service, Settings, as_csv, as_json, as_zip, settings_of, view
from captioner import Caption, Captioner, list_models
from captioner.explain import explain

PATHS = sorted(PHOTOS.glob("*.jpg"))
DEFAULTS = (5, 3, 22, False, 1.0, 0.9, 0)


@pytest.fixture(scope="module")
def default() -> Captioner:
    return Captioner.from_pretrained()


@pytest.fixture(scope="module")
def url(default):
    with run_app({"default": default}) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return gradio_client.Client(url, verbose=False)


def ask(client, path, **options):
    return client.predict(image=gradio_client.handle_file(str(path)), api_name="/caption", **options)


@pytest.fixture
def bad_files(tmp_path):
    """Files that are no photographs, by what people are told of them."""
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(PATHS[0].read_bytes()[:9000])
    huge = tmp_path / "huge.png"
    Image.new("1", (20000, 10000)).save(huge)
    return {"not a picture": text, "empty": empty, "damaged": damaged, "too large": huge}


def test_equal_settings_go_through_the_network_together(default, monkeypatch):
    expected = [str(default.caption(PATHS[n])) for n in (0, 2)]
    calls = []
    real = Captioner.caption
    monkeypatch.setattr(
        Captioner, "caption", lambda self, images, **options: calls.append(len(images)) or real(self, images, **options)
    )
    service = Service({"default": default})
    few, many = Settings(captions=1), Settings(captions=3, beam_size=2)
    answers = service.caption([(str(PATHS[0]), few), (str(PATHS[1]), many), (None, few), (str(PATHS[2]), few)])
    assert sorted(calls) == [1, 2]
    assert answers[2] == "Choose a photo first."
    assert [str(answers[number]) for number in (0, 3)] == expected
    assert len(answers[1].alternatives) == 2


def test_one_bad_file_does_not_stop_the_others(default, bad_files):
    service = Service({"default": default})
    paths = [PATHS[0], *bad_files.values(), PATHS[1]]
    answers = service.caption([(str(path), Settings()) for path in paths])
    assert isinstance(answers[0], Caption)
    assert isinstance(answers[-1], Caption)
    for told, answer in zip(bad_files, answers[1:-1], strict=True):
        assert told in answer
        assert "/" not in answer  # nothing of the server's paths


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, *DEFAULTS[1:]), "beam size should be a whole number from 1 to 20"),
        ((5, 99, *DEFAULTS[2:]), "number of captions"),
        ((5, 3, 22, True, float("nan"), 0.9, 0), "temperature"),
        ((5, 3, 22, True, 1.0, 0, 0), "top-p"),
        ((5, 3, 22, True, 1.0, 0.9, None), "seed"),
    ],
)
def test_settings_out_of_range_are_refused_with_the_range(values, message):
    with pytest.raises(Refused, match=message):
        settings_of("", *values)


def test_an_unknown_model_is_refused_with_those_there_are(default):
    assert Service({"default": default}).caption([(str(PATHS[0]), Settings(model="x"))]) == [
        "There is no model 'x'; there are default."
    ]


def test_the_view_has_a_map_for_every_word_of_every_caption(default):
    caption = default.caption(PATHS[0], beam_size=3)
    shown = view(caption)
    assert [each["text"] for each in shown["captions"]] == [one.sentence() for one in (caption, *caption.alternatives)]
    for each in shown["captions"]:
        for word in each["words"]:
            (packed,) = word["maps"]
            heat = np.frombuffer(base64.b64decode(packed), np.uint8)
            assert heat.shape == (28 * 28,)
            assert heat.max() == 255
            assert 0 < word["confidence"] <= 1


def test_the_numbers_of_each_step_are_those_that_made_the_caption(default):
    caption = default.caption(PATHS[2], block_ngrams=0)
    steps = explain(default, caption.image, caption)
    assert [step.word for step in steps] == [*caption.words, "<end>"]
    for step, weights, told in zip(steps, caption.attention, caption.word_log_probabilities, strict=False):
        assert np.allclose(step.weights, weights, atol=1e-5)
        softmax = np.exp(step.scores - step.scores.max())
        assert np.allclose(softmax / softmax.sum(), weights, atol=1e-5)
        assert 0 < step.beta < 1
        probabilities = dict(step.candidates)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        if step.word in probabilities:
            assert np.log(probabilities[step.word]) == pytest.approx(told, abs=1e-4)
    assert json.dumps([step.to_dict() for step in steps])


def test_files_of_many_captions(default):
    captions = default.caption([PATHS[0], PATHS[0], PATHS[1]])
    names = ["a.jpg", "a.png", "b.jpg"]
    with zipfile.ZipFile(io.BytesIO(as_zip(names, captions))) as archive:
        assert archive.namelist() == ["a.jpg", "a-2.jpg", "b.jpg"]
        assert Image.open(io.BytesIO(archive.read("b.jpg"))).width > 300
    rows = [{"file": "=a.jpg", "caption": str(captions[0])}, {"file": "é.jpg", "error": "no, not a picture"}]
    table = list(csv.DictReader(io.StringIO(as_csv(rows).decode("utf-8-sig"))))
    assert [row["file"] for row in table] == ["'=a.jpg", "é.jpg"]  # a spreadsheet takes no name for a formula
    assert json.loads(as_json(rows)) == rows


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (4, 70_000), (70_000, 4), (1, 1)])
def test_a_thin_photo_is_shown_and_saved_as_small_as_others(small, size):
    caption = small.caption(Image.new("RGB", size, "red"), max_length=4)
    wordless = dataclasses.replace(caption, words=(), attention=caption.attention[:0])
    shown = view(caption)
    assert 1 <= shown["width"] <= 720
    assert 1 <= shown["height"] <= 1440
    with Image.open(io.BytesIO(base64.b64decode(shown["photo"].split(",")[1]))) as photo:
        assert photo.size == (shown["width"], shown["height"])
    with zipfile.ZipFile(io.BytesIO(as_zip(["a.png", "b.png"], [caption, wordless]))) as archive:
        for name in archive.namelist():
            width, height = Image.open(io.BytesIO(archive.read(name))).size
            assert width <= 5 * 230
            assert height <= 1440


def test_the_api_gives_what_the_library_gives(client, default):
    answer = ask(client, PATHS[1], captions=3)
    caption = default.caption(PATHS[1], alternatives=2)
    expected = json.loads(json.dumps(caption.to_dict(attention=True)))
    assert answer["caption"] == expected["caption"]
    assert answer["log_probability"] == pytest.approx(expected["log_probability"], abs=1e-4)
    assert [one["caption"] for one in answer["alternatives"]] == [one["caption"] for one in expected["alternatives"]]
    assert np.allclose(answer["attention"], expected["attention"], atol=1e-4)
    greedy = ask(client, PATHS[1], beam_size=1)
    assert greedy["caption"] == str(default.caption(PATHS[1], beam_size=1))
    assert greedy["alternatives"] == []


def test_the_api_draws_captions_by_a_seed(client, default):
    drawn = ask(client, PATHS[1], sampling=True, temperature=1.2, top_p=0.95, seed=7)
    assert drawn["caption"] == str(default.caption(PATHS[1], temperature=1.2, top_p=0.95, seed=7))


def test_the_api_captions_many_files_and_names_the_bad_ones(client, default, bad_files):
    paths = [PATHS[0], bad_files["not a picture"], PATHS[2]]
    files = [gradio_client.handle_file(str(path)) for path in paths]
    answers = client.predict(images=files, api_name="/caption_batch")
    assert [answer["file"] for answer in answers] == [path.name for path in paths]
    assert [answer.get("caption") for answer in answers] == [
        str(default.caption(PATHS[0])),
        None,
        str(default.caption(PATHS[2])),
    ]
    assert "not a picture" in answers[1]["error"]


def test_bad_uploads_get_a_sentence_and_the_server_lives_on(client, url, bad_files, tmp_path):
    for told, path in bad_files.items():
        answer = ask(client, path)
        assert told in answer["error"]
        assert "Traceback" not in json.dumps(answer)
    heavy = tmp_path / "heavy.jpg"
    heavy.write_bytes(PATHS[0].read_bytes() + bytes(100_000_000))
    with pytest.raises(Exception, match=r"(?i)maximum (allowed|file) size|413"):
        ask(client, heavy)
    assert "caption" in ask(client, PATHS[0])
    assert health(url)["status"] == "ok"


def test_a_setting_that_makes_no_sense_is_an_error_in_the_answer(client):
    assert "beam size" in ask(client, PATHS[0], beam_size=0)["error"]


def health(url):
    with urllib.request.urlopen(f"{url}/health") as answer:
        return json.load(answer)


def test_the_server_says_that_it_is_well(url):
    assert health(url) == {"status": "ok", "models": ["default"]}


@pytest.mark.parametrize("path", ["/etc/passwd", str(PATHS[0]), "../../etc/passwd", "app/__main__.py"])
def test_no_other_file_of_the_machine_is_served(url, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{url}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)


def upload(url) -> str:
    """Send a photograph over plain HTTP; the path by which the server knows it."""
    boundary = "----captioner"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + PATHS[0].read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/gradio_api/upload", body, headers)) as answer:
        return json.load(answer)[0]


def call(url, photo):
    """The answer of /caption over plain HTTP."""
    data = json.dumps({"data": [photo, "", 5, 1, 22, False, 1, 0.9, 0]}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/caption", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/caption/{event}") as answer:
        return answer.read().decode().splitlines()


@pytest.mark.parametrize("path", ["/etc/hostname", str(PATHS[0]), "app/assets/samples/cat.jpg"])
def test_the_api_captions_no_file_that_was_not_uploaded(url, path):
    lines = call(url, {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert json.loads(lines[1].removeprefix("data: ")) == [{"error": NOT_UPLOADED}]


def test_uploads_are_deleted_after_a_while(small):
    with run_app({"small": small}, keep_seconds=1) as address:
        uploaded = Path(upload(address))
        assert uploaded.is_file()
        until = time.monotonic() + 30
        call(address, {"path": str(uploaded), "meta": {"_type": "gradio.FileData"}})
        while uploaded.exists():
            assert time.monotonic() < until
            time.sleep(0.2)


def test_the_page_may_stand_behind_a_proxy(small):
    with run_app({"small": small}, root_path="/demo") as address, urllib.request.urlopen(f"{address}/config") as answer:
        assert json.load(answer)["root"].endswith("/demo")


def test_plain_http_works_as_the_readme_says(url, default):
    lines = call(url, {"path": upload(url), "meta": {"_type": "gradio.FileData"}})
    assert lines[0] == "event: complete"
    assert json.loads(lines[1].removeprefix("data: "))[0]["caption"] == str(default.caption(PATHS[0]))


def test_thirty_two_people_at_once_get_their_own_captions(url, default, tmp_path):
    paths = []
    for number in range(32):
        paths.append(tmp_path / f"{number}.png")
        photo = Image.open(PATHS[number % 3])
        photo.crop((number, 2 * number, photo.width - 3 * number, photo.height - number)).save(paths[-1])
    expected = [str(default.caption(path)) for path in paths]
    assert len(set(expected)) > 2
    start = threading.Barrier(32)

    def person(path):
        own = gradio_client.Client(url, verbose=False)
        start.wait(timeout=120)
        return ask(own, path)["caption"]

    with ThreadPoolExecutor(32) as people:
        assert list(people.map(person, paths)) == expected


def test_those_who_come_when_the_queue_is_full_are_told_so(small):
    gate = threading.Event()
    real = Captioner.caption

    class Slow(Captioner):
        def caption(self, *arguments, **options):
            gate.wait(timeout=60)
            return real(self, *arguments, **options)

    slow = Slow.__new__(Slow)
    slow.__dict__ = small.__dict__
    with run_app({"slow": slow}, queue=2) as address:
        client = gradio_client.Client(address, verbose=False)
        jobs = [
            client.submit(images=[gradio_client.handle_file(str(PATHS[0]))], api_name="/caption_batch")
            for _ in range(8)
        ]
        told = []
        for job in jobs[::-1]:
            try:
                job.result(timeout=5)
            except Exception as error:
                told.append(str(error))
        gate.set()
        assert any("full" in message.lower() for message in told)


def test_only_those_with_a_password_may_enter(small, tmp_path):
    path = tmp_path / "people"
    path.write_text("# who may enter\nann:secret:with colon\n")
    with run_app({"small": small}, auth=Passwords.read(str(path))) as address:
        with pytest.raises(Exception, match=r"(?i)auth|login|401"):
            gradio_client.Client(address, verbose=False)
        inside = gradio_client.Client(address, verbose=False, auth=("ann", "secret:with colon"))
        assert "caption" in ask(inside, PATHS[0])


def test_without_a_model_named_all_models_in_the_package_are_offered():
    assert parse([]).model == [model.name for model in list_models()]
    assert parse(["--model", "small"]).model == ["small"]


@pytest.mark.parametrize(
    ("models", "shown"),
    [
        (["base", "runs/mine"], ["base", "mine"]),
        (["runs/a/best", "small", "runs/b/best"], ["runs/a/best", "small", "runs/b/best"]),
        (["small", "./small"], ["small", "./small"]),
        (["."], ["."]),
        (["small", "small"], ["small"]),
    ],
)
def test_models_have_distinct_names_on_the_page(models, shown):
    assert by_display_name(models) == dict(zip(shown, dict.fromkeys(models), strict=True))


def test_models_of_the_same_folder_name_are_all_served(small, tmp_path, monkeypatch):
    folders = [str(tmp_path / run / "best") for run in "ab"]
    for folder in folders:
        small.save_pretrained(folder)
    served = []
    monkeypatch.setattr("app.server.create", lambda models, *_: served.extend(models))
    monkeypatch.setattr("app.server.configure", lambda *_, **__: SimpleNamespace(run=lambda: None))
    assert main(["--model", folders[0], "--model", folders[1]]) == 0
    assert served == folders


def test_wrong_usage_and_what_cannot_start_is_one_clear_line(tmp_path, capsys):
    assert parse([]).host == "127.0.0.1"
    with pytest.raises(SystemExit, match="2"):
        parse(["--port", "0"])
    assert main(["--model", "/no/such/model"]) == 1
    assert "app: there is no model '/no/such/model'" in capsys.readouterr().err
    for text, message in (("ann", "line 1"), ("\n", "names nobody")):
        (tmp_path / "people").write_text(text)
        assert main(["--auth-file", str(tmp_path / "people")]) == 1
        assert message in capsys.readouterr().err
