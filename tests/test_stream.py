"""Any number of images through one iterator: in order, in bounded memory, errors in their places."""

import gc
import io
import threading
import time
import typing
import weakref

import numpy as np
import pytest
import torch
from conftest import PHOTOS
from PIL import Image

import captioner
from captioner import Caption, Captioner, ImageError, explain, reading
from captioner.images import load_image, load_reduced
from captioner.options import Options

PATHS = sorted(PHOTOS.glob("*.jpg"))
QUICK = {"beam_size": 1, "max_length": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """300 small files of different pictures, of which every tenth is no image."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0)
    paths = []
    for number in range(300):
        paths.append(folder / f"{number:03d}.png")
        if number % 10 == 3:
            paths[-1].write_bytes(b"no image")
        else:
            Image.fromarray(noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("captioner-reader")]


def counted(sources, pulled):
    for source in sources:
        pulled.append(source)
        yield source


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_hundreds_of_images_come_in_order_with_errors_in_place_and_few_read_ahead(small, files, batch_size):
    pulled = []
    stream = small.stream(counted(files, pulled), batch_size=batch_size, **QUICK)
    for number, result in enumerate(stream):
        assert number < len(pulled) <= number + 2 * batch_size
        if number % 10 == 3:
            assert isinstance(result, ImageError)
            assert str(files[number]) in str(result)
        else:
            assert isinstance(result, Caption)
            assert result.source == str(files[number])
    assert number == 299
    assert readers() == []


@pytest.mark.parametrize("options", [{}, {"beam_size": 1}, {"seed": 3, "temperature": 1.2, "alternatives": 1}])
def test_a_stream_gives_the_captions_of_its_images_alone_word_for_word(files, options):
    default = Captioner.from_pretrained(engine="onnx-float32")
    photos = [Image.open(path) for path in PATHS]
    halves = [photo.crop((0, 0, photo.width // 2, photo.height)) for photo in photos]
    sources = [*PATHS, *files[:5], *halves]
    alone = [default.caption(source, errors="return", **options) for source in sources]
    assert len({one.words for one in alone if isinstance(one, Caption)}) > 4
    for one, result in zip(alone, default.stream(iter(sources), batch_size=4, **options), strict=True):
        if isinstance(one, ImageError):
            assert str(result) == str(one)
        else:
            assert result.words == one.words
            assert [other.words for other in result.alternatives] == [other.words for other in one.alternatives]
            assert result.word_log_probabilities == pytest.approx(one.word_log_probabilities, abs=1e-4)
            assert np.allclose(result.attention, one.attention, atol=1e-4)


def test_nothing_is_read_before_the_first_result_is_asked_for(small):
    pulled = []
    stream = small.stream(counted(PATHS, pulled), **QUICK)
    assert (pulled, readers()) == ([], [])
    stream.close()
    assert pulled == []


def test_a_stream_that_is_closed_early_reads_no_more_and_leaves_no_thread(small, files, monkeypatch):
    begun, real = [], reading.load_reduced

    def slow(source, *options, **more):
        begun.append(source)
        time.sleep(0.05)
        return real(source, *options, **more)

    monkeypatch.setattr(reading, "load_reduced", slow)
    stream = small.stream(iter(files), batch_size=30, **QUICK)
    next(stream)
    assert readers()
    stream.close()
    assert readers() == []
    # The first batch, and of the next what the threads had begun.
    assert 30 <= len(begun) < 60
    with pytest.raises(StopIteration):
        next(stream)


def test_what_the_sources_raise_comes_after_the_results_before_it(small, files):
    def failing():
        yield from files[:10]
        raise ConnectionError("the camera is gone")

    stream = small.stream(failing(), batch_size=4, **QUICK)
    results = [next(stream) for _ in range(10)]
    assert [isinstance(result, ImageError) for result in results] == [number == 3 for number in range(10)]
    with pytest.raises(ConnectionError, match="the camera is gone"):
        next(stream)
    assert readers() == []


def test_a_network_that_fails_leaves_no_thread(small, files, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Captioner, "caption_photos", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(small.stream(files, batch_size=4))
    assert readers() == []


def test_sources_are_not_asked_again_after_their_end(small):
    class Once:
        ended = False

        def __iter__(self):
            return self

        def __next__(self):
            assert not self.ended
            self.ended = True
            raise StopIteration

    assert list(small.stream(Once())) == []


def test_what_is_closed_or_drawn_on_after_it_was_given_is_captioned_as_it_was():
    """Files that are closed, images that are closed, and one array and one image that are used again for each frame."""
    default = Captioner.from_pretrained()
    size = default.preprocessing.size[::-1]
    images = [Image.open(path).convert("RGB").resize(size) for path in PATHS]
    expected = [default.caption(image, **QUICK).log_probability for image in images]
    assert min(np.diff(sorted(expected))) > 1e-2
    array, canvas = np.asarray(images[0]).copy(), images[0].copy()

    def sources():
        for image in images:
            png = io.BytesIO()
            image.save(png, "PNG")
            with io.BytesIO(png.getvalue()) as file:
                yield file
            with Image.open(io.BytesIO(png.getvalue())) as opened:
                yield opened
            array[:] = np.asarray(image)
            yield array
            canvas.paste(image)
            yield canvas

    results = list(default.stream(sources(), **QUICK))
    found = [result.log_probability for result in results]
    assert found == pytest.approx(np.repeat(expected, 4), abs=1e-4)
    for result, image in zip(results, (image for image in images for _ in range(4)), strict=True):
        assert result.image.tobytes() == image.tobytes()


def test_photographs_are_read_by_several_threads_and_only_so_many_are_whole_in_memory(small, tmp_path, monkeypatch):
    paths = []
    for number in range(24):
        paths.append(tmp_path / f"{number}.jpg")
        Image.new("RGB", (2000, 1500), (number * 10, 99, 0)).save(paths[-1])
    alive, names, most = [], set(), 0
    real = reading.load_reduced

    def load(source, *options, **more):
        nonlocal most
        image, size = real(source, *options, **more)
        alive.append(weakref.ref(image))
        names.add(threading.current_thread().name)
        most = max(most, sum(one() is not None for one in alive))
        return image, size

    monkeypatch.setattr(reading, "load_reduced", load)
    captions = small.caption(paths, batch_size=4, **QUICK)
    gc.collect()
    assert not any(one() for one in alive)
    assert most <= reading.THREADS
    assert all(name.startswith("captioner-reader") for name in names)
    assert {caption.image.size for caption in captions} == {(1000, 750)}
    assert {caption.size for caption in captions} == {(2000, 1500)}


def test_a_caption_keeps_a_preview_and_where_the_whole_photograph_is(small, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    path = tmp_path / "phone.jpg"
    Image.effect_noise((1200, 900), 50).convert("RGB").save(path, exif=exif, icc_profile=b"a profile")
    result = small.caption(path, beam_size=2)
    for one in (result, *result.alternatives):
        assert (one.source, one.size, one.image.size) == (str(path), (900, 1200), (768, 1024))
        assert one.image.info == {"icc_profile": b"a profile"}
    assert result.heatmap(0).size == (768, 1024)
    assert result.heatmap(0, image=result.source).size == (900, 1200)
    from_bytes = small.caption(path.read_bytes(), beam_size=2)
    assert (from_bytes.source, from_bytes.size) == (None, (900, 1200))
    assert from_bytes == result


@pytest.mark.parametrize(
    ("size", "kept"), [((4000, 3000), (1000, 750)), ((3000, 900), (1500, 450)), ((1600, 20), (1600, 20))]
)
@pytest.mark.parametrize("turn", [1, 6])
def test_large_jpegs_are_decoded_at_a_part_of_their_size(size, kept, turn):
    exif = Image.Exif()
    exif[274] = turn
    file = io.BytesIO()
    Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 100).convert("RGB").save(file, "JPEG", exif=exif)
    image, whole = load_reduced(file.getvalue(), least=(768, 224))
    full = load_image(file.getvalue())
    assert whole == full.size == (size if turn == 1 else size[::-1])
    assert image.size == (kept if turn == 1 else kept[::-1])
    small, reference = (
        np.asarray(each.resize((64, 64), Image.Resampling.BILINEAR)).astype(int) for each in (image, full)
    )
    assert np.abs(small - reference).max() <= 4


@pytest.mark.parametrize(("size", "preview"), [((1024, 700), (1024, 700)), ((5, 9000), (1, 1024)), ((1, 1), (1, 1))])
def test_only_large_photographs_get_smaller(small, size, preview):
    image = Image.new("RGB", size, "red")
    kept = small.caption(image, **QUICK).image
    assert kept.size == preview
    assert kept is not image


def test_captions_keep_annotation_vectors_only_where_they_are_asked_for(small):
    plain = small.caption(PATHS)
    assert all(one.annotations is None for one in plain)
    asked = small.caption(PATHS, keep_annotations=True)
    for path, one in zip(PATHS, asked, strict=True):
        assert one.annotations.shape == (6, 12)
        assert one.annotations.base is None  # not a part of the whole batch's
        assert np.allclose(one.annotations, small.caption(path, keep_annotations=True).annotations, atol=1e-5)
        assert all(other.annotations is one.annotations for other in one.alternatives)
    assert asked == plain


def test_errors_are_raised_or_returned_as_asked(small, files):
    with pytest.raises(ImageError, match=r"003\.png is not an image"):
        small.caption(files[:6])
    assert readers() == []
    results = small.caption(files[:6], errors="return")
    assert [type(result) for result in results] == [Caption] * 3 + [ImageError] + [Caption] * 2
    assert isinstance(small.caption(files[3], errors="return"), ImageError)
    assert isinstance(small.caption(files[0], errors="return"), Caption)
    with pytest.raises(ValueError, match='errors must be "raise" or "return", not \'ignore\''):
        small.caption(files[0], errors="ignore")


def test_an_error_that_is_kept_keeps_nothing_of_its_file_in_memory(small, tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(PATHS[0].read_bytes()[:9000])
    error = small.caption(path, errors="return")
    assert "damaged" in str(error)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_what_cannot_be_streamed_is_refused_by_the_call(small):
    for one in (str(PATHS[0]), PATHS[0], b"data", Image.new("RGB", (9, 9)), io.BytesIO()):
        with pytest.raises(TypeError, match="takes an iterable of images"):
            small.stream(one)
    with pytest.raises(TypeError, match="iterable"):
        small.stream(5)
    with pytest.raises(ValueError, match="batch_size"):
        small.stream([], batch_size=0)
    with pytest.raises(TypeError, match="beams"):
        small.caption(PATHS[0], beams=3)


def test_the_options_of_the_types_are_those_of_the_stream():
    named = typing.get_type_hints(Captioner.stream)
    described = typing.get_type_hints(Options)
    assert {name: named[name] for name in described} == described
    assert named.keys() - described.keys() == {"sources", "return"}


def test_public_functions_say_what_they_return():
    scope = vars(captioner.api) | {"ImageError": ImageError, "Caption": Caption}
    for owner in (captioner, Caption, Captioner, explain):
        for name, function in vars(owner).items():
            if callable(function) and not name.startswith("_") and "return" in getattr(function, "__annotations__", {}):
                assert typing.get_type_hints(function, localns=scope)["return"] is not typing.Any, name
    for function in (captioner.caption, Captioner.caption):
        returned = [typing.get_type_hints(one, localns=scope)["return"] for one in typing.get_overloads(function)]
        assert returned == [Caption, Caption | ImageError, list[Caption], list[Caption | ImageError]]


def test_a_stream_computes_in_the_thread_that_asks(small):
    found = []
    hook = small.model.encoder.register_forward_hook(lambda *_: found.append(threading.current_thread()))
    list(small.stream(PATHS, batch_size=1, **QUICK))
    hook.remove()
    assert found == [threading.current_thread()] * len(PATHS)
    assert not torch.is_inference_mode_enabled()
