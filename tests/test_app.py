"""The demo's server: captions as data, the API, many people at once, and what it refuses."""

import base64
import contextlib
import csv
import dataclasses
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import gradio_client
import numpy as np
import pytest
from conftest import PHOTOS, run_app, small_model
from PIL import Image

from app.__main__ import by_display_name, main, parse
from app.benchmark import (
    HealthWatch,
    bad_cases,
    call,
    draw_photos,
    good_cases,
    send_half,
    soak,
    start,
    upload,
    wait_for,
)
from app.handlers import Handlers
from app.page import build
from app.rendering import PHOTO_WIDTH, as_csv, as_json, as_zip, viewer_result
from app.server import STOPPED
from app.service import FAILED, Refused, Service, Settings, settings_of
from captioner import Caption, Captioner, list_models, reading
from captioner.checkpoint import Checkpoint
from captioner.explain import explain, normalised_entropy

PATHS = sorted(PHOTOS.glob("*.jpg"))
DEFAULTS = (5, 3, 22, False, 1.0, 0.9, 0)


@pytest.fixture(scope="module")
def default() -> Captioner:
    return Captioner.from_pretrained()


@pytest.fixture(scope="module")
def exact() -> Captioner:
    """Without matrices in 8 bits, so that numbers do not depend on what is computed together."""
    return Captioner.from_pretrained(engine="onnx-float32")


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


def test_what_goes_wrong_with_one_photo_does_not_lose_the_others(small, monkeypatch, caplog, tmp_path):
    """The second photo fails as it is read, the third as it goes through the network."""
    real_load, real_caption = reading.load_reduced, Captioner.caption_photos
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    paths = [str(PATHS[0]), str(PATHS[1]), str(tmp_path / "red.png"), str(PATHS[2])]
    expected = [str(caption) for caption in small.caption(paths)]

    def load(path, *options, **more):
        if path == paths[1]:
            raise PermissionError(path)
        return real_load(path, *options, **more)

    def caption(self, photos, *arguments, **options):
        if any(photo.pixels.getextrema() == ((255, 255), (0, 0), (0, 0)) for photo in photos):
            raise RuntimeError("no memory")
        return real_caption(self, photos, *arguments, **options)

    monkeypatch.setattr(reading, "load_reduced", load)
    monkeypatch.setattr(Captioner, "caption_photos", caption)
    answers = Service({"small": small}).caption([(path, Settings(captions=1)) for path in paths])
    assert [str(answer) for answer in answers] == [expected[0], FAILED, FAILED, expected[3]]
    assert "PermissionError" in caplog.text
    assert "RuntimeError: no memory" in caplog.text
    assert caplog.text.count("Traceback") >= 2


def test_a_group_of_settings_that_fails_does_not_lose_the_other_groups(small, monkeypatch):
    real = Captioner.caption

    def caption(self, images, **options):
        if options["max_length"] == 7:
            raise RuntimeError("seven")
        return real(self, images, **options)

    monkeypatch.setattr(Captioner, "caption", caption)
    path = str(PATHS[0])
    requests = [
        (path, Settings()),
        (path, Settings(max_length=7)),
        (path, Refused("No.")),
        (Refused("Never."), Settings()),
    ]
    answers = Service({"small": small}).caption([*requests, (path, Settings())])
    assert [str(answer) for answer in answers[1:4]] == [FAILED, "No.", "Never."]
    assert answers[0] == answers[4]


def test_large_photos_are_kept_small_and_captioned_as_the_library_does(small, tmp_path):
    path = tmp_path / "large.png"
    Image.open(PATHS[0]).resize((3000, 2100)).save(path)
    service = Service({"small": small})
    (answer,) = service.caption([(str(path), Settings(beam_size=3))], keep_annotations=True)
    expected = small.caption(path, beam_size=3, keep_annotations=True)
    assert answer.words == expected.words
    assert np.array_equal(answer.attention, expected.attention)
    assert {one.image.size for one in (answer, *answer.alternatives)} == {(1024, 717)}
    assert tuple(viewer_result([answer])[side] for side in ("width", "height")) == (
        PHOTO_WIDTH,
        round(2100 * PHOTO_WIDTH / 3000),
    )
    ours, theirs = service.explain(answer, "small"), explain(small, expected)
    assert [step.to_dict() for step in ours] == [step.to_dict() for step in theirs]


def test_a_photo_goes_through_the_encoder_once_for_its_caption_and_its_steps(small):
    """Three people ask the page for captions, which come with the numbers of every step."""
    encoded = []
    hook = small.model.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    functions = [one.fn for one in build(Handlers(Service({"small": small}))).fns.values()]
    show_photo = next(one for one in functions if getattr(one, "__name__", "") == "show_photo")
    paths = [str(path) for path in PATHS[:3]]
    views, steps = show_photo(paths, [["small"]] * 3, *([value] * 3 for value in DEFAULTS), [None] * 3)
    hook.remove()
    assert sum(encoded) == 3
    for shown, numbers in zip(views, steps, strict=True):
        words = [word["word"] for word in shown["results"][0]["captions"][0]["words"]]
        (board,) = numbers["boards"]
        assert [step["word"] for step in board["steps"]][: len(words)] == words


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
    shown = viewer_result([caption])
    assert [each["text"] for each in shown["captions"]] == [one.sentence() for one in (caption, *caption.alternatives)]
    for each in shown["captions"]:
        for word in each["words"]:
            (packed,) = word["maps"]
            heat = np.frombuffer(base64.b64decode(packed["bytes"]), np.uint8)
            assert heat.shape == (28 * 28,)
            assert heat.max() == 255
            assert 0 < word["probability"] <= 1
    assert shown["regions"] == caption.attention[0].size
    peaks = [word["maps"][0]["peak"] for word in shown["captions"][0]["words"]]
    assert peaks == pytest.approx([weights.max() / weights.mean() for weights in caption.attention], rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"block_ngrams": 1}, {"block_ngrams": 0}, {"temperature": 0.7, "top_p": 0.8, "seed": 1}]
)
def test_the_numbers_of_each_step_are_those_that_made_the_caption(exact, options):
    caption = exact.caption(PATHS[2], keep_annotations=True, **options)
    steps = explain(exact, caption)
    assert [step.word for step in steps] == [*caption.words, "<end>"]
    said = []
    for step, told in zip(steps, caption.word_log_probabilities, strict=True):
        probabilities = dict(step.candidates)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert all(probability > 0 for probability in probabilities.values())
        if step.word in probabilities:
            assert np.log(probabilities[step.word]) == pytest.approx(told, abs=1e-4)
        if options.get("block_ngrams") == 1:
            assert probabilities.keys().isdisjoint(said)
        said.append(step.word)
    for step, weights in zip(steps, caption.attention, strict=False):
        assert np.allclose(step.weights, weights, atol=1e-5)
        (entropy,) = step.entropies
        assert entropy == pytest.approx(-(weights * np.log(weights)).sum() / np.log(weights.size), abs=1e-4)
        softmax = np.exp(step.scores - step.scores.max())
        assert np.allclose(softmax / softmax.sum(), weights, atol=1e-5)
        assert 0 < step.beta < 1
    assert json.dumps([step.to_dict() for step in steps])


def test_a_caption_that_was_cut_has_no_step_for_its_end(default):
    caption = default.caption(PATHS[2], max_length=3, keep_annotations=True)
    assert len(caption.words) == 3
    assert [step.word for step in explain(default, caption)] == list(caption.words)


def test_alternatives_and_captions_of_others_are_explained_too(exact):
    caption = exact.caption(PATHS[0], beam_size=3, keep_annotations=True)
    for one in caption.alternatives:
        assert [step.word for step in explain(exact, one)] == [*one.words, "<end>"]
    forced = exact.teacher_forced(PATHS[0], "a dog on a dog on a dog", keep_annotations=True)
    for step, weights in zip(explain(exact, forced), forced.attention, strict=False):
        assert np.allclose(step.weights, weights, atol=1e-5)


def test_a_caption_without_annotation_vectors_cannot_be_explained(small):
    with pytest.raises(ValueError, match="keep_annotations=True"):
        explain(small, small.caption(PATHS[0]))


def test_the_entropy_of_a_map_is_a_share_of_an_even_maps():
    assert normalised_entropy(np.full((2, 3), 1 / 6)) == pytest.approx(1)
    assert normalised_entropy(np.array([[0.0, 1.0], [0.0, 0.0]])) == 0
    assert normalised_entropy(np.array([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)
    assert normalised_entropy(np.ones((1, 1))) == 0


@pytest.mark.parametrize("options", [{}, {"decoder": "transformer", "heads": 2}])
def test_each_head_has_an_entropy_and_their_mean_is_the_most_even(small, options):
    options |= {"attention": "multi_head", "attention_options": {"heads": 2}}
    network = small_model(len(small.vocabulary), **options, annotation_size=12, hidden_size=12, attention_size=12)
    heads = Captioner(Checkpoint(network, small.vocabulary, small.preprocessing))
    caption = heads.caption(PATHS[0], max_length=3, keep_annotations=True)
    for step in explain(heads, caption):
        mean, *each = step.entropies
        assert len(each) == caption.heads
        assert mean >= np.mean(each) - 1e-6


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
    shown = viewer_result([caption])
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


def test_uploads_are_deleted_after_a_while(small, tmp_path):
    (own,) = draw_photos(tmp_path, 1)
    with run_app({"small": small}, keep_seconds=1) as address:
        photo = upload(address, own)
        uploaded = Path(photo["path"])
        assert uploaded.is_file()
        assert "caption" in call(address, photo)
        until = time.monotonic() + 30
        with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc)) as connection:
            send_half(connection, PATHS[1])
            while not list(uploaded.parents[1].glob("tmp*")):
                assert time.monotonic() < until
                time.sleep(0.01)
        while uploaded.exists() or list(uploaded.parents[1].glob("tmp*")):
            assert time.monotonic() < until
            time.sleep(0.2)
        samples = [
            button["props"]["icon"]["url"] for button in config(address)["components"] if "icon" in button["props"]
        ]
        for sample in filter(None, samples):
            assert urllib.request.urlopen(sample).status == 200


def config(url):
    with urllib.request.urlopen(f"{url}/config") as answer:
        return json.load(answer)


def test_the_page_may_stand_behind_a_proxy(small):
    with run_app({"small": small}, root_path="/demo") as address, urllib.request.urlopen(f"{address}/config") as answer:
        assert json.load(answer)["root"].endswith("/demo")


def test_plain_http_works_as_the_readme_says(url, default):
    assert call(url, upload(url, PATHS[0]))["caption"] == str(default.caption(PATHS[0]))


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


def test_each_of_many_photos_is_encoded_once_for_the_gallery(small, monkeypatch):
    """Three steps of eight photos each; after every step the gallery shows all photos that are done."""
    encoded = []
    real = Image.Image.save

    def save(self, file, kind=None, **options):
        encoded.append(str(kind).lower())
        return real(self, file, kind, **options)

    with run_app({"small": small}) as url:
        function = next(one for one in config(url)["dependencies"] if len(one["outputs"]) == 5)
        photo = upload(url, PATHS[0])
        monkeypatch.setattr(Image.Image, "save", save)
        messages = run(url, function["id"], [[photo] * 24, [], 1, 1, 5, False, 1, 0.9, 0])
    pictures = [message["output"]["data"] for message in messages if message["msg"] == "process_generating"]
    assert len(pictures) >= 3
    assert encoded.count("webp") == 24
    assert len(encoded) == 24 + 24  # the other half is in the ZIP


def run(url, function, data):
    """Call one of the page's functions as the page does; all messages."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": "s"}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=s", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_good_and_bad_requests_of_many_clients_get_what_they_should(small, tmp_path):
    """The small brother of `python -m app.benchmark --soak 2000`."""
    photos = draw_photos(tmp_path, 6)
    before = threading.active_count()
    with run_app({"small": small}) as url:
        with HealthWatch(url) as health:
            done = soak(url, good_cases(small, photos), bad_cases(tmp_path, photos[0]), clients=8, requests=60)
        assert health.asked > 0
        assert "caption" in call(url, upload(url, photos[0]))
    assert done.total() == 60
    assert done["broken off"] == 6
    assert done["good"] >= 40
    until = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.1)


class Held(Captioner):
    """A captioner that waits until it may go on."""

    def __init__(self, captioner: Captioner) -> None:
        self.__dict__ |= captioner.__dict__
        self.gate = threading.Event()

    def caption(self, *arguments, **options):
        self.gate.wait(timeout=120)
        return super().caption(*arguments, **options)


def test_health_answers_while_every_thread_is_busy(small):
    held = Held(small)
    with run_app({"held": held}) as url:
        photo = upload(url, PATHS[0])
        for _ in range(50):
            start(url, photo)
        assert health(url)["status"] == "ok"
        held.gate.set()


def test_those_who_wait_when_the_server_stops_hear_of_it(small, monkeypatch):
    """One is being captioned, three wait in the queue, and a page is open."""
    monkeypatch.setattr("app.server.GRACE_SECONDS", 0.5)
    held = Held(small)
    with ThreadPoolExecutor(5) as people:
        with run_app({"held": held}) as url:
            photo = upload(url, PATHS[0])
            waiting = [people.submit(call, url, photo) for _ in range(4)]
            page = people.submit(lambda: urllib.request.urlopen(f"{url}/gradio_api/heartbeat/s", timeout=60).read())
            time.sleep(1)
            started = time.monotonic()
        assert time.monotonic() - started < 9  # the end does not wait for the network
        for one in waiting:
            assert STOPPED in one.result(timeout=5)["error"]
        assert page.result(timeout=5)
        held.gate.set()


def test_those_who_are_nearly_done_when_the_server_stops_get_their_captions(small):
    held = Held(small)
    with ThreadPoolExecutor(2) as people:
        with run_app({"held": held}) as url:
            photo = upload(url, PATHS[0])
            waiting = [people.submit(call, url, photo) for _ in range(2)]
            time.sleep(1)
            threading.Timer(0.5, held.gate.set).start()
        assert all("caption" in one.result(timeout=5) for one in waiting)


@contextlib.contextmanager
def program(model, folder, port):
    """The demo in a process of its own, which has to end by itself and to leave nothing behind in `folder`."""
    environment = {**os.environ, "TMPDIR": str(folder)}
    del environment["GRADIO_TEMP_DIR"]
    command = [sys.executable, "-m", "app", "--model", str(model), "--port", str(port)]
    server = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(f"http://127.0.0.1:{port}", server)
        yield server
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        errors = server.communicate()[1]
    assert not list(folder.iterdir())
    assert "Traceback" not in errors


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_the_program_ends_when_told_to_and_leaves_no_upload(small_folder, tmp_path, kind):
    port = free_port()
    with program(small_folder, tmp_path, port) as server:
        uploaded = Path(upload(f"http://127.0.0.1:{port}", PATHS[0])["path"])
        assert uploaded.is_relative_to(tmp_path)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/gradio_api/heartbeat/s", timeout=60):
            server.send_signal(kind)
            assert server.wait(timeout=30) == 0


def test_a_restart_under_load_leaves_nobody_without_an_answer(small, small_folder, tmp_path):
    """Sixteen clients send one photo after another; each gets captions until it hears that the server has stopped."""
    port, answered = free_port(), threading.Barrier(17)
    url = f"http://127.0.0.1:{port}"

    def ask_until_the_end(photo):
        expected = str(small.caption(photo))
        assert call(url, upload(url, photo))["caption"] == expected
        answered.wait(timeout=120)
        while True:
            try:
                answer = call(url, upload(url, photo))
            except (OSError, http.client.HTTPException) as error:
                return type(error).__name__
            if "error" in answer:
                assert STOPPED in answer["error"]
                return STOPPED
            assert answer["caption"] == expected

    photos = draw_photos(tmp_path, 16)
    (tmp_path / "server").mkdir()
    with ThreadPoolExecutor(16) as people:
        with program(small_folder, tmp_path / "server", port) as server:
            clients = [people.submit(ask_until_the_end, photo) for photo in photos]
            answered.wait(timeout=120)
            time.sleep(1)
            server.terminate()
        for client in clients:
            assert client.result(timeout=30)
    with program(small_folder, tmp_path / "server", port) as server:
        assert call(url, upload(url, photos[0]))["caption"] == str(small.caption(photos[0]))
        server.terminate()


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
        (["runs/a/best", "runs/a/best"], ["best"]),
        (["runs/a/best/", "runs/b/best/"], ["runs/a/best/", "runs/b/best/"]),
        (["runs/a/best/", "runs/b/other/"], ["best", "other"]),
        (["base", "runs/base", "small"], ["base", "runs/base", "small"]),
    ],
)
def test_models_have_distinct_names_on_the_page(models, shown):
    assert by_display_name(models) == dict(zip(shown, dict.fromkeys(models), strict=True))


def test_models_of_the_same_folder_name_are_all_served(small, tmp_path, monkeypatch):
    folders = [str(tmp_path / run / "best") for run in "ab"]
    for folder in folders:
        small.save_pretrained(folder)
    served = []
    monkeypatch.setattr("app.server.create", lambda models, *_, **__: served.extend(models))
    monkeypatch.setattr("app.server.configure", lambda *_, **__: SimpleNamespace(run=lambda: None))
    assert main(["--model", folders[0], "--model", folders[1]]) == 0
    assert served == folders


def test_wrong_usage_and_what_cannot_start_is_one_clear_line(tmp_path, capsys):
    assert parse([]).host == "127.0.0.1"
    with pytest.raises(SystemExit, match="2"):
        parse(["--port", "0"])
    assert main(["--model", "/no/such/model"]) == 1
    assert ": there is no model '/no/such/model'" in capsys.readouterr().err
    for text, message in (("ann", "line 1"), ("\n", "names nobody")):
        (tmp_path / "people").write_text(text)
        assert main(["--auth-file", str(tmp_path / "people")]) == 1
        assert message in capsys.readouterr().err


def test_a_model_that_needs_a_package_which_is_missing_is_one_clear_line(monkeypatch, capsys):
    def from_pretrained(*_):
        raise ImportError("this needs PyTorch: pip install 'captioner[torch]'")

    monkeypatch.setattr(Captioner, "from_pretrained", from_pretrained)
    assert main([]) == 1
    assert capsys.readouterr().err == "python -m app: this needs PyTorch: pip install 'captioner[torch]'\n"
