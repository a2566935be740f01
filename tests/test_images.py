"""Whatever a user has becomes an upright RGB image, or an error that names it."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import PHOTOS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, features

from captioner import images
from captioner.images import ImageError, Preprocessing, describe, load_image

MODES = "1 L P RGB RGBA CMYK YCbCr LAB HSV I F LA PA RGBX RGBa La I;16 I;16B".split()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(MODES), st.integers(1, 40), st.integers(1, 40))
def test_every_mode_and_size_gives_rgb_of_the_same_size(mode, width, height):
    image = load_image(Image.new(mode, (width, height)))
    assert (image.mode, image.size) == ("RGB", (width, height))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["PNG", "TIFF", "WEBP", "GIF", "BMP"]),
    st.sampled_from("1 L P RGB RGBA LA".split()),
    st.integers(1, 30),
)
def test_every_format_is_read_from_bytes(kind, mode, size):
    buffer = io.BytesIO()
    try:
        Image.new("RGB", (size, 2 * size), "teal").convert(mode).save(buffer, kind)  # "P" with a palette in it
    except OSError:
        return  # the format has no such mode
    assert load_image(buffer.getvalue()).size == (size, 2 * size)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_paths_bytes_files_and_images_give_the_same():
    path = PHOTOS / "cat.jpg"
    expected = np.asarray(Image.open(path).convert("RGB"))
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), file, Image.open(path)):
            assert np.array_equal(np.asarray(load_image(source)), expected)
        assert not file.closed


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    upright = Image.new("RGB", (30, 20), "white")
    upright.paste("red", (0, 0, 8, 8))
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    assert np.array_equal(np.asarray(load_image(encoded(stored, exif=exif))), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_becomes_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert np.asarray(load_image(image.convert(mode)))[0, :, 0].tolist() == [255, 0]


def test_a_transparent_colour_of_a_palette_becomes_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert np.asarray(load_image(encoded(image, transparency=0))).tolist() == [[[255] * 3, [40, 50, 60]]]


def test_sixteen_bits_are_scaled_and_not_cut_off():
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    for source in (Image.fromarray(values), encoded(Image.fromarray(values)), values):
        assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 128, 255]


def test_floating_point_images_are_read_in_their_own_scale():
    for top in (1.0, 255.0, 1000.0):
        image = Image.fromarray(np.array([[0.0, top]], dtype=np.float32))
        assert np.asarray(load_image(image))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    red, _, blue = np.asarray(load_image(data))[4, 4]
    assert red > 240
    assert blue < 15


@pytest.mark.parametrize(
    ("array", "pixel"),
    [
        (np.full((4, 5), 7, np.uint8), [7, 7, 7]),
        (np.full((4, 5, 1), 7, np.uint8), [7, 7, 7]),
        (np.full((4, 5, 3), [1, 2, 3], np.uint8), [1, 2, 3]),
        (np.full((4, 5, 4), [1, 2, 3, 0], np.uint8), [255, 255, 255]),
        (np.full((4, 5, 3), 1.0), [255, 255, 255]),
        (np.full((4, 5, 3), 0.2, np.float32), [51, 51, 51]),
        (np.full((4, 5), True), [255, 255, 255]),
        (np.full((4, 5, 3), 200), [200, 200, 200]),
        (np.full((4, 5, 3), 100, np.int8), [100, 100, 100]),
    ],
)
def test_arrays_and_tensors_of_every_kind_are_read(array, pixel):
    image = load_image(array)
    assert image.size == (5, 4)
    assert list(image.getpixel((2, 2))) == pixel
    if array.ndim == 3:
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        assert list(load_image(tensor).getpixel((2, 2))) == pixel


def bomb(width, height):
    """A PNG that says it is very large and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg does not exist"),
        (str(PHOTOS), "is a folder"),
        (b"", "<0 bytes> is empty"),
        (b"hello, I am text", "<16 bytes> is not an image"),
        (io.StringIO("text"), "open it in binary mode"),
        ("/dev/zero", "is a pipe or a device"),
        ("a\0b.jpg", "cannot be opened: .*null"),
        ("a" * 300, "cannot be opened: File name too long"),
        (encoded(Image.new("RGB", (9, 9)), "ICO"), "is not an image that can be read; JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image that can be read"),
        ((PHOTOS / "cat.jpg").read_bytes()[:9000], "<9000 bytes> is damaged or truncated"),
        (encoded(Image.new("RGB", (60, 60), "red"))[:-30], "damaged or truncated"),
        ("https://example.org/cat.jpg", "download the image first"),
        (bomb(20000, 20000), "too many pixels: 20000 x 20000"),
        (bomb(0, 5), "<.* bytes>"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4, 3)) * float("nan"), "from 0 to 1"),
        (np.full((4, 4, 3), 200.0), "divide by 255"),
        (np.full((4, 4, 3), -1), "0 to 255"),
        (np.zeros((4, 4, 7), np.uint8), r"shape \(4, 4, 7\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((2, 2), complex), "complex"),
        (np.zeros((2, 2), object), "object"),
        (np.zeros((20_000, 20_000), bool), "too many pixels"),
        (torch.zeros(3, 4, 4, device="meta"), "cannot be read"),
        (torch.zeros(4, 4), r"tensor of shape \(4, 4\)"),
        (42, "a int"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_reason(source, message):
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        load_image(tmp_path / "empty.png")


def test_the_limit_of_pixels_is_the_users_and_checked_before_decoding(recwarn):
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    image = Image.new("1", (20000, 10000))  # more than Pillow's own limit
    data = encoded(image)
    with pytest.raises(ImageError, match="20000 x 10000"):
        load_image(data)
    assert load_image(data, max_pixels=300_000_000).size == (20000, 10000)
    assert not recwarn.list
    assert limit == Image.MAX_IMAGE_PIXELS is not None
    assert filters == warnings.filters


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "many", None])
def test_a_limit_of_pixels_that_is_none_is_an_error_of_the_caller(limit):
    with pytest.raises(ValueError, match="max_pixels must be a number from 1") as error:
        load_image(Image.new("RGB", (4, 4)), limit)
    assert not isinstance(error.value, ImageError)


@pytest.mark.parametrize(
    "error",
    [RuntimeError, AttributeError, KeyError, MemoryError, RecursionError, AssertionError, struct.error, EOFError],
)
@pytest.mark.parametrize("step", ["__init__", "load"])
def test_whatever_a_decoder_raises_becomes_an_image_error(monkeypatch, error, step):
    def broken(*_, **__):
        raise error("the decoder's words")

    data = encoded(Image.new("RGB", (9, 9)), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, step, broken)
    with pytest.raises(ImageError, match=r"bytes> .*the decoder's words"):
        load_image(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_a_damaged_avif_is_an_image_error():
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "AVIF")
    for size in range(40, len(data), 97):
        with pytest.raises(ImageError, match=f"<{size} bytes>"):
            load_image(data[:size])


def test_a_stream_that_never_ends_is_refused_after_its_beginning():
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="/dev/zero is not an image"):
        load_image(endless)


@pytest.mark.parametrize("beginning", [b"", b"\x89PNG\r\n\x1a\n"])
def test_no_more_than_so_many_bytes_are_read(tmp_path, monkeypatch, beginning):
    monkeypatch.setattr(images, "MAX_BYTES", 5_000_000)
    path = tmp_path / "long.png"
    path.write_bytes(beginning + bytes(6_000_000))
    with path.open("rb") as file, pytest.raises(ImageError, match="more than 4 MiB" if beginning else "not an image"):
        load_image(file)
    with pytest.raises(ImageError, match=r"long\.png has more than 4 MiB"):
        load_image(path)


def test_a_pipe_is_read_by_its_descriptor_and_refused_by_its_name(tmp_path):
    data = encoded(Image.new("RGB", (5, 6)))
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        assert load_image(f"/dev/fd/{reading}").size == (5, 6)
    finally:
        os.close(reading)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png is a pipe or a device"):
        load_image(tmp_path / "pipe.png")


def test_a_file_object_without_seeking_is_read(tmp_path):
    class Socket:
        def __init__(self, data):
            self.left = data

        def read(self, size):
            chunk, self.left = self.left[:10], self.left[10:]
            return chunk

    assert load_image(Socket(encoded(Image.new("RGB", (5, 6))))).size == (5, 6)
    with pytest.raises(ImageError, match="<Socket> is empty"):
        load_image(Socket(b""))


def test_a_link_to_nothing_is_called_that(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ImageError, match=r"link\.png is a link to a file that does not exist"):
        load_image(tmp_path / "link.png")


def test_a_tiff_gives_its_first_page_and_is_turned_once(tmp_path):
    pages = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue")]
    pages[0].paste("green", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0x829A] = 0.5  # a directory within
    for compression in (None, "tiff_lzw"):
        data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:], exif=exif, compression=compression)
        image = load_image(data)
        assert np.array_equal(np.asarray(image), np.asarray(pages[0].transpose(Image.Transpose.ROTATE_270)))


def test_the_orientation_may_stand_in_xmp_or_in_imagemagicks_profile():
    upright = Image.new("RGB", (30, 20), "white")
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="6"/>')
    assert load_image(encoded(upright, pnginfo=text)).size == (20, 30)
    exif = Image.Exif()
    exif[0x0112] = 8
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n99\n{exif.tobytes().hex()}")
    assert load_image(encoded(upright, pnginfo=text)).size == (20, 30)


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 50, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_exif_does_not_spoil_an_image(exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        assert load_image(encoded(Image.new("RGB", (5, 6)), kind, exif=exif)).size == (5, 6)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow cannot write AVIF")
def test_the_orientation_of_an_avif_is_kept_without_its_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "text"
    assert load_image(encoded(Image.new("RGB", (30, 20)), "AVIF", exif=exif)).size == (20, 30)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([(8, 8), (7, 12)]))
def test_preprocessing_squeezes_the_whole_image_and_normalises_it(width, height, size):
    generator = np.random.default_rng(width * 100 + height)
    image = Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8))
    batch = Preprocessing(size=size)([image, image])
    assert batch.shape == (2, 3, *size)
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(batch[0].transpose(1, 2, 0) - expected).max() < 1e-5


def test_preprocessing_comes_back_from_plain_data():
    preprocessing = Preprocessing((10, 20), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    for values in (
        {"size": [0, 5]},
        {"size": [10**9, 10**9]},
        {"size": [5]},
        {"size": ["5", "5"]},
        {"size": [5.0, 5.0]},
        {"mean": [0.1, float("nan"), 0.1]},
        {"std": [1, 1, 0]},
        {"std": ["a", 1, 1]},
    ):
        with pytest.raises((TypeError, ValueError)):
            Preprocessing.from_dict(values)
    with pytest.raises(TypeError):
        Preprocessing.from_dict({"colour": [1]})


def test_inputs_have_short_names():
    assert describe(b"abc") == "<3 bytes>"
    assert describe(PHOTOS / "cat.jpg") == str(PHOTOS / "cat.jpg")
    assert describe(np.zeros((2, 3))) == "<array of shape (2, 3)>"
