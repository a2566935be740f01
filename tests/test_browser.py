"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import base64
import io
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import PHOTOS, run_app, small_model
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from app.server import SAMPLES
from captioner import Captioner
from captioner.checkpoint import Checkpoint
from captioner.explain import explain
from captioner.images import Preprocessing
from captioner.vocabulary import Vocabulary

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync".split()
PHOTO = PHOTOS / "photographer.jpg"
SCREENSHOTS = os.environ.get("CAPTIONER_SCREENSHOTS")  # folder for the pictures of the READMEs: .readme

expect.set_options(timeout=20_000)  # slow machines are no failures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def default() -> Captioner:
    return Captioner.from_pretrained("small")  # the faster one


@pytest.fixture(scope="module")
def url(default):
    """The page with the default model and one of several heads."""
    network = small_model(len(default.vocabulary), attention="multi_head", attention_options={"heads": 2})
    network.encoder.load_state_dict(Captioner.from_pretrained("small", engine="torch").model.encoder.state_dict())
    with torch.no_grad():
        for part in network.decoder.attention.parameters():
            part.mul_(8)  # random weights look everywhere alike
    heads = Captioner(Checkpoint(network, default.vocabulary, Preprocessing(size=(64, 64))))
    with run_app({"default": default, "heads": heads}, max_upload_mb=2) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, url):
    """Opens the page; at the end nothing may have gone wrong in it, and no other host may have been asked."""
    pages, problems = [], []

    def opened(**options) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True, **options)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if leaves(request.url, url) else None)
        page.goto(url)
        page.wait_for_selector("#photo input[type=file]", state="attached")
        pages.append(context)
        return page

    yield opened
    for context in pages:
        context.close()
    assert problems == []


def leaves(address: str, url: str) -> bool:
    return not address.startswith((url, "data:", "blob:"))


def upload(page: Page, path: Path = PHOTO) -> None:
    page.set_input_files("#photo input[type=file]", str(path))


def words(page: Page, result: int = 0) -> list[str]:
    page.wait_for_selector("#viewer .word")
    return page.locator("#viewer .result").nth(result).locator(".word").all_inner_texts()


def picture(page: Page) -> np.ndarray:
    """What the large canvas shows."""
    address = page.locator("#viewer .stage canvas").first.evaluate("canvas => canvas.toDataURL('image/png')")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")).astype(int)


def test_a_photo_is_captioned_and_each_word_lights_up_what_it_looked_at(open_page, default):
    page = open_page()
    upload(page)
    caption = default.caption(PHOTO, alternatives=2)
    assert words(page) == list(caption.words)
    page.mouse.move(2, 2)
    plain = picture(page)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    shown = {}
    for number, word in enumerate(caption.words):
        page.locator("#viewer .word").nth(number).hover()
        expect(page.locator("#viewer .stage canvas")).to_have_attribute("data-word", word)
        shown[number] = picture(page)
        assert np.abs(shown[number] - plain).mean() > 5
    # The page lights up what the library's own heatmap does.
    ours = caption.heatmap(1).resize((shown[1].shape[1], shown[1].shape[0]))
    assert np.abs(shown[1] - np.asarray(ours)).mean() < 6
    assert np.abs(shown[1] - shown[0]).mean() > 2
    assert not [address for address in requests if not address.startswith(("data:", "blob:"))]
    page.mouse.move(2, 2)
    assert np.array_equal(picture(page), plain)


def test_a_row_of_pictures_an_animation_and_the_other_captions(open_page, default):
    page = open_page()
    upload(page)
    caption = default.caption(PHOTO, alternatives=2)
    first = words(page)
    figures = page.locator("#viewer .strip figure")
    peaks = [f"{weights.max() * weights.size:.1f}×" for weights in caption.attention]
    assert figures.all_inner_texts() == [f"{word} {peak}" for word, peak in zip(first, peaks, strict=True)]
    buttons = page.locator("#viewer .others button")
    assert [text.split("\n")[0] for text in buttons.all_inner_texts()] == [
        one.sentence() for one in (caption, *caption.alternatives)
    ]
    assert f"{round(100 * caption.confidence)} %" in buttons.first.inner_text()
    buttons.nth(1).click()
    assert words(page) == list(caption.alternatives[0].words)
    buttons.nth(0).click()
    page.get_by_role("button", name="Play", exact=True).click()
    seen = []
    for word in caption.words[:3]:
        expect(page.locator("#viewer .stage canvas")).to_have_attribute("data-word", word)
        seen.append(word)
    page.get_by_role("button", name="Stop", exact=True).click()
    assert seen == list(caption.words[:3])
    with page.expect_download() as download:
        page.get_by_role("button", name="Download picture").click()
    assert Image.open(download.value.path()).width >= caption.image.width


def test_the_caption_can_be_copied(open_page, default, url):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    upload(page)
    words(page)
    page.get_by_role("button", name="Copy caption").click()
    expect(page.locator("#viewer .copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == default.caption(PHOTO).sentence()


def test_a_sample_picture_is_one_click_away(open_page, default):
    page = open_page()
    page.get_by_role("button", name="Astronaut").click()
    assert words(page) == list(default.caption(PHOTOS / "astronaut.jpg").words)


def test_settings_change_the_caption_and_its_looks(open_page, default):
    page = open_page()
    upload(page)
    words(page)
    expect(page.locator("#viewer .others button")).to_have_count(3)
    page.get_by_role("button", name="Settings", exact=False).first.click()
    captions = page.get_by_label("number input for Captions")
    captions.fill("5")
    captions.press("Enter")
    expect(page.locator("#viewer .others button")).to_have_count(5)
    beams = page.get_by_label("number input for Beam size")
    captions.fill("1")
    captions.press("Enter")
    beams.fill("1")
    beams.press("Enter")
    expect(page.locator("#viewer .others button")).to_have_count(0)
    expect(page.locator("#viewer .word")).to_have_text(list(default.caption(PHOTO, beam_size=1).words))
    page.locator("#viewer .word").nth(1).click()
    before = picture(page)
    page.locator("#viewer .colours").select_option("viridis")
    page.locator("#viewer .word").nth(1).hover()
    assert np.abs(picture(page) - before).mean() > 2


def test_the_legend_tells_how_strong_attention_is_and_the_scale_can_be_chosen_from_the_keyboard(open_page, default):
    page = open_page()
    upload(page)
    words(page)
    caption = default.caption(PHOTO, alternatives=2)
    peaks = [weights.max() * weights.size for weights in caption.attention]
    weakest = int(np.argmin(peaks))
    legend, scale = page.locator("#viewer .legend"), page.get_by_label("Scale")
    page.locator("#viewer .word").nth(weakest).click()
    expect(legend.locator(".number")).to_have_text(f"{max(peaks):.1f}×")
    expect(legend.locator(".note > span")).to_have_text(
        f"1× (marked): the weight of an even map, 1/{caption.attention[0].size}"
    )
    ramp, mark = legend.locator(".ramp").bounding_box(), legend.locator(".mark").bounding_box()
    assert (mark["x"] + mark["width"] / 2 - ramp["x"]) / ramp["width"] == pytest.approx(1 / max(peaks), abs=0.01)
    shared = picture(page)
    scale.focus()
    page.keyboard.press("ArrowDown")
    expect(scale).to_have_value("word")
    expect(page.locator("#viewer .word").nth(weakest)).to_have_attribute("aria-pressed", "true")
    expect(legend.locator(".number")).to_have_text(f"{peaks[weakest]:.1f}×")
    expect(scale).to_be_focused()
    own = picture(page)
    for shown, name in ((shared, "caption"), (own, "word")):
        ours = caption.heatmap(weakest, scale=name).resize((shown.shape[1], shown.shape[0]))
        assert np.abs(shown - np.asarray(ours)).mean() < 6
    assert own.max(axis=2).mean() > shared.max(axis=2).mean() + 10  # a weak map is stretched to full brightness
    page.locator("#viewer .word").nth(weakest).click()
    page.mouse.move(2, 2)
    expect(legend.locator(".number")).to_have_text("largest of the word")
    expect(legend.locator(".mark")).to_be_hidden()


def test_two_models_side_by_side_and_one_head_at_a_time(open_page):
    page = open_page()
    upload(page)
    words(page)
    page.get_by_label("heads").check()
    expect(page.locator("#viewer .result")).to_have_count(2)
    left, right = (page.locator("#viewer .result").nth(number).bounding_box() for number in range(2))
    assert (left["x"] + left["width"] <= right["x"], left["y"]) == (True, right["y"])
    assert words(page, 0)
    assert words(page, 1)
    assert page.locator("#viewer .head option").all_inner_texts() == ["mean of all heads", "head 1", "head 2"]
    canvas = page.locator("#viewer .result").nth(1).locator(".strip canvas").first
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    page.locator("#viewer .head").select_option("2")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    notes = page.locator("#viewer .legend .note > span")
    assert [text.rpartition("/")[2] for text in notes.all_inner_texts()] == ["64", "6"]
    page.get_by_label("Scale").first.select_option("word")
    assert [page.get_by_label("Scale").nth(number).input_value() for number in range(2)] == ["word", "word"]


def test_many_photos_with_a_broken_one_among_them(open_page, default, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    paths = [PHOTOS / "cat.jpg", broken, PHOTOS / "astronaut.jpg", PHOTO]
    page = open_page()
    page.get_by_role("tab", name="Many photos").click()
    page.set_input_files("#many input[type=file]", [str(path) for path in paths])
    expect(page.locator("#many")).to_contain_text("broken")
    page.get_by_role("button", name="Caption all").click()
    button = page.locator("#download-json")
    expect(button).to_be_enabled(timeout=60_000)
    table = page.locator("#table")
    expect(table).to_contain_text("This file is not a picture that can be read.")
    good = [path for path in paths if path != broken]
    captions = default.caption(good)
    for caption in captions:
        expect(table).to_contain_text(str(caption))
    files = {}
    for name in ("json", "csv", "heatmaps"):
        with page.expect_download() as download:
            page.locator(f"#download-{name}").click()
        files[name] = Path(download.value.path()).read_bytes()
    rows = json.loads(files["json"])
    assert [row["file"] for row in rows] == [path.name for path in paths]
    assert [row.get("caption") for row in rows] == [str(captions[0]), None, str(captions[1]), str(captions[2])]
    assert "not a picture" in rows[1]["error"]
    assert len(files["csv"].splitlines()) == 5
    with zipfile.ZipFile(io.BytesIO(files["heatmaps"])) as archive:
        assert sorted(archive.namelist()) == sorted(path.name for path in good)


def test_how_it_works_shows_the_numbers_of_every_step(open_page, default):
    page = open_page()
    upload(page)
    said = words(page)
    page.get_by_role("tab", name="How it works").click()
    slider = page.get_by_label("Word of the caption")
    slider.focus()
    seen = []
    for word in [*said, "<end>"]:
        expect(page.locator("#steps mark")).to_have_text(word)
        weights = page.get_by_label("Attention weights in percent").locator("td").all_inner_texts()
        assert sum(map(float, weights)) == pytest.approx(100, abs=3)
        entropy = float(page.locator("#steps .entropy .number").inner_text().removesuffix(" %"))
        alpha = np.array(weights, float) / 100
        assert entropy == pytest.approx(
            -100 * (alpha * np.log(np.maximum(alpha, 1e-9))).sum() / np.log(alpha.size), abs=5
        )
        seen.append(page.locator("#steps").inner_text())
        page.keyboard.press("ArrowRight")
    assert len(set(seen)) == len(seen)
    assert re.search(r"beta\s+0\.\d\d", seen[0])


def pressed(page: Page) -> list[str]:
    return page.locator("#viewer .regions [aria-pressed=true]").evaluate_all("all => all.map((one) => one.ariaLabel)")


def drag(page: Page, cells: list[str]) -> None:
    """Press the pointer on the first cell, and move it over the others."""
    for number, cell in enumerate(cells):
        box = page.get_by_role("button", name=cell).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
        if not number:
            page.mouse.down()
    page.mouse.up()


def test_regions_are_hidden_by_the_pointer_and_the_caption_stands_beside_the_first(open_page, default):
    page = open_page()
    upload(page)
    before = words(page)
    page.locator("#viewer .regions").scroll_into_view_if_needed()
    place = page.locator("#viewer .stage").bounding_box()["y"]
    cells = [f"Row {row}, column {column}" for row, column in ((4, 3), (5, 3), (5, 4), (6, 4), (6, 5))]
    drag(page, cells)
    assert pressed(page) == cells
    hide = np.zeros(default.config.grid, dtype=bool)
    hide[[3, 4, 4, 5, 5], [2, 2, 3, 3, 4]] = True
    caption = default.caption(PHOTO, alternatives=2, hide=hide)
    expect(page.locator("#viewer .words:not(.before) .word")).to_have_text(list(caption.words))
    expect(page.locator("#viewer .before .word")).to_have_text(before)
    assert page.locator("#viewer .stage").bounding_box()["y"] == pytest.approx(place, abs=1)
    expect(page.locator("#viewer .sentences h3")).to_have_text(["All regions", "Without 5 of 64 regions"])
    changed = page.locator("#viewer .words:not(.before) .changed .word").all_inner_texts()
    assert changed
    assert [word for word in caption.words if word not in before] == [word for word in changed if word not in before]
    odds = page.locator("#viewer .words:not(.before) .odds").all_inner_texts()
    likely = [f"{100 * np.exp(one):.0f} %" for one in caption.word_log_probabilities[: len(caption.words)]]
    assert [text.split(" → ")[0] for text in odds] == likely
    drag(page, cells[1:3])  # what is hidden already is shown again
    expect(page.locator("#viewer .regions [aria-pressed=true]")).to_have_count(3)
    page.get_by_role("button", name="Show all regions").click()
    expect(page.locator("#viewer .before")).to_have_count(0)
    assert pressed(page) == []
    assert words(page) == before


def test_a_fast_pointer_leaves_no_region_on_its_way_out(open_page):
    page = open_page()
    upload(page)
    words(page)
    page.locator("#viewer .regions").scroll_into_view_if_needed()
    drag(page, ["Row 4, column 1", "Row 4, column 8"])
    assert pressed(page) == [f"Row 4, column {column}" for column in range(1, 9)]


def test_regions_are_hidden_from_the_keyboard_and_another_photo_has_none(open_page):
    page = open_page()
    upload(page)
    words(page)
    page.get_by_role("button", name="Row 1, column 1").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "Space"):
        page.keyboard.press(key)
    expect(page.locator("#viewer .before .word").first).to_be_visible()
    assert pressed(page) == ["Row 3, column 1"]
    expect(page.get_by_role("button", name="Row 3, column 1")).to_be_focused()  # though the caption is another
    page.keyboard.press("Enter")
    expect(page.locator("#viewer .before")).to_have_count(0)
    page.keyboard.press("Space")
    expect(page.locator("#viewer .before .word").first).to_be_visible()
    upload(page, PHOTOS / "cat.jpg")
    expect(page.locator("#viewer .before")).to_have_count(0)
    assert pressed(page) == []


def test_a_switch_shows_what_the_words_rest_on_in_every_map(open_page, default):
    page = open_page()
    upload(page)
    words(page)
    page.locator("#viewer .word").nth(1).click()
    looked = picture(page)
    strip = page.locator("#viewer .strip figcaption")
    page.get_by_role("button", name="What it used").focus()
    page.keyboard.press("Enter")
    caption = default.caption(PHOTO, alternatives=2, evidence=True)
    peaks = [f"{word} {evidence.max():.2f}" for word, evidence in zip(caption.words, caption.evidence, strict=True)]
    expect(strip).to_have_text(peaks)
    expect(page.get_by_role("button", name="What it used")).to_be_focused()
    expect(page.locator("#viewer .legend .number")).to_have_text(f"{caption.evidence.max():.2f}")
    page.locator("#viewer .word").nth(1).click()
    used = picture(page)
    ours = caption.heatmap(1, of="evidence").resize((used.shape[1], used.shape[0]))
    assert np.abs(used - np.asarray(ours)).mean() < 6
    with page.expect_download() as download:
        page.get_by_role("button", name="Download picture").click()
    assert Image.open(download.value.path()).width == 2 * used.shape[1] + 8
    page.locator("#viewer .others button").nth(1).click()
    expect(page.locator("#viewer .legend .note > span")).to_contain_text("for the first caption only")
    page.locator("#viewer .others button").nth(0).click()
    page.get_by_role("button", name="Where it looked").click()
    page.locator("#viewer .word").nth(1).click()
    assert np.abs(picture(page) - looked).mean() < 1
    upload(page, PHOTOS / "cat.jpg")  # measured with the caption from now on
    expect(page.locator("#viewer .word").nth(2)).to_have_text("cat")
    page.get_by_role("button", name="What it used").click()
    expect(strip.first).to_contain_text(re.compile(r"^a 0\.\d\d$"))


def test_attention_can_be_changed_and_the_next_word_follows(open_page, default):
    page = open_page()
    upload(page)
    words(page)
    page.get_by_role("tab", name="How it works").click()
    page.get_by_label("Word of the caption").fill("1")
    caption = default.caption(PHOTO, keep_annotations=True)
    shown = page.locator("#steps .row:not(.entropy *) .number")
    entropy = page.locator("#steps .entropy .number")
    slider = page.get_by_label("Temperature of attention's softmax")
    slider.focus()
    for key, temperature in (("ArrowLeft", 0.5), ("Home", 0), ("End", math.inf)):
        page.keyboard.press(key)
        step = explain(default, caption, temperature=temperature)[1]
        expect(entropy).to_have_text(f"{100 * step.entropies[0]:.1f} %")
        likely = [f"{100 * probability:.1f} %" for _, probability in step.candidates]
        expect(shown).to_have_text([f"{step.beta:.2f}", *likely])
        expect(slider).to_be_focused()
    expect(page.get_by_role("button", name="Look everywhere")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Look everywhere").click()
    expect(slider).to_have_attribute("aria-valuetext", "1")
    page.get_by_role("button", name="Look nowhere").click()
    step = explain(default, caption, context=False)[1]
    expect(shown).to_have_text(["0.00", *(f"{100 * probability:.1f} %" for _, probability in step.candidates)])
    expect(page.locator("#steps mark")).to_have_text(caption.words[1])
    expect(page.locator("#steps .before")).to_contain_text(
        f"With attention as it is: {explain(default, caption)[1].candidates[0][0]}"
    )


def test_the_entropy_of_each_head_stands_beside_that_of_their_mean(open_page):
    page = open_page()
    page.get_by_label("heads").check()
    page.get_by_label("default").uncheck()
    upload(page)
    words(page)
    page.get_by_role("tab", name="How it works").click()
    rows = page.locator("#steps .entropy .row")
    expect(rows).to_have_count(3)
    names, shares = zip(*(row.split("\n")[:: len(row.split("\n")) - 1] for row in rows.all_inner_texts()), strict=True)
    assert names == ("mean of heads", "head 1", "head 2")
    mean, *each = (float(share.removesuffix(" %")) for share in shares)
    assert mean >= np.mean(each) - 0.1
    assert len(set(shares)) > 1


def test_one_slider_moves_two_models_and_a_transformer_shows_the_words_it_reads(
    browser, default, tmp_path, monkeypatch
):
    sizes = {"annotation_size": 12, "hidden_size": 12, "attention_size": 12, "heads": 3}
    network = small_model(len(default.vocabulary), decoder="transformer", **sizes)
    with torch.no_grad():
        for weights in network.decoder.parameters():
            weights.mul_(2)  # so that words differ
    other = Captioner(Checkpoint(network, default.vocabulary, Preprocessing(size=(64, 64))))
    models = {"default": default, "transformer": other}
    # A demo that stops deletes its files: not those of the other tests' demo.
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with run_app(models) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(address)
        page.wait_for_selector("#photo input[type=file]", state="attached")
        upload(page)
        words(page)
        page.get_by_role("tab", name="How it works").click()
        boards, marks = page.locator("#steps .board"), page.locator("#steps mark")
        expect(boards).to_have_count(1)
        expect(boards.locator("h2")).to_have_count(0)
        page.get_by_label("Second model").select_option("transformer")
        expect(boards.locator("h2")).to_have_text(list(models))
        left, right = (board.bounding_box() for board in boards.all())
        assert (left["x"] + left["width"] <= right["x"], left["y"]) == (True, right["y"])
        steps = [explain(model, model.caption(PHOTO, beam_size=5, keep_annotations=True)) for model in models.values()]
        assert len(steps[0]) != len(steps[1])
        for at in (0, 1, max(map(len, steps)) - 1):  # the shorter caption stays at its end
            page.get_by_label("Word of the caption").fill(str(at))
            shown = [each[min(at, len(each) - 1)] for each in steps]
            expect(marks).to_have_text([step.word for step in shown])
            for board, step in zip(boards.all(), shown, strict=True):
                probabilities = board.locator(".columns > :last-child > .row .number").all_inner_texts()
                likely = [f"{100 * probability:.1f} %" for _, probability in step.candidates]
                assert probabilities[-len(likely) :] == likely
        layers = boards.nth(1).locator(".layer")
        page.get_by_label("Word of the caption").fill("2")
        expect(layers).to_have_count(2)
        step = steps[1][2]
        for layer, weights in zip(layers.all(), step.word_weights, strict=True):
            read = ["<start>", *(each.word for each in steps[1][:2])]
            means = weights.mean(axis=0)
            assert layer.locator(".read").all_inner_texts() == [
                f"{word} {100 * mean:.1f} %" for word, mean in zip(read, means, strict=True)
            ]
            assert layer.locator(".read").first.get_attribute("title").count("head") == 3
        page.get_by_role("button", name="Look everywhere").click()
        expect(page.locator("#steps .before")).to_have_count(2)
        page.get_by_role("button", name="Look everywhere").click()
        expect(page.locator("#steps .before")).to_have_count(0)
        page.get_by_role("button", name="Look nowhere").click()
        expect(page.locator("#steps .problem")).to_contain_text("only a decoder with a context gate")
        page.set_viewport_size({"width": 375, "height": 800})
        first, second = (board.bounding_box() for board in boards.all())
        assert (first["y"] + first["height"] <= second["y"], first["x"]) == (True, second["x"])
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_role("tab", name="One photo").click()
        upload(page, PHOTOS / "cat.jpg")
        page.get_by_role("tab", name="How it works").click()
        expect(marks.first).to_have_text(default.caption(PHOTOS / "cat.jpg").words[0])
        expect(boards).to_have_count(2)  # the choice holds for the next photo too
        page.get_by_label("Second model").select_option("none")
        expect(boards).to_have_count(1)
        page.close()


def test_thin_photos_take_no_more_room_than_others_and_lose_no_batch(open_page, tmp_path):
    thin = [tmp_path / f"{width}x{height}.png" for width, height in ((1, 300), (4, 70_000), (70_000, 4))]
    for path in thin:
        Image.new("RGB", tuple(map(int, path.stem.split("x"))), "red").save(path)
    page = open_page()
    for path in thin[:2]:
        upload(page, path)
        words(page)
        assert page.locator("#viewer .stage canvas").bounding_box()["height"] <= 0.85 * 900 + 1
        assert page.locator("#viewer .strip canvas").first.bounding_box()["height"] <= 14 * 16
        page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
        expect(page.locator("#viewer .word")).to_have_count(0)
    page.get_by_role("tab", name="Many photos").click()
    page.set_input_files("#many input[type=file]", [str(path) for path in (*thin, PHOTO)])
    expect(page.locator("#many")).to_contain_text("photographer")
    page.get_by_role("button", name="Caption all").click()
    expect(page.locator("#download-heatmaps")).to_be_enabled(timeout=60_000)
    with page.expect_download() as download:
        page.locator("#download-heatmaps").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert sorted(archive.namelist()) == sorted(f"{path.stem}.jpg" for path in (*thin, PHOTO))


HOSTILE = "<img src=x onerror=alert(1)>"


def test_names_and_words_that_look_like_html_are_text_on_the_page(browser, default, tmp_path, monkeypatch):
    texts = [f"\"'><img/src='x'/onerror='alert({number})'>&lt;" for number in range(6)]
    torch.manual_seed(0)
    hostile = Captioner(Checkpoint(small_model(len(texts) + 4), Vocabulary(texts), Preprocessing(size=(64, 64))))
    name = f"</script><script>alert(5)</script>{HOSTILE}"
    photo = tmp_path / f"{HOSTILE}.jpg"
    shutil.copy(PHOTO, photo)
    broken = tmp_path / "<svg onload=alert(6)>.jpg"
    broken.write_text("no picture")
    caption = hostile.caption(PHOTO, alternatives=2)
    assert "<img" in str(caption)
    # A demo that stops deletes its files: not those of the other tests' demo.
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    with run_app({name: hostile, "default": default}) as address:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.set_default_timeout(30_000)
        ran: list[str] = []
        page.on("dialog", lambda dialog: (ran.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        page.wait_for_selector("#photo input[type=file]", state="attached")
        expect(page.get_by_label(name)).to_be_visible()
        upload(page, photo)
        assert words(page) == list(caption.words)
        page.get_by_label("default").check()
        expect(page.locator("#viewer .model").first).to_have_text(name)
        expect(page.locator("#viewer .others button span").first).to_have_text(caption.sentence())
        page.get_by_role("tab", name="How it works").click()
        expect(page.locator("#steps mark").first).to_have_text(caption.words[0])
        expect(page.locator("#steps h2").first).to_have_text(name)
        page.get_by_role("tab", name="Many photos").click()
        page.set_input_files("#many input[type=file]", [str(photo), str(broken)])
        page.get_by_role("button", name="Caption all").click()
        expect(page.locator("#download-heatmaps")).to_be_enabled(timeout=60_000)
        expect(page.locator("#table")).to_contain_text(str(caption))
        page.locator(".gallery-item button, button.thumbnail-item").first.click()
        page.wait_for_timeout(1000)
        assert page.locator("img[src='x'], svg[onload], [onerror], [onmouseover]").count() == 0
        assert ran == []
        context.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jpg", b"no picture", "not a picture that can be read"),
        ("empty.jpg", b"", "This file is empty"),
    ],
)
def test_what_is_no_photo_gets_a_sentence(open_page, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    page = open_page()
    upload(page, path)
    expect(page.get_by_role("alert")).to_contain_text(message)
    upload_again = page.get_by_label("Remove Image").or_(page.get_by_label("Clear"))
    upload_again.first.click()
    upload(page)
    assert words(page)


def test_words_can_be_reached_and_lit_from_the_keyboard(open_page):
    page = open_page()
    upload(page)
    said = words(page)
    page.locator("#viewer .word").first.focus()
    canvas = page.locator("#viewer .stage canvas")
    for word in said:
        expect(canvas).to_have_attribute("data-word", word)
        assert word in canvas.get_attribute("aria-label")
        page.keyboard.press("Tab")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_barrier_on_any_tab(open_page, scheme):
    page = open_page(color_scheme=scheme)
    upload(page)
    words(page)
    page.get_by_role("button", name="Row 4, column 4").click()
    expect(page.locator("#viewer .before .word").first).to_be_visible()
    page.get_by_text("Why they differ").click()
    for tab in ("One photo", "Many photos", "How it works"):
        page.get_by_role("tab", name=tab).click()
        if tab == "How it works":
            page.get_by_label("Second model").select_option("heads")
            expect(page.locator("#steps .board")).to_have_count(2)
        page.wait_for_timeout(300)
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        serious = [
            f"{violation['id']}: {violation['help']} {[node['target'] for node in violation['nodes']][:3]}"
            for violation in found
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(open_page, scheme):
    page = open_page(color_scheme=scheme, has_touch=True)
    page.set_viewport_size({"width": 375, "height": 800})
    upload(page)
    words(page)
    page.get_by_role("button", name="Row 4, column 4").tap()
    expect(page.locator("#viewer .before .word").first).to_be_visible()
    assert pressed(page) == ["Row 4, column 4"]
    for tab in ("How it works", "One photo"):
        choose_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = np.mean([int(part) for part in re.findall(r"\d+", background)[:3]])
    assert (brightness < 80) == (scheme == "dark")


def choose_tab(page: Page, name: str) -> None:
    tab = page.get_by_role("tab", name=name)
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
    page.get_by_role("tab", name=name).or_(page.locator(".overflow-dropdown button", has_text=name)).first.click()


def test_the_pictures_of_the_readmes_show_a_caption_that_is_right(browser, tmp_path):
    folder = Path(SCREENSHOTS or tmp_path)
    model = Captioner.from_pretrained()
    caption = model.caption(SAMPLES / "photographer.jpg")
    assert str(caption) == "a man is standing in a field with a camera"
    caption.figure(columns=6).save(folder / "attention.jpg", quality=85, optimize=True)
    with run_app({"base": model}) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.goto(address)
        page.get_by_role("button", name="Photographer").click()
        assert words(page) == list(caption.words)
        page.locator("#viewer .word", has_text="camera").hover()
        save_screenshot(page, folder / "page.jpg")
        page.get_by_role("tab", name="How it works").click()
        page.get_by_label("Word of the caption").fill(str(caption.words.index("camera")))
        expect(page.locator("#steps mark")).to_have_text("camera")
        save_screenshot(page, folder / "steps.jpg")
        page.close()
    for name in ("attention.jpg", "page.jpg", "steps.jpg"):
        assert 20_000 < (folder / name).stat().st_size < 200_000


def save_screenshot(page: Page, path: Path) -> None:
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.save(path, quality=70, optimize=True)
