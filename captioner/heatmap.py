"""Maps of attention or evidence as pictures: overlays, figures and animations, with Pillow and NumPy alone."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Perceptually uniform colour maps (matplotlib's, CC0), by 17 evenly spaced colours each. The colours between them are
# interpolated, and within seven levels of the originals.
ANCHORS = {
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1f9f88 27ad81 3dbc74 5cc863 81d34d "
    "aadc32 d5e21a fde725",
    "magma": "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 cf4070 e55064 f4695c fb8761 fea571 "
    "fec287 fde0a1 fcfdbf",
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d04545 e35933 f1711f f98c0a fcaa0f "
    "f9c932 f2e865 fcffa4",
}


GREY = "#707070"  # of small text; readable on white
COVER = "#808080"  # over regions that were hidden from attention

# One scale for all words of a caption shows which words have concentrated and which have even attention. A scale for
# each word shows the details of a weak map, but an almost even map as brightly as a concentrated one.
SCALES = ("caption", "word")

# What a map holds: attention weights, or the falls of a word's log-probability; see `captioner.hiding`.
KINDS = ("attention", "evidence")


def overlay(
    image: Image.Image,
    weights: np.ndarray,
    strength: float = 0.65,
    colours: str = "inferno",
    displacement: tuple[float, float] = (0.0, 0.0),
    largest: float | None = None,
) -> Image.Image:
    """The image with a heatmap: regions of large weight are coloured brightly, the others darkened.

    Args:
        image: the photograph, RGB.
        weights: (rows, columns) attention weights of one word over the whole image.
        strength: opacity of the colours at the top of the scale, 0 to 1.
        colours: "viridis", "magma" or "inferno".
        displacement, largest: see `upsample`.

    Returns:
        An RGB image of the size of `image`.

    Raises:
        ValueError: the weights are not a map, or there is no such colour map.
    """
    heat = (255 * upsample(weights, image.size, displacement, largest)).round().astype(np.uint8)
    mask, lit = Image.fromarray(heat), image.convert("RGB").copy()
    # Regions of small weight are darkened, but stay recognisable.
    lit.paste("black", mask=mask.point([round(0.55 * strength * (255 - value)) for value in range(256)]))
    # The square root keeps weights in the middle of the scale visible, which a linear cover of dark colours would not.
    coloured = Image.fromarray(colour_table(colours).round().astype(np.uint8)[heat])
    lit.paste(coloured, mask=mask.point([round(strength * math.sqrt(255 * value)) for value in range(256)]))
    return lit


def upsample(
    weights: np.ndarray,
    size: tuple[int, int],
    displacement: tuple[float, float] = (0.0, 0.0),
    largest: float | None = None,
) -> np.ndarray:
    """Weights (rows, columns) as a smooth map (height, width) of numbers from 0 to 1.

    Args:
        size: width and height in pixels.
        displacement: offset between the centre of a region's receptive field and the centre of its cell, as a share
            of the image's height and width.
        largest: the weight at the top of the scale, which becomes 1, as do larger ones. By default the largest of the
            map, which must then be above zero.

    Raises:
        ValueError: the weights are not a 2-D array of finite non-negative numbers with a positive one among them.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(f"attention weights should have the shape (rows, columns), not {weights.shape}")
    if not (np.isfinite(weights).all() and weights.min() >= 0 and (weights.max() > 0 or largest is not None)):
        raise ValueError("attention weights should be finite and not negative, and one of them above zero")
    if weights.max() == 0:  # a word without evidence
        return np.zeros(size[::-1], dtype=np.float32)
    rows, columns = weights.shape
    down, right = displacement[0] * rows, displacement[1] * columns
    grid = Image.fromarray(np.pad(weights / weights.max(), ((0, math.ceil(down)), (0, math.ceil(right))), mode="edge"))
    box = (right, down, right + columns, down + rows)
    smooth = np.asarray(grid.resize(size, Image.Resampling.BICUBIC, box))
    # Interpolation may change the peak; it still stands for the largest weight.
    return (smooth / smooth.max() * (weights.max() / (largest or weights.max()))).clip(0, 1)


def cell_edges(count: int, side: int, displacement: float) -> np.ndarray:
    """Where the cells of a row or column of regions begin and end, in pixels, (count + 1,).

    Cells lie up and left by the displacement, the last one as far as the photograph's edge.

    Args:
        count: regions in the row or column.
        side: the photograph's width or height in pixels.
        displacement: along it; see `upsample`.
    """
    edges = (np.arange(count + 1) / count - displacement).clip(0, 1) * side
    edges[-1] = side
    return edges


def cover(image: Image.Image, usable: np.ndarray, displacement: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
    """The image with the regions that attention could not use under grey.

    Args:
        image: the photograph, RGB.
        usable: Boolean (rows, columns), False for the regions to cover.
        displacement: see `upsample`.
    """
    covered = image.copy()
    down = cell_edges(usable.shape[0], image.height, displacement[0]).round().astype(int).tolist()
    right = cell_edges(usable.shape[1], image.width, displacement[1]).round().astype(int).tolist()
    for row, column in np.argwhere(~usable):
        covered.paste(COVER, (right[column], down[row], right[column + 1], down[row + 1]))
    return covered


def scale_tops(attention: np.ndarray, scale: str) -> np.ndarray:
    """The weight at the top of each word's scale, shown in the brightest colour, float32 (T,).

    Args:
        attention: (T, rows, columns).
        scale: "caption" for the largest weight of all words; "word" for the largest weight of each word.

    Raises:
        ValueError: there is no such scale.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; choose one of {', '.join(SCALES)}")
    peaks = np.asarray(attention, dtype=np.float32).max(axis=(1, 2), initial=0)
    return np.full_like(peaks, peaks.max(initial=0)) if scale == "caption" else peaks


def check_kind(of: str) -> None:
    """Raise ValueError unless there are maps of that kind."""
    if of not in KINDS:
        raise ValueError(f"no maps of {of!r}; choose {' or '.join(KINDS)}")


def amount(value: float, regions: int, of: str = "attention") -> str:
    """A value of a map for people: a weight as a multiple of that of an even map, "7.1x", or evidence in nats, "2.31".

    Args:
        value: of one region.
        regions: L; the weights of an even map are 1 / L.
        of: "attention" or "evidence".
    """
    return f"{value * regions:.1f}x" if of == "attention" else f"{value:.2f}"


def colour_table(name: str) -> np.ndarray:
    """A colour map as (256, 3) numbers from 0 to 255.

    Raises:
        ValueError: there is no such colour map.
    """
    if name not in ANCHORS:
        raise ValueError(f"no colour map {name!r}; choose one of {', '.join(ANCHORS)}")
    anchors = np.array([list(bytes.fromhex(colour)) for colour in ANCHORS[name].split()], dtype=np.float32)
    places = np.linspace(0, 255, len(anchors)).round()
    return np.stack([np.interp(np.arange(256), places, channel) for channel in anchors.T], axis=1).astype(np.float32)


def figure(
    image: Image.Image,
    words: Sequence[str],
    attention: np.ndarray,
    *,
    scale: str = "caption",
    of: str = "attention",
    tile: int = 224,
    columns: int | None = None,
    strength: float = 0.65,
    colours: str = "inferno",
    displacement: tuple[float, float] = (0.0, 0.0),
) -> Image.Image:
    """The photograph, then the heatmap of every word, in a grid (Xu et al. 2015, figure 2), and a legend.

    Each word has the largest value of its map beside it; see `amount`.

    Args:
        image: the photograph.
        words: the T words.
        attention: (T, rows, columns).
        scale: "caption" or "word"; see `scale_tops`.
        of: "attention" or "evidence", what the maps hold and the legend explains.
        tile: width of one picture in pixels; a photograph more than twice as high as wide is centred in it.
        columns: pictures in a row; by default the figure is about twice as wide as high, with rows filled evenly.
        strength, colours, displacement: see `overlay`.

    Raises:
        ValueError: words and maps differ in number, or there is no such scale or kind of map.
    """
    check_maps(words, attention)
    check_kind(of)
    photo = shrink(image, tile)
    label = max(14, tile // 9)
    count = len(words) + 1
    if columns is None:
        columns = min(count, max(3, math.ceil(math.sqrt(2 * count * (photo.height + label) / tile))))
        columns = math.ceil(count / math.ceil(count / columns))  # no more than fill the same rows evenly
    gap = max(2, tile // 40)
    step_x, step_y = tile + gap, photo.height + label + gap
    width, height = columns * step_x - gap, math.ceil(count / columns) * step_y
    font = ImageFont.load_default(size=label * 0.72)
    tops, regions = scale_tops(attention, scale), math.prod(attention.shape[1:])
    shared = (tops.max(initial=0) or None) if scale == "caption" else None
    key = legend(min(width, 2 * tile), label, regions, shared, strength, colours, of)
    canvas = Image.new("RGB", (width, height + key.height), "white")
    canvas.paste(key, (0, height))
    draw = ImageDraw.Draw(canvas)
    margin = (tile - photo.width) // 2
    canvas.paste(photo, (margin, label))
    for number, (word, weights, top) in enumerate(zip(words, attention, tops, strict=True), 1):
        x, y = number % columns * step_x, number // columns * step_y
        canvas.paste(overlay(photo, weights, strength, colours, displacement, top), (x + margin, y + label))
        peak = amount(weights.max(), regions, of)
        left = x + (tile - font.getlength(f"{word} {peak}")) / 2
        draw.text((left, y + label / 2), word, "black", font, anchor="lm")
        draw.text((left + font.getlength(f"{word} "), y + label / 2), peak, GREY, font, anchor="lm")
    return canvas


def legend(
    width: int,
    line: int,
    regions: int,
    top: float | None,
    strength: float = 0.65,
    colours: str = "inferno",
    of: str = "attention",
) -> Image.Image:
    """A bar with the colours of a scale over middle grey, labelled with what they mean; see `amount`.

    Args:
        width: of the picture, in pixels.
        line: height of a line of text and of the bar, in pixels.
        regions: L, the number of regions; the weight 1 / L of an even map is marked on the bar of attention.
        top: the weight at the end of the bar; None where each word has its own scale.
        strength, colours: see `overlay`.
        of: "attention" or "evidence".
    """
    font = ImageFont.load_default(size=line * 0.6)
    start, end = "0 ", " the word's largest" if top is None else f" {amount(top, regions, of)}"
    left = math.ceil(font.getlength(start))
    # The same room for every number, so that the bar has the same length in all frames of an animation.
    right = max(left + 1, width - math.ceil(max(font.getlength(end), font.getlength(" 000.0x"))))
    even = top if of == "attention" else None  # evidence has no even map to mark
    if of == "attention":
        meaning = f"1x{'' if even is None else ' (marked)'}: the weight of an even map, 1/{regions}"
    else:
        meaning = "fall of the word's log-probability, in nats, when this part is hidden"
    text = meaning.split(" ")
    lines = wrap(text, font, width)
    canvas = Image.new("RGB", (width, line * (1 + len(lines))), "white")
    grey = Image.new("RGB", (right - left, round(line * 0.6)), "#808080")
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    canvas.paste(overlay(grey, ramp, strength, colours), (left, round(line * 0.2)))
    draw = ImageDraw.Draw(canvas)
    draw.text((0, line / 2), start, "black", font, anchor="lm")
    draw.text((right, line / 2), end, "black", font, anchor="lm")
    if even is not None:
        x = left + (right - left - 1) / max(even * regions, 1)
        thick = max(1, line // 12)
        draw.line([(x, 0), (x, line)], "white", 3 * thick)
        draw.line([(x, 0), (x, line)], "black", thick)
    for number, places in enumerate(lines, 1):
        sentence = " ".join(text[place] for place in places)
        draw.text((0, line * (number + 0.5)), sentence, GREY, font, anchor="lm")
    return canvas


def animation(
    image: Image.Image,
    words: Sequence[str],
    attention: np.ndarray,
    *,
    scale: str = "caption",
    of: str = "attention",
    width: int = 480,
    strength: float = 0.65,
    colours: str = "inferno",
    displacement: tuple[float, float] = (0.0, 0.0),
) -> list[Image.Image]:
    """One frame per word: the photograph with the word's heatmap, the sentence with the word in black, and a legend.

    Args:
        image, words, attention, scale, of, strength, colours, displacement: as in `figure`.
        width: of the frames, in pixels; a photograph more than twice as high as wide is centred in them.

    Raises:
        ValueError: words and maps differ in number, or there is no such scale or kind of map.
    """
    check_maps(words, attention)
    check_kind(of)
    photo = shrink(image, width)
    font = ImageFont.load_default(size=width / 22)
    lines = wrap(words, font, width - 16)
    height = math.ceil(width / 16)
    frames = []
    for current, top in enumerate(scale_tops(attention, scale)):
        key = legend(width - 16, math.ceil(width / 20), attention[current].size, top, strength, colours, of)
        foot = photo.height + height * len(lines) + 12
        frame = Image.new("RGB", (width, foot + key.height + 4), "white")
        lit = overlay(photo, attention[current], strength, colours, displacement, top)
        frame.paste(lit, ((width - photo.width) // 2, 0))
        frame.paste(key, (8, foot))
        draw = ImageDraw.Draw(frame)
        for number, line in enumerate(lines):
            x = 8.0
            for index in line:
                colour = "black" if index == current else GREY
                draw.text((x, photo.height + 6 + number * height), words[index], colour, font)
                x += font.getlength(words[index] + " ")
        frames.append(frame)
    return frames


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike[str], seconds_per_word: float = 0.7) -> None:
    """Write frames as an endless animation, in the format of the file's suffix.

    Args:
        frames: at least one.
        path: a .gif, .webp or .png file.

    Raises:
        ValueError: there is no frame, or the suffix is another.
    """
    if not frames:
        raise ValueError("an animation needs at least one frame; the caption has no word")
    if Path(path).suffix.lower() not in (".gif", ".webp", ".png"):
        raise ValueError(f"cannot write an animation to {os.fspath(path)!r}; use .gif, .webp or .png")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 * seconds_per_word), loop=0)


def wrap(words: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[list[int]]:
    """The positions of the words in each line of at most `width` pixels; a wider word has a line to itself."""
    lines: list[list[int]] = [[]]
    used = 0.0
    for index, word in enumerate(words):
        length = font.getlength(word + " ")
        if lines[-1] and used + length > width:
            lines.append([])
            used = 0.0
        lines[-1].append(index)
        used += length
    return lines


def shrink(image: Image.Image, width: int, enlarge: bool = True) -> Image.Image:
    """The image in RGB, scaled to fit into `width` pixels and twice as much height, with its proportions kept.

    Each side is at least one pixel, so that the proportions of a very thin image may change.

    Args:
        image: any image.
        width: in pixels.
        enlarge: whether smaller images are enlarged.
    """
    scale = min(width / image.width, 2 * width / image.height)
    if not enlarge:
        scale = min(scale, 1)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def check_maps(words: Sequence[str], attention: np.ndarray) -> None:
    """Raise ValueError unless there is one map for each word."""
    if np.ndim(attention) != 3 or len(attention) != len(words):
        raise ValueError(
            f"{len(words)} words need attention of shape ({len(words)}, rows, columns), not {np.shape(attention)}"
        )
