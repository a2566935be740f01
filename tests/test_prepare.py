import hashlib
import io
import os
import re
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from training.data.archives import Archive, unpack
from training.data.download import ATTEMPTS, PrepareError, download
from training.data.prepare import RECIPES, Recipe, prepare
from training.prepare import main

IMAGES = "Flicker8k_Dataset"
NAMES = ["a.jpg", "b.jpg", "c.jpg"]


def zipped(members: dict[str, bytes], **more: int) -> bytes:
    """A zip file; `more` gives the Unix mode of members that are not plain files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = more.get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(member, content)
    return buffer.getvalue()


TEXT = zipped(
    {
        "Flickr8k.token.txt": "".join(f"{name}#0\tA dog .\n" for name in NAMES).encode(),
        "Flickr_8k.trainImages.txt": b"a.jpg\n",
        "Flickr_8k.devImages.txt": b"b.jpg\n",
        "Flickr_8k.testImages.txt": b"c.jpg\n",
        "__MACOSX/._Flickr8k.token.txt": b"rubbish",
    }
)
PHOTOS = zipped({f"{IMAGES}/{name}": os.urandom(50_000) for name in NAMES})


class Server:
    """A web server whose files are `files`, and whose bad habits can be set.

    Attributes:
        requests: the path and the Range header of every request so far.
        break_after: how many bytes of a body each of the coming answers sends before it breaks off.
        ranges: whether it knows ranges.
        lengths: whether it tells how long a file is.
        shift: how far from the wanted range the one is that it sends.
        answers: status codes that the coming requests get instead of a file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/Flickr8k_text.zip": TEXT, "/Flickr8k_Dataset.zip": PHOTOS}
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: list[int] = []
        self.ranges = self.lengths = True
        self.answers: list[int] = []
        self.shift = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        if self.answers or handler.path not in self.files:
            handler.send_error(self.answers.pop(0) if self.answers else 404)
            return
        body = self.files[handler.path]
        start = int(re.findall(r"\d+", wanted)[0]) if wanted and self.ranges else 0
        if start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start + self.shift}-{len(body) - 1}/{len(body)}")
        if self.lengths:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        end = start + self.break_after.pop(0) if self.break_after else len(body)
        handler.wfile.write(body[start:end])

    def recipe(self, *, digests: bool = True, folder: str = "Flickr8k_text") -> Recipe:
        """The recipe of Flickr8k as this server has it."""

        def archive(name: str, folder: str) -> Archive:
            digest = f"sha256:{hashlib.sha256(self.files[f'/{name}']).hexdigest()}" if digests else None
            return Archive(f"{self.url}/{name}", digest, folder)

        archives = (archive("Flickr8k_text.zip", folder), archive("Flickr8k_Dataset.zip", "."))
        return Recipe("flickr8k", archives, "for tests")


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def run(server, tmp_path, waits) -> Callable[..., int]:
    """Runs the command on the server's recipe."""

    def run(**options: bool) -> int:
        recipes = {"flickr8k": server.recipe(**options)}
        return main(["flickr8k", "--root", str(tmp_path / "root")], recipes, waits.append)

    return run


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


WHOLE = {f"{IMAGES}/{name}" for name in NAMES} | {
    "Flickr8k_text/Flickr8k.token.txt",
    "Flickr8k_text/Flickr_8k.trainImages.txt",
    "Flickr8k_text/Flickr_8k.devImages.txt",
    "Flickr8k_text/Flickr_8k.testImages.txt",
    "downloads/Flickr8k_text.zip.unpacked",
    "downloads/Flickr8k_Dataset.zip.unpacked",
}


def test_the_command_downloads_unpacks_and_counts(run, tmp_path, capsys):
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE
    output = capsys.readouterr().out.splitlines()
    assert output[1:] == [
        "train: 1 images, 1 captions",
        "dev: 1 images, 1 captions",
        "test: 1 images, 1 captions",
        "problems: 0",
    ]


def test_problems_of_the_data_are_counted_and_shown(server, run, capsys):
    server.files["/Flickr8k_Dataset.zip"] = zipped({f"{IMAGES}/a.jpg": b"jpeg", f"{IMAGES}/b.jpg": b"jpeg"})
    assert run() == 0
    shown = capsys.readouterr()
    assert "problems: 1" in shown.out
    assert "testImages.txt:1: c.jpg is not in" in shown.err


def test_no_progress_bar_is_drawn_in_a_pipe(run, capsys):
    run()
    assert "%|" not in capsys.readouterr().err


def test_what_is_unpacked_is_not_downloaded_again(server, run, capsys):
    run()
    before = len(server.requests)
    assert run() == 0
    assert len(server.requests) == before
    assert "Flickr8k_Dataset.zip: already unpacked" in capsys.readouterr().err


def test_what_was_deleted_after_unpacking_is_downloaded_again(run, tmp_path):
    run()
    for name in NAMES:
        (tmp_path / "root" / IMAGES / name).unlink()
    (tmp_path / "root" / IMAGES).rmdir()
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE


# Downloads that break


def test_a_download_that_breaks_off_midway_continues_from_there(server, run, tmp_path, waits):
    server.break_after = [len(TEXT), 40_000, 30_000]
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE
    assert server.requests[1:] == [
        ("/Flickr8k_Dataset.zip", None),
        ("/Flickr8k_Dataset.zip", "bytes=40000-"),
        ("/Flickr8k_Dataset.zip", "bytes=70000-"),
    ]
    assert waits == [2.0, 2.0]


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(server, run, tmp_path):
    server.ranges = False
    server.break_after = [len(TEXT), 40_000]
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE


def test_a_server_that_sends_another_range_than_asked_is_read_from_the_start_again(server, run, tmp_path):
    server.shift = 5
    server.break_after = [len(TEXT), 40_000]
    assert run() == 0
    assert [wanted for _, wanted in server.requests[1:]] == [None, "bytes=40000-", None]
    assert files(tmp_path / "root") == WHOLE


def test_after_several_attempts_for_nothing_it_gives_up_and_a_second_run_continues(
    server, run, tmp_path, waits, capsys
):
    server.break_after = [len(TEXT), 40_000, *[0] * (ATTEMPTS - 1)]
    assert run() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: cannot download {server.url}/Flickr8k_Dataset.zip: the connection broke off after")
    assert last.endswith("run the same command again to continue")
    assert waits == [2.0, 4.0, 8.0, 16.0]
    assert (tmp_path / "root/downloads/Flickr8k_Dataset.zip.part").read_bytes() == PHOTOS[:40_000]
    assert run() == 0
    assert server.requests[-1] == ("/Flickr8k_Dataset.zip", "bytes=40000-")
    assert files(tmp_path / "root") == WHOLE


def test_a_download_that_was_whole_when_the_process_was_killed_is_taken_as_it_is(server, run, tmp_path):
    part = tmp_path / "root/downloads/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(PHOTOS)
    assert run() == 0
    assert server.requests[1:] == [("/Flickr8k_Dataset.zip", f"bytes={len(PHOTOS)}-")]


def test_a_part_that_is_longer_than_the_file_is_dropped(server, run, tmp_path):
    part = tmp_path / "root/downloads/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(PHOTOS + b"more")
    assert run() == 0
    assert [wanted for _, wanted in server.requests[1:]] == [f"bytes={len(PHOTOS) + 4}-", None]


def test_a_server_that_gives_no_length_is_accepted_if_the_digest_fits(server, run, tmp_path):
    server.lengths = False
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_passing_refusal_is_tried_again(server, run, status, waits):
    server.answers = [status, status]
    assert run() == 0
    assert waits == [2.0, 4.0]


def test_a_file_that_the_server_does_not_have_is_refused_at_once(server, tmp_path, waits, capsys):
    recipes = {"flickr8k": server.recipe()}
    server.files.clear()
    assert main(["flickr8k", "--root", str(tmp_path)], recipes, waits.append) == 1
    error = f"error: cannot download {server.url}/Flickr8k_text.zip: the server answers 404 Not Found"
    assert capsys.readouterr().err.splitlines()[-1] == error
    assert waits == []


def test_a_server_that_is_not_there_is_one_sentence(tmp_path, server, waits):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(PrepareError, match=r"cannot download http://.*refused; run the same command again"):
        download(f"{server.url}/Flickr8k_text.zip", tmp_path / "x.part", waits.append)
    assert len(waits) == ATTEMPTS - 1


# Files that are not what they should be


def test_a_file_with_another_digest_is_removed_and_nothing_is_unpacked(server, tmp_path, waits, capsys):
    recipes = {"flickr8k": server.recipe()}
    server.files["/Flickr8k_text.zip"] = TEXT + b"!"
    root = tmp_path / "root"
    assert main(["flickr8k", "--root", str(root)], recipes, waits.append) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {server.url}/Flickr8k_text.zip gave a wrong file: its sha256 is ")
    assert hashlib.sha256(TEXT).hexdigest() in last
    assert files(root) == set()
    server.files["/Flickr8k_text.zip"] = TEXT
    assert main(["flickr8k", "--root", str(root)], recipes, waits.append) == 0


def test_md5_digests_are_verified_too(server, tmp_path):
    server.files["/x.zip"] = zipped({"Flickr8k.token.txt": b"a.jpg#0\tA dog .\n", "Images/a.jpg": b"jpeg"})
    digest = f"md5:{hashlib.md5(server.files['/x.zip']).hexdigest()}"
    prepare(Recipe("flickr8k", (Archive(f"{server.url}/x.zip", digest),), ""), tmp_path / "right")
    with pytest.raises(PrepareError, match="its md5 is"):
        prepare(Recipe("flickr8k", (Archive(f"{server.url}/x.zip", "md5:0"),), ""), tmp_path / "wrong")


def test_without_a_digest_the_check_sums_in_the_zip_are_tested(server, run, tmp_path, capsys):
    damaged = bytearray(PHOTOS)
    damaged[60_000] ^= 1
    server.files["/Flickr8k_Dataset.zip"] = bytes(damaged)
    assert run(digests=False) == 1
    assert f"{IMAGES}/b.jpg in it is damaged" in capsys.readouterr().err
    assert not (tmp_path / "root" / IMAGES).exists()
    server.files["/Flickr8k_Dataset.zip"] = PHOTOS
    assert run(digests=False) == 0


def test_a_web_page_in_place_of_a_zip_is_refused(server, run, capsys):
    server.files["/Flickr8k_text.zip"] = b"<html>Please log in</html>"
    assert run(digests=False) == 1
    assert "gave a wrong file: File is not a zip file" in capsys.readouterr().err


# Unpacking


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "C:evil", "..\\evil", "\\evil", "."])
def test_a_member_that_would_leave_the_folder_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / "x.zip").write_bytes(zipped({"good.txt": b"good", name: b"evil"}))
    with pytest.raises(PrepareError, match=r"x\.zip is refused: its member .* would leave the folder"):
        unpack(tmp_path / "x.zip", tmp_path / "inside")
    assert files(tmp_path) == {"x.zip"}


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_member_that_is_a_link_or_a_device_is_refused_before_anything_is_written(tmp_path, kind):
    (tmp_path / "x.zip").write_bytes(zipped({"good.txt": b"good", "link": b"/etc/passwd"}, link=kind))
    with pytest.raises(PrepareError, match=r"its member 'link' is not a plain file"):
        unpack(tmp_path / "x.zip", tmp_path / "inside")
    assert files(tmp_path) == {"x.zip"}


def test_a_malicious_archive_ends_the_command_with_one_sentence(server, run, tmp_path, capsys):
    server.files["/Flickr8k_text.zip"] = zipped({"../evil": b"evil"})
    assert run() == 1
    assert "is refused: its member '../evil'" in capsys.readouterr().err.splitlines()[-1]
    assert "evil" not in {path.name for path in tmp_path.rglob("*")}


def test_an_interrupted_unpacking_continues_and_keeps_what_is_whole(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped({"x/a": b"first", "x/b": b"second", "x/sub/": b""}))
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a").write_bytes(b"FIRST")  # as long as it should be
    (tmp_path / "x/b").write_bytes(b"sec")
    (tmp_path / "x/b.part").write_bytes(b"se")
    assert unpack(tmp_path / "x.zip", tmp_path) == ["x"]
    assert (tmp_path / "x/a").read_bytes() == b"FIRST"
    assert (tmp_path / "x/b").read_bytes() == b"second"
    assert files(tmp_path) == {"x.zip", "x/a", "x/b"}


def test_only_the_wanted_members_are_unpacked_and_must_be_there(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped({"a.json": b"a", "b.json": b"b"}))
    assert unpack(tmp_path / "x.zip", tmp_path, ["b.json"]) == ["b.json"]
    assert files(tmp_path) == {"x.zip", "b.json"}
    with pytest.raises(PrepareError, match=r"x\.zip does not contain c\.json"):
        unpack(tmp_path / "x.zip", tmp_path, ["c.json"])


def test_a_damaged_archive_is_reported_by_name(tmp_path):
    (tmp_path / "x.zip").write_bytes(TEXT[:-30])
    with pytest.raises(PrepareError, match=r"x\.zip cannot be unpacked: .*; remove it"):
        unpack(tmp_path / "x.zip", tmp_path)


# The disk and the user


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_sentence_and_a_second_run_continues(run, tmp_path, capsys):
    part = tmp_path / "root/downloads/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    assert run() == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last == f"error: the disk of {tmp_path / 'root'} is full; make room and run the same command again to continue"
    )
    part.unlink()
    assert run() == 0
    assert files(tmp_path / "root") == WHOLE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_fills_up_in_unpacking_needs_no_second_download(server, run, tmp_path, capsys):
    part = tmp_path / "root" / IMAGES / "b.jpg.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    assert run() == 1
    assert "is full" in capsys.readouterr().err
    part.unlink()
    before = len(server.requests)
    assert run() == 0
    assert len(server.requests) == before
    assert files(tmp_path / "root") == WHOLE


def test_a_root_that_is_a_file_is_one_sentence(server, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["flickr8k", "--root", str(tmp_path / "file")], {"flickr8k": server.recipe()}) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot use ")


def test_an_interruption_says_how_to_continue(server, tmp_path, capsys):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    server.answers = [503]
    assert main(["flickr8k", "--root", str(tmp_path)], {"flickr8k": server.recipe()}, interrupt) == 130
    assert capsys.readouterr().err.endswith("interrupted; run the same command again to continue\n")


def test_where_a_form_has_to_be_filled_in_the_user_is_directed_there_and_a_second_run_finds_the_photographs(
    server, tmp_path, capsys
):
    captions = b'{"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "A dog."}]}]}'
    server.files["/caption_datasets.zip"] = zipped({"dataset_flickr30k.json": captions})
    archive = Archive(f"{server.url}/caption_datasets.zip", None, only=("dataset_flickr30k.json",))
    recipes = {"flickr30k": Recipe("flickr30k", (archive,), "for tests", RECIPES["flickr30k"].by_hand)}
    assert main(["flickr30k", "--root", str(tmp_path)], recipes) == 1
    printed = capsys.readouterr().err
    assert "https://forms.illinois.edu/sec/229675" in printed
    assert f"{tmp_path}/flickr30k-images/*.jpg" in printed
    (tmp_path / "flickr30k-images").mkdir()
    (tmp_path / "flickr30k-images/1.jpg").write_bytes(b"jpeg")
    assert main(["flickr30k", "--root", str(tmp_path)], recipes) == 0
    assert "train: 1 images" in capsys.readouterr().out


# The real recipes


def test_every_real_archive_is_a_zip_with_a_well_formed_digest():
    sizes = {"sha256": 64, "md5": 32}
    for recipe in RECIPES.values():
        for archive in recipe.archives:
            algorithm, _, digest = (archive.digest or "").partition(":")
            assert re.fullmatch(r"https?://\S+\.zip", archive.url)
            assert re.fullmatch(r"[0-9a-f]+", digest)
            assert len(digest) == sizes[algorithm]


def test_an_unknown_data_set_is_a_usage_error_that_lists_the_known_ones():
    command = [sys.executable, "-m", "training.prepare", "imagenet", "--root", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert result.returncode == 2
    assert all(name in result.stderr for name in RECIPES)
