"""Speed, as ratios within one run: `python -m training.benchmark`.

Captioning time is divided by the time of one encoder pass, the minimum for any captioner with that encoder. Training
and search are compared with the usual tutorial implementation of the same model: every caption has its own copy of the
image, the keys are computed again at every step, and beams are expanded for one image at a time. It is implemented
here, uses the same weights, and must give the same results before it is timed.

The rate of a stream of photographs in files is divided by that of a stream of small pictures in memory: the ratio is 1
if reading files takes no additional time.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captioner.api import Captioner
from captioner.checkpoint import CheckpointError
from captioner.images import load_image
from captioner.network.decoder import AttentionLSTM, State
from captioner.network.model import ShowAttendTell
from captioner.pretrained import DEFAULT_MODEL
from captioner.search import allowed, beam_search
from captioner.vocabulary import END, PAD, START
from captioner.web import FILES

from . import command
from .losses import caption_loss

SAMPLES = FILES / "samples"


def tutorial_step(decoder: AttentionLSTM, annotations: Tensor, state: State, words: Tensor) -> tuple[Tensor, State]:
    """One step for a batch of captions, each with its own annotation vectors; nothing is cached.

    annotations (captions, regions, channels), state (captions, hidden), words (captions,).
    """
    embedded = decoder.dropout(decoder.embedding(words))
    scores = decoder.attention.scores(state.hidden[:, None], decoder.attention.keys(annotations)).squeeze(1)
    alpha = scores.softmax(dim=1)
    context = torch.sigmoid(decoder.beta(state.hidden)) * (annotations * alpha.unsqueeze(2)).sum(dim=1)
    gates = decoder.word_to_gates(embedded) + decoder.state_to_gates(torch.cat([context, state.hidden], dim=1))
    write, forget, read, candidate = gates.chunk(4, dim=1)
    cell = torch.sigmoid(forget) * state.cell + torch.sigmoid(write) * torch.tanh(candidate)
    state = State(torch.sigmoid(read) * torch.tanh(cell), cell)
    return decoder.predict(embedded, state.hidden, context), state


def tutorial_loss(model: ShowAttendTell, images: Tensor, captions: Tensor) -> Tensor:
    """Cross-entropy of `captions` (captions, length), each with its own image; sorted by length."""
    decoder = cast(AttentionLSTM, model.decoder)
    annotations = model.annotate(images)
    lengths = (captions != PAD).sum(dim=1) - 1
    order = lengths.argsort(descending=True)
    annotations, captions, lengths = annotations[order], captions[order], lengths[order]
    mean = annotations.mean(dim=1)
    state = State(torch.tanh(decoder.initial_hidden(mean)), torch.tanh(decoder.initial_cell(mean)))
    loss = annotations.new_zeros(())
    for t in range(int(lengths.max())):
        rows = int((lengths > t).sum())
        state = State(state.hidden[:rows], state.cell[:rows])
        logits, state = tutorial_step(decoder, annotations[:rows], state, captions[:rows, t])
        loss = loss + nn.functional.cross_entropy(logits, captions[:rows, t + 1], reduction="sum")
    return loss / int(lengths.sum())


def tutorial_beam(model: ShowAttendTell, image: Tensor, beam_size: int, max_length: int) -> list[int]:
    """The words of the best caption of one image (1, 3, height, width).

    As in `beam_search`, finished and unfinished captions are ranked together, by mean log-probability.
    """
    decoder = cast(AttentionLSTM, model.decoder)
    annotations = model.annotate(image)
    mean = annotations.mean(dim=1)
    state = State(torch.tanh(decoder.initial_hidden(mean)), torch.tanh(decoder.initial_cell(mean)))
    beams: list[tuple[float, list[int], Tensor, Tensor]] = [(0.0, [START], state.hidden[0], state.cell[0])]
    for _ in range(max_length):
        growing = [beam for beam in beams if beam[1][-1] != END]
        if not growing:
            break
        candidates = [beam for beam in beams if beam[1][-1] == END]
        state = State(torch.stack([beam[2] for beam in growing]), torch.stack([beam[3] for beam in growing]))
        words = torch.tensor([beam[1][-1] for beam in growing], device=image.device)
        logits, state = tutorial_step(decoder, annotations.expand(len(growing), -1, -1), state, words)
        logits = allowed(logits[None], torch.empty(1, len(growing), len(growing[0][1]) - 1, dtype=torch.long), 0)[0]
        best = logits.log_softmax(dim=1).topk(beam_size, dim=1)
        for row, beam in enumerate(growing):
            for value, word in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True):
                candidates.append((beam[0] + value, [*beam[1], word], state.hidden[row], state.cell[row]))
        beams = sorted(candidates, key=lambda beam: -beam[0] / (len(beam[1]) - 1))[:beam_size]
    return beams[0][1][1:]


def seconds(action: Callable[[], object], repeats: int) -> float:
    """The median time of `repeats` calls in seconds, after one call to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def benchmark(captioner: Captioner, images: int = 32, rows: int = 5, repeats: int = 5) -> dict[str, float]:
    """Measure a model on random images, and captions of random words with realistic lengths.

    Args:
        captioner: the model; its weights are not changed.
        images: images in a batch.
        rows: captions an image.
        repeats: number of runs of each measurement, of which the median is taken.

    Returns:
        Measurements by name; the names of ratios are "numerator / denominator".

    Raises:
        RuntimeError: the tutorial implementation gives other results.
        ValueError: there is no tutorial implementation of this kind of model.
    """
    model = captioner.model
    attention = model.decoder.attention
    if not isinstance(model.decoder, AttentionLSTM) or attention.heads > 1 or attention.draws_regions:
        raise ValueError(
            f"the tutorial implementation is an LSTM with soft attention in one head; this model is "
            f"{model.config.decoder} with {model.config.attention} attention"
        )
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *captioner.preprocessing.size, generator=generator).to(model.device)
    one = pixels[:1]
    lengths = torch.randint(7, 17, (images, rows), generator=generator).sort(dim=1, descending=True)[0]
    captions = torch.full((images, rows, 19), PAD)
    words = torch.randint(4, len(captioner.vocabulary), captions.shape, generator=generator)
    places = torch.arange(captions.shape[2])
    captions = torch.where(places < lengths[..., None] + 1, words, captions)
    captions[..., 0] = START
    captions.scatter_(2, lengths[..., None] + 1, END)
    captions = captions.to(model.device)

    with torch.inference_mode():
        model.decoder.remember_words()
        ours = beam_search(model.decoder, model.annotate(pixels), beam_size=5, max_length=20).words[:, 0]
        theirs = [tutorial_beam(model, pixels[i : i + 1], 5, 20) for i in range(images)]
        if [[w for w in row if w != PAD] for row in ours.tolist()] != theirs:
            raise RuntimeError("the tutorial search gives other captions")
        encoder_one = seconds(lambda: model.encoder(one), repeats)
        encoder_batch = seconds(lambda: model.encoder(pixels), repeats)
        caption_one = seconds(lambda: beam_search(model.decoder, model.annotate(one), beam_size=5), repeats)
        caption_batch = seconds(lambda: beam_search(model.decoder, model.annotate(pixels), beam_size=5), repeats)
        tutorial_batch = seconds(lambda: [tutorial_beam(model, pixels[i : i + 1], 5, 20) for i in range(images)], 1)
        features = model.encoder(pixels)

    model.encoder.train_from(None)
    features = features.clone()
    each_with_its_image = pixels.repeat_interleave(rows, dim=0)
    each_with_its_features = features.repeat_interleave(rows, dim=0)
    flat = captions.flatten(0, 1)

    def our_loss(inputs: Tensor) -> Tensor:
        output = model(inputs, captions)
        return caption_loss(output, len(output.targets), images * rows, 0.0, 0.0)

    with torch.no_grad():
        if abs(float(our_loss(features)) - float(tutorial_loss(model, each_with_its_features, flat))) > 1e-3:
            raise RuntimeError("the tutorial training gives another loss")
    model.train()
    train = seconds(lambda: our_loss(features).backward(), repeats)
    tutorial_decoder = seconds(lambda: tutorial_loss(model, each_with_its_features, flat).backward(), repeats)
    tutorial_whole = seconds(lambda: tutorial_loss(model, each_with_its_image, flat).backward(), 1)
    tuning = {}
    if block := captioner.about.get("training", {}).get("finetune_from"):
        model.encoder.split(block)
        with torch.no_grad():
            maps = model.encoder.lower(pixels)
        model.encoder.train_from(block)
        on_images = seconds(lambda: our_loss(pixels).backward(), repeats)
        on_maps = seconds(lambda: our_loss(maps).backward(), repeats)
        tuning[f"step that tunes the encoder from {block}, on images / on cached maps"] = on_images / on_maps
        model.encoder.train_from(None)
    model.zero_grad()
    model.eval()
    return {
        "captioning one image, beam 5 / encoder's forward pass": caption_one / encoder_one,
        f"captioning {images} images, beam 5 / encoder's forward pass": caption_batch / encoder_batch,
        f"tutorial search, beam 5 / ours, {images} images, encoder included": tutorial_batch / caption_batch,
        "tutorial training step / ours, encoder frozen": tutorial_whole / train,
        "tutorial training step / ours, decoder alone": tutorial_decoder / train,
        **tuning,
        "milliseconds: encoder, one image": 1000 * encoder_one,
        "milliseconds: caption, one image": 1000 * caption_one,
        "images a second: captioning a batch": images / caption_batch,
        "images a second: training step, cached features": images / train,
    }


def library_benchmark(
    captioner: Captioner, in_torch: Captioner, photographs: Sequence[Path], repeats: int = 5
) -> dict[str, float]:
    """Measure captions of photographs in files by the engine that users get, and by torch in the same run.

    Args:
        captioner: the model with its default engine.
        in_torch: the same model with torch.
        photographs: the files; the first one is also captioned alone.
        repeats: number of runs of each measurement, of which the median is taken.

    Returns:
        Measurements by name; an encoder pass is that of the default engine, without reading and resizing.
    """
    paths = list(map(str, photographs))
    pixels = captioner.preprocessing([load_image(path) for path in paths])
    engine = captioner.engine
    encoder_one = seconds(lambda: engine.annotate(pixels[:1]), repeats)
    encoder_all = seconds(lambda: engine.annotate(pixels), repeats)
    one = seconds(lambda: captioner.caption(paths[0]), repeats)
    one_torch = seconds(lambda: in_torch.caption(paths[0]), repeats)
    every = seconds(lambda: captioner.caption(paths), repeats)
    every_torch = seconds(lambda: in_torch.caption(paths), repeats)
    return {
        "one photograph from its file to a caption / encoder pass": one / encoder_one,
        f"{len(paths)} photographs from files to captions / encoder pass": every / encoder_all,
        "one photograph: torch / default engine": one_torch / one,
        f"{len(paths)} photographs: torch / default engine": every_torch / every,
        "milliseconds: one photograph from its file to a caption": 1000 * one,
        "photographs a second: from files to captions": len(paths) / every,
    }


def stream_benchmark(
    captioner: Captioner, photographs: int = 16, size: tuple[int, int] = (4000, 3000), repeats: int = 3
) -> dict[str, float]:
    """Measure `Captioner.stream` on large photographs.

    Args:
        captioner: the model.
        photographs: number of JPEG files to write and caption.
        size: width and height of each.
        repeats: number of runs of each measurement, of which the median is taken.

    Returns:
        Measurements by name. The memory is the highest growth of the process during one stream, after another one
        to warm up; it is measured on Linux only.
    """
    noise = np.random.default_rng(0)
    rows, columns = captioner.preprocessing.size
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.jpg") for number in range(photographs)]
        pictures = []
        for path in paths:
            # Noise at the scale of a hundredth of the picture takes about as long to decode as a photograph.
            coarse = Image.fromarray(noise.integers(0, 256, (75, 100, 3), dtype=np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
            pictures.append(coarse.resize((columns, rows)))
        in_memory = seconds(lambda: list(captioner.stream(pictures, batch_size=8)), repeats)
        on_disk = seconds(lambda: list(captioner.stream(paths, batch_size=8)), repeats)
        peak = peak_memory(lambda: list(captioner.stream(paths, batch_size=8)))
    figures = {
        "rate of a stream of files / of pictures in memory": in_memory / on_disk,
        "photographs a second: a stream of files": photographs / on_disk,
    }
    if peak is not None:
        figures[f"MB: a stream of {photographs} photographs of {size[0] * size[1] / 1e6:g} megapixels"] = peak
    return figures


def peak_memory(action: Callable[[], object]) -> float | None:
    """The highest growth of the process during a call, in MB; None where the system does not report it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def most() -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024

    reset.write_text("5")  # resets the peak to the present size
    before = most()
    action()
    return most() - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog=command("benchmark"), description="Measure the speed of a model.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or name of the model")
    parser.add_argument("--device", default="cpu", help="where to measure")
    parser.add_argument("--images", type=int, default=32, help="images in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs, of which the median is taken")
    parser.add_argument("--photographs", type=int, default=16, help="files of 12 megapixels in a stream; 0 for none")
    parser.add_argument("--output", metavar="FILE.json", help="also write the figures there")
    options = parser.parse_args(arguments)
    try:
        captioner = Captioner.from_pretrained(options.model, options.device)
        in_torch = Captioner.from_pretrained(options.model, options.device, engine="torch")
        samples = itertools.islice(itertools.cycle(sorted(SAMPLES.glob("*.jpg"))), options.images)
        figures = library_benchmark(captioner, in_torch, list(samples), options.repeats)
        figures |= benchmark(in_torch, options.images, repeats=options.repeats)
        if options.photographs:
            figures |= stream_benchmark(captioner, options.photographs, repeats=options.repeats)
    except (CheckpointError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, figure in figures.items():
        print(f"{figure:8.2f}  {name}")
    if options.output:
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
