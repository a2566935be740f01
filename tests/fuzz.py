"""Files that hurt: pictures of every format damaged in every way, and ones made to cost time or memory.

    python tests/fuzz.py --cases 5000 --seed 1

Every file goes through `load_image`, which has to give an image or one ImageError soon and within little memory. Then
all go, fifty at a time, through `Captioner.stream`, the command and the page's API, with a small model of random
weights. These have to give a caption or the same error in the place of each. The first batch that breaks this ends the
run, and its files are kept. `cases` and `bombs` are for other tests.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import gc
import io
import itertools
import json
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import unittest.mock
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conftest import run_app, small_captioner
from PIL import Image, PngImagePlugin

from app.benchmark import form
from app.service import Service, return_memory, sentence_for
from captioner import Captioner
from captioner.cli import SUFFIXES
from captioner.cli import main as command
from captioner.images import FORMATS, ImageError, load_image

MAX_PIXELS = 2**20
SECONDS = 5.0  # of processor time, for one file by itself and for a batch by any other way
BATCH = 50
MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA I;16 I;16B".split()
# What Pillow writes with options of its own.
VARIANTS: dict[str, list[dict]] = {
    "JPEG": [
        {"quality": 30, "progressive": True},
        {"restart_marker_blocks": 1},
        {"subsampling": 0, "comment": b"a" * 99},
    ],
    "PNG": [{"optimize": True}, {"compress_level": 0}],
    "GIF": [{"interlace": False}, {"comment": b"a" * 600}],
    "TIFF": [{"compression": name} for name in ("tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate")]
    + [{"big_tiff": True}, {"tiffinfo": {274: 6, 278: 3}}],
    "WEBP": [{"lossless": True}, {"quality": 10}],
    "AVIF": [{"quality": 20, "speed": 10}, {"subsampling": "4:0:0", "speed": 10}],
    "JPEG2000": [{"no_jp2": True}, {"tile_size": (16, 16)}, {"irreversible": True, "quality_layers": [20, 5]}],
    "TGA": [{"compression": "tga_rle"}],
    "BMP": [{"dpi": (72, 72)}],
}
EXTREMES = [
    number.to_bytes(size, order)
    for size in (1, 2, 4)
    for number in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)
    for order in ("big", "little")
]


def photograph(width: int = 37, height: int = 29) -> Image.Image:
    """A picture with edges, noise, and every alpha."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width))
    bands = (rows * 7 + noise, columns * 5 + noise, (rows // 8 + columns // 8) % 2 * 200, columns * 6)
    return Image.fromarray(np.stack(bands, axis=2).clip(0, 255).astype(np.uint8), "RGBA")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of that format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@functools.cache
def pictures() -> dict[str, bytes]:
    """A small file of every format and mode that Pillow writes, with the options that change its structure."""
    Image.init()
    whole = photograph()
    found = {}
    for kind, mode in itertools.product(sorted(Image.SAVE), MODES):
        if kind not in FORMATS and mode not in ("L", "RGB"):
            continue
        for number, options in enumerate([{}, *VARIANTS.get(kind, [])]):
            try:
                image = Image.new(mode, whole.size, 77) if mode.startswith("I;16") else whole.convert(mode)
                with warnings.catch_warnings(action="ignore"):
                    data = encoded(image, kind, **options)
                found[f"{mode.replace(';', '-')}-{number}.{kind.lower()}"] = data
            except Exception:  # the format has no such mode or option
                continue
    exif = Image.Exif()
    exif[274], exif[270] = 6, "text"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * 300, zip=True)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    rgb = whole.convert("RGB")
    extra = {"exif": exif, "icc_profile": b"\0" * 300, "xmp": b'<x tiff:Orientation="3"/>'}
    for kind, options in {"JPEG": extra, "PNG": {**extra, "pnginfo": text}, "WEBP": extra, "AVIF": extra}.items():
        found[f"metadata.{kind.lower()}"] = encoded(rgb, kind, **options)
    # With these compressions libtiff itself crashes as it writes other modes.
    for mode, compression in (("RGB", "jpeg"), ("1", "group3"), ("1", "group4")):
        found[f"{compression}.tiff"] = encoded(whole.convert(mode), "TIFF", compression=compression)
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"):
        frames = [rgb.rotate(angle) for angle in (0, 90, 180)]
        found[f"frames.{kind.lower()}"] = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    return found


# --- files that are made to be expensive


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(entries: list[tuple[int, int, int, int]], body: bytes = b"") -> bytes:
    """A TIFF with these tags (number, type, count, value or offset) after `body`, which begins at byte 8."""
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + struct.pack("<H", len(entries)) + directory + bytes(4)
    )


# 64 x 48 grey pixels from byte 8 in one strip.
GREY = [
    (256, 3, 1, 64),
    (257, 3, 1, 48),
    (258, 3, 1, 8),
    (259, 3, 1, 1),
    (262, 3, 1, 1),
    (273, 4, 1, 8),
    (277, 3, 1, 1),
]


def many_tags(count: int = 3000, size: int = 300_000) -> list[tuple[int, int, int, int]]:
    """Tags that all name the same bytes: `count` * `size` bytes for whoever copies each."""
    return [(1000 + number, 1, size, 8) for number in range(count)]


def jpeg_segments(segment: bytes, count: int = 1) -> bytes:
    """A small JPEG with a segment (marker and data) that often after its first marker."""
    data = encoded(photograph().convert("RGB"), "JPEG")
    return data[:2] + (segment[:2] + struct.pack(">H", len(segment)) + segment[2:]) * count + data[2:]


def jpeg_exif(exif: bytes) -> bytes:
    """A JPEG whose EXIF goes over many segments, without the resolution that Pillow would otherwise look for there."""
    data = encoded(photograph().convert("RGB"), "JPEG").replace(b"JFIF", b"JFXX")
    parts = [b"Exif\0\0" + exif[first : first + 65_000] for first in range(0, len(exif), 65_000)]
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return data[:2] + segments + data[2:]


def jpeg_scans(size: int = 1000, count: int = 20_000) -> bytes:
    """A progressive JPEG that goes over all its blocks again and again, at 12 bytes a time."""
    data = encoded(Image.new("L", (size, size), 128), "JPEG", progressive=True)
    runs = "0" + format((size // 8) ** 2 - 2**13, "013b") + "1" * 2  # one run of blocks without coefficients
    table = b"\xff\xc4" + struct.pack(">H", 20) + b"\x10" + bytes([1] + [0] * 15) + b"\xd0"
    scan = b"\xff\xda\0\x08\x01\x01\x00\x01\x3f\x10" + int(runs[:16].ljust(16, "1"), 2).to_bytes(2, "big")
    return data[:-2] + table + scan * count + b"\xff\xd9"


def gif_comment(megabytes: int = 8) -> bytes:
    """A GIF with a comment in many small blocks."""
    data = encoded(Image.new("P", (8, 8)), "GIF")
    start = data.index(b",", 13)
    return data[:start] + b"!\xfe" + (b"\xff" + b"a" * 255) * (megabytes << 12) + b"\0" + data[start:]


def icon(size: int = 12_000) -> bytes:
    """An icon of that many pixels a side, which says that it has 256."""
    picture = encoded(Image.new("1", (size, size)), "PNG")
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(picture), 22) + picture


def box_size(kind: str, name: bytes, skip: int, size: int, **options: object) -> bytes:
    """A large picture whose container says that it has 10 x 10 pixels."""
    data = encoded(Image.new("L", (size, size), 90), kind, **options)
    at = data.index(name) + 4 + skip
    return data[:at] + struct.pack(">II", 10, 10) + data[at + 8 :]


def j2k_tile() -> bytes:
    """A JPEG 2000 codestream that says it is one tile of 30,000 x 30,000 pixels."""
    data = bytearray(encoded(Image.new("L", (64, 64)), "JPEG2000", no_jp2=True))
    at = data.index(b"\xff\x51")
    struct.pack_into(">II", data, at + 6, 30_000, 30_000)
    struct.pack_into(">II", data, at + 22, 30_000, 30_000)
    return bytes(data)


def webp_canvas() -> bytes:
    """An animation on a canvas of 60,000 x 60,000 pixels."""
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    at = data.index(b"VP8X") + 12
    return data[:at] + 2 * (59_999).to_bytes(3, "little") + data[at + 6 :]


def png(*chunks: bytes) -> bytes:
    """A small PNG with more chunks after its header."""
    data = encoded(photograph(), "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def gif_screen() -> bytes:
    """A GIF of one pixel on a screen of 65,535 x 65,535."""
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    data[6:10] = b"\xff" * 4
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "icon.png": icon,
    "screen.gif": gif_screen,
    "comment.gif": gif_comment,
    "scans.jpg": jpeg_scans,
    "segments.jpg": lambda: jpeg_segments(b"\xff\xe1Exif\0\0abcd", 300_000),
    "exif.jpg": lambda: jpeg_exif(tiff(many_tags(), bytes(300_000))),
    "exif.png": lambda: png(chunk(b"eXIf", tiff(many_tags(), bytes(300_000)))),
    "exif.avif": lambda: encoded(photograph(), "AVIF", speed=10, exif=tiff(many_tags(300), bytes(300_000))),
    "size.png": lambda: (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    ),
    "text.png": lambda: png(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000)))] * 60),
    "text-of-one.png": lambda: png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 1))),
    "profile.png": lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200_000_000), 1))),
    "chunks.png": lambda: png(chunk(b"abCd", b"") * 300_000),
    "chunks-at-the-end.png": lambda: encoded(photograph(), "PNG")[:-12] + chunk(b"abCd", b"") * 2_000_000,
    "frames.png": lambda: png(chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "tags.tiff": lambda: tiff(GREY + many_tags(), bytes(300_000)),
    "tags-inside.tiff": lambda: tiff(
        [*GREY, (34665, 4, 1, 400_008)],
        bytes(400_000)
        + struct.pack("<H", 3000)
        + b"".join(struct.pack("<HHII", *tag) for tag in many_tags())
        + bytes(4),
    ),
    "strips.tiff": lambda: tiff(
        [*GREY[:5], (273, 4, 2_000_000, 4096), GREY[6], (278, 3, 1, 1), (279, 4, 2_000_000, 4096)], bytes(8_010_000)
    ),
    "tile.tiff": lambda: tiff(
        [
            *GREY[:3],
            (259, 3, 1, 8),
            GREY[4],
            GREY[6],
            (322, 3, 1, 65520),
            (323, 3, 1, 65520),
            (324, 4, 1, 8),
            (325, 4, 1, 99),
        ],
        zlib.compress(bytes(10_000)),
    ),
    "loop.tiff": lambda: tiff(GREY, bytes(3072))[:-4] + struct.pack("<I", 8 + 3072),
    "one-tile.j2k": j2k_tile,
    "box.jp2": lambda: box_size("JPEG2000", b"ihdr", 0, 2000),
    "box.avif": lambda: box_size("AVIF", b"ispe", 4, 4000, speed=10),
    "canvas.webp": webp_canvas,
    "comment.ppm": lambda: b"P6 #" + b"a" * 5_000_000 + b"\n4 4 255\n" + bytes(48),
    "digits.ppm": lambda: b"P3 4 4 255 " + b"9" * 5_000_000,
    "size.pgm": lambda: b"P5 99999 99999 255\n",
    "script.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n",
    "bits.bmp": lambda: b"BM" + struct.pack("<IIIIiiHHI", 54, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 1) + bytes(20),
}


def bombs() -> Iterator[tuple[str, bytes]]:
    """Files that are made to cost much time or memory, each with its name."""
    for name, make in BOMBS.items():
        yield name, make()


# --- damage


def parts(data: bytes) -> list[bytes]:
    """A file cut where its chunks, boxes, or segments begin, as far as they can be followed."""
    cuts = [0]
    if data[:4] == b"\x89PNG":
        at, size = 8, lambda at: 12 + int.from_bytes(data[at : at + 4], "big")
    elif data[:4] == b"RIFF":
        at, size = 12, lambda at: 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
    elif data[:2] == b"\xff\xd8":
        at, size = 2, lambda at: 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    elif data[4:8] in (b"ftyp", b"jP  "):
        at, size = 0, lambda at: max(8, int.from_bytes(data[at : at + 4], "big"))
    else:
        at, size = 0, lambda at: 16
    while at < len(data) and len(cuts) < 200:
        cuts.append(at)
        at += size(at)
    return [data[first:last] for first, last in itertools.pairwise([*cuts, len(data)])]


def with_checksums(data: bytes) -> bytes:
    """A damaged PNG with the checksums of its chunks made right, so that more of it is read."""
    first, *chunks = parts(data)
    return first + b"".join(chunk(each[4:8], each[8:-4]) if len(each) >= 12 else each for each in chunks)


def truncate(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """The beginning of a file."""
    return data[: chance.randrange(len(data))]


def flip(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Some bits turned."""
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 2, 5, 40])):
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def extreme(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """Numbers near the beginning, where headers are, at the ends of their ranges."""
    for _ in range(chance.choice([1, 1, 2, 4])):
        value = chance.choice(EXTREMES)
        at = chance.randrange(min(len(data), chance.choice([32, 64, 400])))
        data = data[:at] + value + data[at + len(value) :]
    return data


def cut(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """A piece left out, or there twice."""
    first, last = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:first] + data[last:] if chance.random() < 0.5 else data[:last] + data[first:]


def splice(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """The beginning of a file and the end of another."""
    return data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]


def shuffle(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Chunks in another order, or one of another file's among them."""
    chunks = parts(data)
    if chance.random() < 0.5:
        chunks[chance.randrange(len(chunks))] = chance.choice(parts(other))
    else:
        a, b = (chance.randrange(len(chunks)) for _ in range(2))
        chunks[a], chunks[b] = chunks[b], chunks[a]
    return b"".join(chunks)


def noise(data: bytes, _: bytes, chance: random.Random) -> bytes:
    """A signature with anything after it."""
    return data[: chance.choice([4, 12, 40])] + chance.randbytes(chance.choice([0, 30, 3000]))


DAMAGE = (truncate, flip, flip, extreme, extreme, cut, splice, shuffle, shuffle, noise)


def cases(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged files, each with a name that ends in its format; the same for the same seed and version of Pillow."""
    chance = random.Random(seed)
    whole = list(pictures().items())
    by_format = collections.defaultdict(list)
    for name, data in whole:
        by_format[name.rpartition(".")[2]].append((name, data))
    readable = [kind.lower() for kind in FORMATS]
    for number in range(count):
        kinds = readable if chance.random() < 0.85 else sorted(by_format)
        name, data = chance.choice(by_format[chance.choice(kinds)])
        same = by_format[name.rpartition(".")[2]]
        _, other = chance.choice(same if chance.random() < 0.5 else whole)
        damage = chance.choice(DAMAGE)
        damaged = damage(data, other, chance)
        if damaged[:4] == b"\x89PNG" and chance.random() < 0.7:
            damaged = with_checksums(damaged)
        yield f"{number:05d}-{damage.__name__}-{name}", damaged


def one_sentence(error: str) -> bool:
    """Whether people can read it: one line, no object's address, no longer than a few lines of a terminal."""
    return "\n" not in error and not re.search(r"0x[0-9a-f]{6}", error) and len(error) < 500


def outcome(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """What `load_image` makes of a file: "image" or the ImageError's sentence. Anything else is raised."""
    try:
        image = load_image(data, max_pixels)
    except ImageError as error:
        return str(error)
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= max_pixels
    image.tobytes()
    return "image"


# --- the ways to a caption


def by_stream(captioner: Captioner, paths: Sequence[Path]) -> list[str]:
    """What `Captioner.stream` makes of the bytes of files: "image" for a caption, or the ImageError's sentence."""
    files = (path.read_bytes() for path in paths)
    results = captioner.stream(files, max_pixels=MAX_PIXELS, batch_size=16, beam_size=1, max_length=2)
    return [str(result) if isinstance(result, ImageError) else "image" for result in results]


def by_command(model: Path, paths: Sequence[Path]) -> list[str]:
    """What the command makes of the folder that holds these files, in which each error begins with the path.

    Raises:
        AssertionError: not every file has a record, or the exit status or stderr does not fit the records.
    """
    folder, errors = paths[0].parent, io.StringIO()
    output = folder.with_suffix(".jsonl")
    options = ["--max-megapixels", str(MAX_PIXELS / 1e6), "--beam-size", "1", "--max-length", "2", "--batch-size", "16"]
    with contextlib.redirect_stderr(errors):
        status = command([str(folder), "--model", str(model), "--format", "jsonl", "--output", str(output), *options])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in paths]
    failed = [record["error"] for record in records if "error" in record]
    assert errors.getvalue() == "".join(f"captioner: {error}\n" for error in failed), errors.getvalue()
    assert status == (1 if failed else 0)
    return [record.get("error", "image") for record in records]


def by_page(url: str, paths: Sequence[Path]) -> list[str]:
    """What the page's API says of files that are uploaded to it."""
    end = b"--captioner--\r\n"
    forms = [form(path) for path in paths]
    uploaded = post(
        f"{url}/gradio_api/upload", b"".join(body.removesuffix(end) for body, _ in forms) + end, forms[0][1]
    )
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in uploaded]
    values = json.dumps({"data": [files, "", 1, 1, 2, False, 1.0, 0.9, 0]}).encode()
    address = f"{url}/gradio_api/call/caption_batch"
    event = post(address, values, {"Content-Type": "application/json"})["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=120) as answer:
        kind, data = answer.read().decode().strip().splitlines()[-2:]
    assert kind == "event: complete", data
    return [one.get("error", "image") for one in json.loads(data.removeprefix("data: "))[0]]


def post(url: str, body: bytes, headers: dict[str, str]) -> Any:
    """The JSON that a POST is answered with."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120) as answer:
        return json.load(answer)


@contextlib.contextmanager
def page(captioner: Captioner) -> Iterator[str]:
    """The page's address for as long as the block lasts, with the same limit of pixels as the other ways."""
    service = functools.partial(Service, max_pixels=MAX_PIXELS)
    with unittest.mock.patch("app.server.Service", service), run_app({"small": captioner}, max_upload_mb=100) as url:
        yield url


@contextlib.contextmanager
def limited(name: str, slowest: dict[str, float]) -> Iterator[None]:
    """A block that may take so many `SECONDS`, else AssertionError is raised. One that hangs ends the process."""
    faulthandler.dump_traceback_later(600, exit=True)  # a codec cannot be interrupted otherwise; others may be busy
    began = time.process_time()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    took = time.process_time() - began
    slowest[name] = max(slowest.get(name, 0.0), took)
    assert took < SECONDS, f"{name} took {took:.1f} s"


def by_every_way(
    files: Sequence[tuple[str, bytes]],
    folder: Path,
    captioner: Captioner,
    model: Path,
    url: str,
    slowest: dict[str, float],
) -> list[str]:
    """What `load_image` makes of files: "image" or the ImageError's sentence; the same as by every other way.

    Args:
        files: in the order of their names.
        folder: made for them, and removed unless something is wrong.
        captioner: a small model.
        model: the same as a folder.
        url: a page with the same.
        slowest: for each way the processor time of its longest call, in seconds, which is brought up to date.

    Raises:
        AssertionError: by one way there is another outcome, or it took too long.
    """
    folder.mkdir()
    paths = [folder / (name if Path(name).suffix in SUFFIXES else f"{name}.jpg") for name, _ in files]
    for path, (_, data) in zip(paths, files, strict=True):
        path.write_bytes(data)
    expected = []
    for name, data in files:
        with limited("load_image", slowest):
            expected.append(outcome(data))
        assert one_sentence(expected[-1]), name
    named = [
        said.replace(f"<{len(data)} bytes>", str(path), 1)
        for path, (_, data), said in zip(paths, files, expected, strict=True)
    ]
    for_people = [said if said == "image" else sentence_for(ImageError(said)) for said in expected]
    for way, call, wanted in (
        ("stream", functools.partial(by_stream, captioner), expected),
        ("command", functools.partial(by_command, model), named),
        ("page", functools.partial(by_page, url), for_people),
    ):
        with limited(way, slowest):
            found = call(paths)
        for path, one, other in zip(paths, found, wanted, strict=True):
            assert one == other, f"{path} by {way}: {one}"
    shutil.rmtree(folder)
    return expected


def memory() -> float:
    """The memory that this process has, in MB, after what is free was given back to the system."""
    gc.collect()
    return_memory()
    return int(re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10


def peak_memory(reset: bool = False) -> float:
    """The most memory this process has had, in MB; on Linux, since it was last reset."""
    if sys.platform == "linux":
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="how many damaged files (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    folder, began = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic()
    captioner = small_captioner()
    captioner.save_pretrained(folder / "model")
    rest = cases(options.cases, options.seed)
    batches = itertools.chain(([bomb] for bomb in bombs()), iter(lambda: list(itertools.islice(rest, BATCH)), []))
    results: list[str] = []
    slowest: dict[str, float] = {}
    before = 0.0
    with page(captioner) as url:
        for number, batch in enumerate(batches):
            results += by_every_way(batch, folder / str(number), captioner, folder / "model", url, slowest)
            if number == len(BOMBS) + 2:
                before = memory()
                peak_memory(reset=True)
            if number % 20 == 0:
                print(f"{len(results)} files, {memory():.0f} MB, {time.monotonic() - began:.0f} s", flush=True)
        grown, peak = memory() - before, peak_memory() - before
    images = results.count("image")
    print(f"{len(results)} files by every way: {images} captions, {len(results) - images} errors, nothing else")
    print(f"longest call, s: {', '.join(f'{way} {seconds:.2f}' for way, seconds in slowest.items())}")
    print(f"memory: {before:.0f} MB, grew by {grown:.0f} MB, at most by {peak:.0f} MB")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
