"""The page without a server: what it captions in Chromium is what the library captions."""

import base64
import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import PHOTOS, small_model
from PIL import Image
from playwright.sync_api import Page, expect
from test_browser import CHROMIUM, browser, picture, words  # noqa: F401  # browser is a fixture

from captioner import Captioner, cli, web
from captioner.checkpoint import Checkpoint
from captioner.engine import Step
from captioner.images import Preprocessing, load_image
from captioner.modelfile import MODEL_FILE, read_model, save_model
from captioner.search import beam_search
from captioner.vocabulary import PAD, Vocabulary

PATHS = sorted(PHOTOS.glob("*.jpg"))
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """What `python -m http.server` answers with, without its log."""

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def serve():
    """Serves a folder and gives its address."""
    servers = []

    def start(folder: Path) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def runtime() -> bytes:
    try:
        return web.read_runtime()
    except OSError as error:
        pytest.skip(f"needs npm, once: {error}")


@pytest.fixture(scope="module")
def site(runtime, tmp_path_factory) -> Path:
    """The page with the model `small`."""
    folder = tmp_path_factory.mktemp("site")
    assert cli.export(["small", "--web", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def library() -> Captioner:
    return Captioner.from_pretrained("small", engine="onnx-float32")


@pytest.fixture(scope="module")
def url(site, serve) -> str:
    return serve(site)


@pytest.fixture
def open_page(browser, url):  # noqa: F811
    """Opens the page; at the end nothing may have gone wrong in it, and no other host may have been asked."""
    contexts, problems = [], []

    def opened(**options) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.on("request", lambda request: asked(request.url))
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        contexts.append(context)
        page.goto(url)
        expect(page.get_by_role("status")).to_contain_text("Ready", timeout=120_000)
        return page

    def asked(address: str) -> None:
        if not address.startswith((url, "data:", f"blob:{url}")):
            problems.append(address)

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def upload(page: Page, path: Path) -> None:
    page.set_input_files("#file", str(path))


def wait(page: Page) -> None:
    expect(page.get_by_role("status")).to_contain_text("Captioned on this device", timeout=60_000)


@needs_chromium
def test_captions_are_the_librarys_and_need_no_server_once_the_page_is_loaded(open_page, library):
    page = open_page()
    page.context.set_offline(True)
    for caption in library.caption(PATHS):
        upload(page, caption.source)
        expect(page.get_by_role("status")).to_contain_text(caption.sentence())
        wait(page)
        assert words(page) == list(caption.words)
        found = [text.split("\n") for text in page.locator(".others button").all_inner_texts()]
        expected = [caption, *caption.alternatives]
        assert [text for text, _ in found] == [each.sentence() for each in expected]
        assert [note for _, note in found] == [f"confidence {100 * each.confidence:.0f} %" for each in expected]
    assert "trained on Flickr8k" in page.locator("footer").inner_text()


@needs_chromium
def test_a_word_shows_its_heatmap_when_it_has_the_focus_the_pointer_or_a_tap(open_page, library):
    page = open_page(has_touch=True)
    upload(page, PHOTOS / "photographer.jpg")
    wait(page)
    caption = library.caption(PHOTOS / "photographer.jpg")
    plain = picture(page)
    number = 1  # the first word after "a"
    word, canvas = page.locator(".words .word").nth(number), page.locator(".stage canvas")
    shown = {}
    for name, begin in {"focus": word.focus, "hover": word.hover, "tap": word.tap}.items():
        begin()
        expect(canvas).to_have_attribute("data-word", caption.words[number])
        shown[name] = picture(page)
        ours = caption.heatmap(number).resize((shown[name].shape[1], shown[name].shape[0]))
        assert np.abs(shown[name] - np.asarray(ours)).mean() < 4
        assert np.abs(shown[name] - plain).mean() > 5
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(2, 2)


@needs_chromium
def test_hidden_regions_are_not_looked_at(open_page, library):
    page = open_page()
    page.get_by_role("button", name="Cat").click()
    wait(page)
    before = words(page)
    page.get_by_role("button", name="Row 1, column 1").focus()
    hidden = [0, 1, 2, 10, 18, 17, 16, 24]
    for number, key in enumerate(["", *"Right Right Down Down Left Left Down".split()]):
        if key:
            page.keyboard.press(f"Arrow{key}")
        page.keyboard.press("Space")
        expect(page.locator(".regions [aria-pressed=true]")).to_have_count(number + 1)
    wait(page)
    hide = np.zeros(library.config.grid, dtype=bool)
    hide.flat[hidden] = True
    caption = library.caption(PHOTOS / "cat.jpg", hide=hide)
    expect(page.locator(".words:not(.before) .word")).to_have_text(list(caption.words))
    expect(page.locator(".before .word")).to_have_text(before)
    expect(page.get_by_role("button", name="Row 4, column 1")).to_be_focused()
    page.get_by_role("button", name="Show all regions").click()
    expect(page.locator(".regions [aria-pressed=true]")).to_have_count(0)
    wait(page)
    assert words(page) == before


@needs_chromium
def test_what_the_words_rest_on_is_shown_once_it_is_asked_for(open_page, library):
    def shows(*captions):
        status = page.get_by_role("status")
        expect(status).not_to_contain_text("What it used")
        expect(status).to_contain_text("What it used was measured on this device", timeout=60_000)
        for line, caption in zip((".words:not(.before)", ".words.before"), captions, strict=False):
            titles = [each.get_attribute("title") for each in page.locator(f"{line} .word").all()]
            peaks = [float(re.search(r"largest evidence ([\d.]+) nats", title)[1]) for title in titles]
            assert peaks == pytest.approx(caption.evidence.max(axis=(1, 2)), abs=6e-3)

    page = open_page()
    path = PHOTOS / "cat.jpg"
    upload(page, path)
    wait(page)
    whole = library.caption(path, evidence=True, keep_annotations=True)
    page.get_by_role("button", name="What it used").click()
    expect(page.locator(".legend")).to_contain_text("Being measured.")
    shows(whole)
    number = int(whole.evidence.max(axis=(1, 2)).argmax())
    page.locator(".words .word").nth(number).hover()
    expect(page.locator(".stage canvas")).to_have_attribute("data-word", whole.words[number])
    shown = picture(page)
    ours = whole.heatmap(number, of="evidence").resize((shown.shape[1], shown.shape[0]))
    assert np.abs(shown - np.asarray(ours)).mean() < 4
    page.get_by_role("button", name="Row 4, column 4").click()
    hide = np.zeros(library.config.grid, dtype=bool)
    hide[3, 3] = True
    shows(library.caption(whole, evidence=True, hide=hide), whole)
    upload(page, PHOTOS / "photographer.jpg")
    shows(library.caption(PHOTOS / "photographer.jpg", evidence=True))
    page.get_by_role("button", name="Where it looked").click()
    assert "weight" in page.locator(".words .word").first.get_attribute("title")


@needs_chromium
def test_photos_can_be_dropped_and_pasted_and_what_is_none_gets_a_sentence(open_page, library, tmp_path):
    page = open_page()
    (tmp_path / "text.jpg").write_text("no picture")
    upload(page, tmp_path / "text.jpg")
    expect(page.get_by_role("alert")).to_have_text("This file is not a picture that the browser can read.")
    for path, event in zip(PATHS, ("drop", "paste"), strict=False):
        data = base64.b64encode(path.read_bytes()).decode()
        page.evaluate(
            """async ([data, event]) => {
                const files = new DataTransfer();
                files.items.add(new File([await (await fetch(`data:image/jpeg;base64,${data}`)).blob()], "photo"));
                document.body.dispatchEvent(event === "drop"
                    ? new DragEvent(event, { dataTransfer: files, bubbles: true })
                    : new ClipboardEvent(event, { clipboardData: files, bubbles: true }));
            }""",
            [data, event],
        )
        expect(page.get_by_role("status")).to_contain_text(library.caption(path).sentence())
        expect(page.get_by_role("alert")).to_be_empty()


@needs_chromium
def test_the_page_fits_a_phone_and_has_no_serious_barrier_in_either_scheme(open_page):
    page = open_page()
    page.set_viewport_size({"width": 375, "height": 800})
    page.get_by_role("button", name="Astronaut").click()
    wait(page)
    page.get_by_role("button", name="Row 4, column 4").click()
    expect(page.locator(".before .word").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (np.mean([int(part) for part in re.findall(r"\d+", background)[:3]]) < 80) == (scheme == "dark")
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [each["id"] for each in found if each["impact"] in ("serious", "critical")] == []


@pytest.fixture(scope="module")
def module(browser, serve, site):  # noqa: F811
    """Calls a function of the page's modules outside the page."""
    page = browser.new_page()
    page.goto(serve(site) + "settings.json")

    def call(code: str, *values):
        return page.evaluate(f"async (values) => {{ {code} }}", list(values))

    yield call
    page.close()


def photo_cases():
    noise = np.random.default_rng(0).integers(0, 256, (150, 333, 4), dtype=np.uint8)
    pictures = {
        "larger": Image.fromarray(noise[..., :3]),
        "smaller": Image.fromarray(noise[:5, :70, :3]),
        "higher": Image.fromarray(noise[:, :9, :3]),
        "one": Image.fromarray(noise[:1, :1, :3]),
        "grey": Image.fromarray(noise[..., 0]),
        "transparent": Image.fromarray(noise),
    }
    for name, image in pictures.items():
        file = io.BytesIO()
        image.save(file, "PNG")
        yield pytest.param(file.getvalue(), 1 if name == "transparent" else 0, id=name)
    for turn in (3, 6):
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.open(PATHS[0]).save(file, "JPEG", exif=exif, quality=90)
        yield pytest.param(file.getvalue(), 2, id=f"orientation {turn}")


@needs_chromium
@pytest.mark.parametrize(("data", "tolerance"), list(photo_cases()))
def test_photos_are_resized_as_pillow_does_it(module, data, tolerance):
    """To the same bytes; where decoding or blending differs between libraries, within a tolerance."""
    found = module(
        """const { readPhoto, resizePhoto } = await import("./photo.js");
        const bytes = Uint8Array.from(atob(values[0]), (letter) => letter.charCodeAt(0));
        return Array.from(resizePhoto(await readPhoto(new Blob([bytes])), 60, 44));""",
        base64.b64encode(data).decode(),
    )
    expected = np.asarray(Preprocessing(size=(44, 60)).resize(load_image(data)))
    assert np.abs(np.reshape(found, (44, 60, 3)) - expected.astype(int)).max() <= tolerance


TABLE = np.random.default_rng(0).normal(0, 2, (101, 12)).astype(np.float32)


class State(NamedTuple):
    code: np.ndarray


class TableDecoder:
    """A decoder whose next scores are a row of `TABLE`, which depends on all words before."""

    heads = 1

    def encode(self, *_):
        """Nothing."""

    def initial_state(self, memory, rows):
        return State(np.zeros((1, rows, 1), dtype=np.int64))

    def step(self, memory, state, tokens):
        code = (7 * state.code + tokens[..., None]) % 101
        return Step(TABLE[code[..., 0]], State(code), np.ones((*tokens.shape, 1, 1), dtype=np.float32))


@needs_chromium
def test_the_search_has_the_rules_of_the_library(module):
    options = [
        {"beam_size": beams, "max_length": length, "length_penalty": penalty, "block_ngrams": block}
        for beams, length, penalty, block in itertools.product((1, 3, 5), (4, 12), (0, 1, 2.5), (0, 1, 2, 3))
    ]
    found = module(
        """const { beamSearch } = await import("./search.js");
        const { Tensor } = await import("./onnxruntime/ort.js");
        const [table, options] = values;
        const state = (codes) => ({ code: new Tensor("float32", codes, [1, codes.length, 1]) });
        const engine = {
            encode: async () => ({ state: state([0]) }),
            step: async (_, { code }, tokens) => {
                const codes = tokens.map((token, row) => (7 * code.data[row] + token) % 101);
                return { logits: codes.map((each) => [...table[each]]), alphas: codes, state: state(codes) };
            },
        };
        return Promise.all(options.map((each) => beamSearch(engine, null, null, each)));""",
        TABLE.tolist(),
        options,
    )
    best = set()
    for theirs, option in zip(found, options, strict=True):
        ours = beam_search(TableDecoder(), np.zeros((1, 1, 1), dtype=np.float32), **option)
        words = [[word for word in row if word != PAD] for row in ours.words[0].tolist()]
        assert [each["words"] for each in theirs] == words, option
        assert [each["score"] for each in theirs] == pytest.approx(ours.scores[0].tolist(), abs=1e-5)
        best.add(str(words[0]))
    assert len(best) > 4  # the options matter


@needs_chromium
def test_evidence_is_the_librarys(module, library):
    hidden = [[], [0, 1, 9, 10, 63], sorted({*range(64)} - {27, 28, 35, 36})]  # of four regions a window leaves none
    path = PHOTOS / "photographer.jpg"
    code = """const { Captioner } = await import("./captioner.js");
        const { measureEvidence } = await import("./evidence.js");
        const photo = await (await fetch(`data:image/jpeg;base64,${values[0]}`)).blob();
        const captioner = await Captioner.load();
        const measured = ({ words, mask }, wanted) => {
            const { engine, annotations, grid } = captioner;
            return measureEvidence(engine, annotations, mask, words, { grid, window: 3, wanted });
        };
        const plain = (maps) => maps.map((map) => Array.from(map));
        await captioner.caption(photo, []);
        const found = [plain(await measured(captioner.whole, () => true))];
        for (const hidden of values[1].slice(1)) {
            await captioner.caption(null, hidden);
            found.push(plain(await measured(captioner.without, () => true)));
        }
        return [...found, await measured(captioner.whole, () => false)];"""
    *found, stopped = module(code, base64.b64encode(path.read_bytes()).decode(), hidden)
    for theirs, regions in zip(found, hidden, strict=True):
        hide = np.isin(range(64), regions).reshape(8, 8)
        evidence = library.caption(path, evidence=True, hide=hide).evidence
        assert np.abs(np.reshape(theirs, evidence.shape) - evidence).max() < 1e-3
        assert evidence.max() > 0.1
    assert stopped is None


@needs_chromium
def test_a_model_with_several_heads_gets_its_graphs_for_the_page_alone(browser, serve, runtime, tmp_path):  # noqa: F811
    vocabulary = Vocabulary(["it", "'s", "ca", "n't", *(f"word{number}" for number in range(32))])
    sizes = {"attention_size": 12, "hidden_size": 12, "heads": 3, "attention_options": {"heads": 3}}
    network = small_model(len(vocabulary), decoder="transformer", attention="multi_head", **sizes)
    with torch.no_grad():
        for weights in network.decoder.parameters():
            weights.mul_(3)  # so that regions and words differ
        for weights in network.state_dict().values():
            weights.copy_(weights.half())  # as on the page
    model = Captioner(Checkpoint(network, vocabulary, Preprocessing(size=(64, 64))))
    model.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert cli.export([str(tmp_path / "model"), "--web", str(tmp_path / "site")]) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    page = browser.new_page()
    page.goto(serve(tmp_path / "site") + "settings.json")
    for path in PATHS:
        found = page.evaluate(
            """async (data) => {
                const { Captioner } = await import("./captioner.js");
                const photo = await (await fetch(`data:image/jpeg;base64,${data}`)).blob();
                const captioner = await Captioner.load();
                await captioner.caption(photo, []);
                return captioner.measure(() => true);
            }""",
            base64.b64encode(path.read_bytes()).decode(),
        )
        caption = model.caption(path, evidence=True)
        assert [word["evidence"]["peak"] for word in found["captions"][0]["words"]] == pytest.approx(
            caption.evidence.max(axis=(1, 2)), abs=1e-3
        )
        assert caption.evidence.max() > 1e-2
        assert found["heads"] == caption.heads > 1
        for ours, theirs in zip([caption, *caption.alternatives], found["captions"], strict=True):
            assert theirs["text"] == ours.sentence()
            assert theirs["logProbability"] == pytest.approx(ours.log_probability, abs=2e-3)
            for number, word in enumerate(theirs["words"]):
                assert word["word"] == ours.words[number]
                maps = [ours.maps(head)[number] for head in (None, *range(ours.heads))]
                peaks = [weights.max() * weights.size for weights in maps]
                assert [each["peak"] for each in word["maps"]] == pytest.approx(peaks, abs=1e-2)
    page.close()


def test_a_model_with_graphs_needs_no_package_for_its_page(runtime, small_folder, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model" / MODEL_FILE
    model.parent.mkdir()
    shutil.copy(small_folder / MODEL_FILE, model)
    command = [str(model), "--web", str(tmp_path / "site")]
    assert cli.export([str(model)]) == 0
    assert capsys.readouterr().out == f"wrote the graphs into {model}\n"
    description, weights = read_model(model)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.export(command) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'site'}" in out
    assert f"python3 -m http.server --directory {tmp_path / 'site'}" in out
    assert read_model(tmp_path / "site" / MODEL_FILE)[0].graphs == description.graphs
    step = description.graphs.step
    old = step._replace(model=step.model.replace(b"decoder.output_bias", web.ONE_FILE))
    save_model(model, dataclasses.replace(description, graphs=description.graphs._replace(step=old)), weights)
    assert cli.export(command) == 2
    assert "pip install 'captioner[export]'" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.export(command) == 0
    assert read_model(tmp_path / "site" / MODEL_FILE)[0].graphs.step == step


@needs_chromium
def test_maps_are_smoothed_as_in_the_demo(module):
    from app.rendering import MAP_SIZE, packed_map

    weights = np.random.default_rng(0).dirichlet(np.ones(30)).reshape(5, 6).astype(np.float32)
    for values, *options in ((weights, (0.0, 0.0), 30), (weights, (0.1, 0.26), 30), (0 * weights, (0.1, 0.26))):
        code = "return (await import('./heatmap.js')).mapBytes(values.shift(), 5, 6, ...values);"
        found, expected = module(code, values.flatten().tolist(), *options), packed_map(values, *options)
        assert found["peak"] == pytest.approx(expected["peak"], rel=1e-5)
        ours, theirs = (np.frombuffer(base64.b64decode(each["bytes"]), np.uint8) for each in (expected, found))
        assert len(ours) == MAP_SIZE**2
        assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_the_page_is_small_and_has_the_licence_of_what_it_copies(site):
    files = [path for path in site.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    assert "Microsoft" in (site / "onnxruntime" / "LICENSE").read_text()
    assert not [path for path in files if path.suffix == ".py"]
    assert json.loads((site / "settings.json").read_text())["search"]["beam_size"] == 5


PACKAGE = b"a package"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """What npm fetches is this file, with something else in it than the real package; the cache is empty."""
    path = tmp_path / "package.tgz"
    path.write_bytes(PACKAGE)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack {web.RUNTIME_PACKAGE}" ] && cp {path} "$4/{web.RUNTIME}"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return path


def test_the_runtime_is_fetched_once(package, monkeypatch):
    monkeypatch.setattr(web, "RUNTIME_SHA512", base64.b64encode(hashlib.sha512(PACKAGE).digest()).decode())
    assert web.read_runtime() == PACKAGE
    package.unlink()
    assert web.read_runtime() == PACKAGE


def test_a_package_that_is_not_the_one_that_is_pinned_is_refused(package, tmp_path, capsys):
    for options in ([], ["--onnxruntime-web", str(package)]):
        assert cli.export(["small", "--web", str(tmp_path / "site"), *options]) == 2
        assert "another checksum" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()
    assert not (tmp_path / "cache").exists()


def test_where_npm_fails_the_command_says_what_to_do(package, tmp_path, capsys):
    package.unlink()
    assert cli.export(["small", "--web", str(tmp_path / "site")]) == 2
    assert "--onnxruntime-web" in capsys.readouterr().err
    assert cli.export(["small", "--web", str(tmp_path / "site"), "--onnxruntime-web", str(package)]) == 2
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.export(["small", "--onnxruntime-web", str(package)])
