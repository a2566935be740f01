"""The captioner command."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import PHOTOS
from PIL import Image

from captioner import Captioner, list_models
from captioner.cli import main


@pytest.fixture
def photos(tmp_path):
    """A folder with two good images, one more in a folder of its own, two broken ones, and a text."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, colour in (("b.PNG", "red"), ("a.jpg", "blue"), ("more/a.jpg", "green")):
        Image.new("RGB", (50, 40), colour).save(folder / name)
    (folder / "broken.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes()[:3000])
    (folder / "empty.gif").touch()
    (folder / "notes.txt").write_text("no image")
    return folder


def run(small_folder, *arguments):
    return main([*map(str, arguments), "--model", str(small_folder), "--max-length", "6"])


def test_one_image_gives_its_caption_alone(small, small_folder, capsys):
    assert run(small_folder, PHOTOS / "cat.jpg") == 0
    out, err = capsys.readouterr()
    assert out == f"{small.caption(PHOTOS / 'cat.jpg', max_length=6)}\n"
    assert err == ""


def test_alternatives_of_one_image_have_lines_of_their_own(small_folder, capsys):
    assert run(small_folder, PHOTOS / "cat.jpg", "--alternatives", "2") == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 3


def test_a_folder_gives_a_line_for_each_image_and_names_what_failed(small_folder, photos, capsys):
    assert run(small_folder, photos) == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(photos / "a.jpg"), str(photos / "b.PNG")]
    assert "broken.jpg is damaged" in err
    assert "empty.gif is empty" in err
    assert len(err.splitlines()) == 2


def test_folders_within_folders_are_read_when_asked_for(small_folder, photos, capsys):
    run(small_folder, photos, "--recursive")
    assert str(photos / "more" / "a.jpg") in capsys.readouterr().out


def test_json_lines_say_everything_of_every_image(small_folder, photos, tmp_path, capsys):
    output = tmp_path / "captions.jsonl"
    assert run(small_folder, photos, "--format", "jsonl", "--output", output, "--alternatives", 1) == 1
    assert capsys.readouterr().out == ""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [os.path.basename(record["path"]) for record in records] == ["a.jpg", "b.PNG", "broken.jpg", "empty.gif"]
    for record in records[:2]:
        assert set(record) == {"path", "caption", "log_probability", "words", "alternatives"}
        assert len(record["alternatives"]) == 1
    for record in records[2:]:
        assert set(record) == {"path", "error"}


def test_a_thousand_photos_with_ten_broken_ones(small_folder, tmp_path, capsys):
    good = io.BytesIO()
    Image.new("RGB", (16, 12), "red").save(good, "JPEG")
    for number in range(1000):
        data = good.getvalue() if number % 100 else b"broken"
        (tmp_path / f"{number:04d}.jpg").write_bytes(data)
    assert run(small_folder, tmp_path, "--beam-size", 1, "--batch-size", 128) == 1
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == (990, 10)
    assert [line[: line.index("\t")] for line in out.splitlines()] == sorted(
        str(tmp_path / f"{number:04d}.jpg") for number in range(1000) if number % 100
    )


def test_captions_below_the_confidence_asked_for_are_left_out_and_said_to_be(capsys):
    paths = sorted(PHOTOS.glob("*.jpg"))
    captions = Captioner.from_pretrained().caption(paths)
    middle = sorted(caption.confidence for caption in captions)[1]
    assert main([*map(str, paths), "--format", "jsonl", "--min-confidence", str(middle - 1e-4)]) == 1
    out, err = capsys.readouterr()
    for path, caption, row in zip(paths, captions, map(json.loads, out.splitlines()), strict=True):
        if caption.confidence < middle:
            assert row.keys() == {"path", "error"}
            assert f"{path}: confidence {caption.confidence:.2f} is below" in err
        else:
            assert row["caption"] == str(caption)
    assert len(err.splitlines()) == 1


def test_heatmaps_are_written_and_never_over_each_other(small_folder, photos, tmp_path):
    maps = tmp_path / "maps"
    run(small_folder, photos, photos / "more" / "a.jpg", "--recursive", "--heatmaps", maps)
    found = sorted(str(path.relative_to(maps)) for path in maps.rglob("*.png"))
    assert found == ["a.jpg-2.png", "a.jpg.png", "b.PNG.png", "more/a.jpg.png"]
    assert all(Image.open(maps / name).width > 200 for name in found)


def test_the_scale_of_heatmaps_can_be_chosen(small_folder, tmp_path):
    cat = PHOTOS / "cat.jpg"
    for scale in ("caption", "word"):
        run(small_folder, cat, "--heatmaps", tmp_path / scale, "--heatmap-scale", scale)
    run(small_folder, cat, "--heatmaps", tmp_path / "default")
    caption, word, default = ((tmp_path / name / "cat.jpg.png").read_bytes() for name in ("caption", "word", "default"))
    assert caption == default != word


def test_heatmaps_do_not_change_the_captions(small_folder, tmp_path, capsys):
    run(small_folder, PHOTOS)
    plain = capsys.readouterr().out
    run(small_folder, PHOTOS, "--heatmaps", tmp_path)
    assert capsys.readouterr().out == plain


def test_an_image_may_come_through_standard_input(small, small_folder, capsys, monkeypatch):
    data = (PHOTOS / "cat.jpg").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(small_folder, "-") == 0
    assert capsys.readouterr().out == f"{small.caption(data, max_length=6)}\n"


def test_the_same_seed_draws_the_same_captions(small_folder, capsys):
    for _ in range(2):
        assert run(small_folder, PHOTOS, "--temperature", "1.3", "--top-p", "0.9", "--seed", "4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == lines[3:]


def test_names_with_tabs_and_newlines_stay_on_one_line(small_folder, tmp_path, capsys):
    for name in ("a\tb.png", "a\nb.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert run(small_folder, tmp_path) == 0
    names = [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [str(tmp_path / "a\\tb.png"), str(tmp_path / "a\\nb.png")]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.jpg"], 1, "nowhere.jpg does not exist"),
        (["https://example.org/a.jpg"], 1, "download the image first"),
        (["{empty}"], 1, "no image in"),
        (["a.jpg", "--model", "/no/such"], 2, "no model '/no/such'"),
        (["a.jpg", "--model", "huge"], 2, list_models()[0].name),
        (["a.jpg", "--device", "quantum"], 2, "quantum"),
        (["a.jpg", "--device", "meta"], 2, "meta"),
        (["a.jpg", "--device", "cuda:99"], 2, "cuda:99"),
        (["a.jpg", "--beam-size", "41"], 2, "beam_size 41 is too many"),
        (["a.jpg", "--alternatives", "40"], 2, "alternatives 40 is too many"),
        (["/dev/zero"], 1, "/dev/zero is a pipe or a device"),
        (["{cat}/x"], 1, "Not a directory"),
        (["a\x1b[2Jb\nc.jpg"], 1, "a\\x1b[2Jb\\nc.jpg does not exist"),
        (["{cat}", "--output", "/dev/full"], 1, "cannot write /dev/full: No space left"),
        (["{cat}", "--heatmaps", "{cat}"], 1, "cannot write"),
        (["{cat}", "--min-confidence", "1"], 1, "is below 1"),
        (["{cat}", "--max-megapixels", "0.001"], 1, "too many pixels"),
        (["{cat}", "--output", "/no/such/folder/file"], 1, "cannot write"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(small_folder, tmp_path, capsys, arguments, status, message):
    filled = [text.format(empty=tmp_path, cat=PHOTOS / "cat.jpg") for text in arguments]
    model = [] if "--model" in filled else ["--model", str(small_folder)]
    assert main(filled + model) == status
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


WRONG = """
--beam-size 0 5000 2.5 x 9999999999999999999999
--alternatives -1 3000
--batch-size 0 1000000000
--max-length 0 1000000000
--temperature 0 -1 inf nan 1e999
--top-p 0 2 nan
--seed 99999999999999999999999999 -99999999999999999999 nan
--min-confidence nan -0.1 1.1
--max-megapixels 0 -1 nan inf 1e300
--format xml
"""


@pytest.mark.parametrize(
    "arguments",
    [[option, value] for option, *values in map(str.split, WRONG.strip().splitlines()) for value in values],
    ids=" ".join,
)
def test_a_value_that_an_option_cannot_have_is_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["a.jpg", "=".join(arguments)])
    assert exit_.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert arguments[0] in sentence
    assert arguments[1] in sentence


@pytest.mark.parametrize("arguments", [[], ["a.jpg", "--x"], ["-", "-"]])
def test_wrong_usage_exits_with_two(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_help_shows_examples_and_does_not_wait_for_torch(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "captioner photo.jpg" in capsys.readouterr().out
    code = "import sys, captioner.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_models_in_the_package_are_listed_without_an_image_and_without_torch():
    command = "main(['--list-models'])"
    code = f"import sys\nfrom captioner.cli import main\ntry: {command}\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    header, *rows, torch_imported = done.stdout.splitlines()
    assert torch_imported == "False"
    assert re.split("  +", header) == ["name", "MB", "encoder", "image size", "scores"]
    for row, model in zip(rows, list_models(), strict=True):
        name, megabytes, encoder, image_size, scores = re.split("  +", row)
        assert (name, encoder) == (model.name, model.encoder)
        assert float(megabytes) == pytest.approx(model.megabytes, abs=0.05)
        assert image_size == f"{model.image_size[0]} x {model.image_size[1]}"
        for data, score in model.scores.items():
            assert f"{data}: BLEU-4 {100 * score['BLEU-4']:.1f}, CIDEr {100 * score['CIDEr']:.1f}" in scores


def command(small_folder, *arguments):
    return [sys.executable, "-m", "captioner", *map(str, arguments), "--model", str(small_folder)]


def test_a_reader_that_has_had_enough_gets_no_complaint(small_folder, tmp_path):
    for number in range(40):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{number}.png")
    process = subprocess.Popen(
        command(small_folder, tmp_path, "--batch-size", 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_an_interrupt_leaves_whole_lines(small_folder, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3000):
        (tmp_path / "photos" / f"{number:04d}.jpg").symlink_to(PHOTOS / "cat.jpg")
    output = tmp_path / "captions.jsonl"
    arguments = (tmp_path / "photos", "--batch-size", 4, "--format", "jsonl", "--output", output)
    process = subprocess.Popen(
        command(small_folder, *arguments),
        stderr=subprocess.PIPE,
        # A shell that runs the tests in the background has them ignore the signal, and so what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (output.exists() and output.stat().st_size > 2000):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == b"interrupted\n"
    assert process.returncode == 130
    lines = output.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 3000
    assert all(line.endswith("\n") and json.loads(line)["caption"] for line in lines)


@pytest.mark.parametrize("name", [None, *(model.name for model in list_models())])
def test_the_command_uses_the_model_of_that_name_or_the_default(name, capsys):
    assert main([str(PHOTOS / "photographer.jpg"), *(["--model", name] if name else [])]) == 0
    expected = Captioner.from_pretrained(name).caption(PHOTOS / "photographer.jpg")
    assert capsys.readouterr().out == f"{expected}\n"


def test_a_folder_of_oddities_never_stops_the_rest(small_folder, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    odd = ["a'b\".png", "–é 猫.png", "a b.png", "-r.png", "*.png", b"\xff\xfe.png", "x" * 240 + ".png"]
    for name in odd:
        image = Image.new("RGB", (9, 9))
        with open(os.path.join(os.fsencode(tmp_path / "photos"), os.fsencode(name)), "wb") as file:
            image.save(file, "PNG")
    (tmp_path / "photos" / "broken.png").symlink_to("nowhere")
    (tmp_path / "photos" / "loop.png").symlink_to("loop.png")
    (tmp_path / "photos" / "folder.png").mkdir()
    os.mkfifo(tmp_path / "photos" / "pipe.png")
    output = tmp_path / "captions.txt"
    assert run(small_folder, tmp_path / "photos", "--recursive", "--batch-size", 2, "--output", output) == 1
    assert len(output.read_bytes().splitlines()) == len(odd)
    err = capsys.readouterr().err
    assert sorted(line.partition(".png ")[2] for line in err.splitlines()) == [
        "cannot be opened: Too many levels of symbolic links",
        "is a link to a file that does not exist",
        "is a pipe or a device; give a file, or the data through standard input",
    ]


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_goes_on(small_folder, photos, capsys, monkeypatch):
    scan = os.scandir

    def forbidding(path):
        if os.fspath(path) == str(photos / "more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert run(small_folder, photos / "more", photos, "--recursive", "--format", "jsonl") == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["path"] for record in records if "caption" in record] == [
        str(photos / "a.jpg"),
        str(photos / "b.PNG"),
    ]
    assert err.count(f"captioner: {photos / 'more'} cannot be listed: Permission denied\n") == 2


def test_files_that_vanish_are_named_and_the_rest_goes_on(small_folder, photos, capsys, monkeypatch):
    from captioner import cli

    find = cli.find_inputs

    def find_and_remove(*arguments):
        found = list(find(*arguments))
        (photos / "a.jpg").unlink()
        return found

    monkeypatch.setattr(cli, "find_inputs", find_and_remove)
    assert run(small_folder, photos) == 1
    out, err = capsys.readouterr()
    assert [line.split("\t")[0] for line in out.splitlines()] == [str(photos / "b.PNG")]
    assert "a.jpg does not exist" in err


def test_a_heatmap_that_cannot_be_written_is_named_and_the_captions_go_on(small_folder, photos, tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.jpg.png").mkdir()  # in its place
    assert run(small_folder, photos / "a.jpg", photos / "b.PNG", "--heatmaps", tmp_path / "maps") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err == f"captioner: cannot write {tmp_path / 'maps' / 'a.jpg.png'}: Is a directory\n"
    assert (tmp_path / "maps" / "b.PNG.png").is_file()


def test_boxes_can_be_hidden_and_pictures_be_of_evidence(small, small_folder, tmp_path, capsys):
    cat = PHOTOS / "cat.jpg"
    boxes = {"hide": [(0, 0, 150, 150), (200, 150, 100, 150)], "attend": (0, 0, 300, 300)}
    given = ["--hide", "0,0,150,150", "--hide", "200,150,100,150", "--attend", "0,0,300,300", "--heatmaps", tmp_path]
    expected = small.caption(cat, max_length=6, evidence=True, **boxes)
    assert 0 < expected.mask.sum() < 4
    everywhere = small.caption(cat, max_length=6, evidence=True)
    for of in ("attention", "evidence"):
        assert run(small_folder, cat, *given, "--heatmaps-of", of) == 0
        assert capsys.readouterr().out == f"{expected}\n"
        with Image.open(tmp_path / "cat.jpg.png") as picture:
            shown = np.asarray(picture).astype(int)
        assert np.abs(shown - np.asarray(expected.figure(of=of))).max() <= 2
        assert np.abs(shown - np.asarray(everywhere.figure(of=of))).max() > 20


def test_a_box_that_cannot_be_used_is_one_sentence(small_folder, capsys):
    cat = PHOTOS / "cat.jpg"
    with pytest.raises(SystemExit, match="2"):
        run(small_folder, cat, "--hide", "1,2,3")
    assert "--hide: must be four numbers with commas between them, not '1,2,3'" in capsys.readouterr().err
    assert run(small_folder, cat, "--hide", "0,0,-5,5") == 2
    assert capsys.readouterr().err.startswith("captioner: hide must be a Boolean grid of 2 x 3 regions, or boxes")
    assert run(small_folder, cat, "--hide", "0,0,9999,9999") == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"captioner: {cat}: hide and attend leave attention none of the 2 x 3 regions\n")


def test_a_full_disk_behind_stdout_is_one_sentence(small_folder):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(small_folder, PHOTOS / "cat.jpg"), stdout=full, stderr=subprocess.PIPE, check=False, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "captioner: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (PHOTOS / "cat.jpg", ""),
        ("/dev/zero", "/dev/zero is not an image"),
        ("/dev/null", "/dev/null is empty"),
        (None, "standard input is closed"),
    ],
)
def test_standard_input_is_read_as_far_as_it_holds_an_image(small_folder, monkeypatch, capsys, path, message):
    with open(path or os.devnull) as file:
        monkeypatch.setattr(sys, "stdin", file if path else None)
        assert run(small_folder, "-") == bool(message)
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == ((0, 1) if message else (1, 0))
    assert message in err


def test_what_a_shell_passes_as_a_path_is_read(small_folder, capsys):
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as pipe:
        sender = threading.Thread(target=lambda: (pipe.write((PHOTOS / "cat.jpg").read_bytes()), pipe.close()))
        sender.start()
        assert run(small_folder, f"/dev/fd/{reading}") == 0
        sender.join()
    assert capsys.readouterr().out
