"""The speed of captions of photographs, through the interface that users call."""

import copy
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioner.api import Captioner
from captioner.arrays import top
from captioner.engine import OnnxEngine, open_session
from captioner.images import MAX_PIXELS, load_image, load_reduced
from captioner.modelfile import opened
from captioner.reading import PREVIEW, make_preview
from captioner.search import BEAM_SIZE, BLOCK_NGRAMS, LENGTH_PENALTY, MAX_LENGTH, Hypotheses, beam_search
from captioner.web import FILES

from .measure import Figure, Rates, Skipped, bytes_of, operations, peak_memory, seconds_of_each

SAMPLES = FILES / "samples"
# One photograph over one pass of the encoder, and a batch of them, for the models of the package.
TARGETS = {"small": (1.8, 1.25), "base": (1.3, 1.25)}


class Subject:
    """The model that is measured, loaded when it is first needed.

    Args:
        model: a folder or name.
        device: where to measure.
        images: photographs in a batch.
        repeats: number of runs of each measurement, of which the median is taken.
        recipe: TOML file of the training run that is measured; None for the one that is named as the model.
        photographs: files of 12 megapixels in a stream; 0 for none.
    """

    def __init__(
        self, model: str, device: str, images: int, repeats: int, recipe: Path | None = None, photographs: int = 0
    ) -> None:
        self.model, self.device, self.images, self.repeats = model, torch.device(device), images, repeats
        self.recipe, self.photographs = recipe, photographs
        self.rates = Rates(self.device, repeats)
        samples = sorted(SAMPLES.glob("*.jpg"))
        self.paths = [str(path) for path in itertools.islice(itertools.cycle(samples), images)]

    @cached_property
    def captioner(self) -> Captioner:
        """The model with the engine that users get."""
        return Captioner.from_pretrained(self.model, str(self.device))

    @cached_property
    def in_torch(self) -> Captioner:
        """The model with torch, not to be trained."""
        return self.fresh()

    def fresh(self) -> Captioner:
        """Another copy of the model with torch."""
        return Captioner.from_pretrained(self.model, str(self.device), engine="torch")

    @property
    def on_onnx(self) -> OnnxEngine:
        """The engine of users, where it is ONNX Runtime. Raises Skipped otherwise."""
        if self.device.type != "cpu":
            raise Skipped("ONNX Runtime computes on the CPU only")
        if not isinstance(self.captioner.engine, OnnxEngine):
            raise Skipped("the model has no graphs for ONNX Runtime; captioner-export writes them")
        return self.captioner.engine

    def pixels(self, paths: Sequence[str]) -> np.ndarray:
        """The encoder's input for photographs in files."""
        return self.captioner.preprocessing([load_image(path) for path in paths])

    def least_seconds(self, paths: Sequence[str]) -> float:
        """The physical limit of captions of photographs; see `Rates.least_seconds`."""
        rates, engine = self.rates, self.in_torch.engine
        network: Any = self.in_torch.model
        pixels, found = self.pixels(paths), []
        encoder = operations(lambda: found.append(engine.annotate(pixels)))
        decoder = operations(lambda: search(engine, found[0]))
        encoder_bytes, decoder_bytes = bytes_of(network) - bytes_of(network.decoder), bytes_of(network.decoder)
        if not isinstance(self.captioner.engine, OnnxEngine):
            encoder_rate = decoder_rate = rates.in_torch(torch.float32)
        elif self.captioner.graphs is None or self.captioner.graphs.quantized_step is None:
            encoder_rate = decoder_rate = rates.in_onnx(int8=False)
        else:
            encoder_rate, decoder_rate = rates.in_onnx(int8=False), rates.in_onnx(int8=True)
            decoder_bytes //= 4
        in_encoder = rates.least_seconds(encoder, encoder_bytes, encoder_rate)
        return in_encoder + rates.least_seconds(decoder, decoder_bytes, decoder_rate)


def search(engine: Any, annotations: Any) -> Hypotheses:
    """The search that `Captioner.caption` makes by default."""
    options: dict[str, Any] = {"max_length": MAX_LENGTH, "length_penalty": LENGTH_PENALTY, "block_ngrams": BLOCK_NGRAMS}
    return beam_search(engine, annotations, beam_size=BEAM_SIZE, **options)


def measure_captions(subject: Subject) -> list[Figure]:
    """Captions of photographs in files by the engine that users get, and by torch in the same run.

    An encoder pass is that of the default engine, without reading and resizing.
    """
    one, many = TARGETS.get(subject.model, (None, None))
    return [
        *captions_of(subject, "one photograph", subject.paths[:1], one),
        *captions_of(subject, f"{subject.images} photographs", subject.paths, many),
    ]


def captions_of(subject: Subject, name: str, paths: list[str], target: float | None) -> list[Figure]:
    """The figures of these photographs; see `measure_captions`."""
    captioner, in_torch = subject.captioner, subject.in_torch
    pixels, limit = subject.pixels(paths), subject.least_seconds(paths)
    actions = {
        "encoder": lambda: captioner.engine.annotate(pixels),
        "captions": lambda: captioner.caption(paths),
        "torch": lambda: in_torch.caption(paths),
    }
    times = seconds_of_each(actions, subject.repeats, subject.device)
    captions, encoder = times["captions"], times["encoder"]
    return [
        Figure(f"{name} from files to captions / encoder pass", captions / encoder, target, limit / encoder),
        Figure(f"{name}: torch / default engine", times["torch"] / captions),
        Figure(f"{name}: photographs a second", len(paths) / captions, None, len(paths) / limit),
    ]


class Stopwatch:
    """An engine that measures the time of each of its methods.

    Args:
        engine: the engine.

    Attributes:
        times: seconds of every call, by the name of the method.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.times: dict[str, list[float]] = defaultdict(list)

    def sums(self, searches: int) -> dict[str, np.ndarray]:
        """Seconds that each method took in each of so many equal searches, by its name."""
        return {name: np.reshape(calls, (searches, -1)).sum(axis=1) for name, calls in self.times.items()}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.engine, name)
        if not callable(found):
            return found

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = found(*arguments)
            self.times[name].append(time.perf_counter() - started)
            return result

        return timed


def measure_parts(subject: Subject) -> list[Figure]:
    """Where the time of one caption goes, in milliseconds and as a share of the whole.

    A step of the decoder is one session of ONNX Runtime. Its time is divided as ONNX Runtime's profile of its nodes is.
    """
    engine, captioner, path = subject.on_onnx, subject.captioner, subject.paths[0]
    preprocessing, repeats = captioner.preprocessing, subject.repeats
    least = (PREVIEW * 3 // 4, max(preprocessing.size))
    image = load_reduced(path, MAX_PIXELS, least)[0]
    pixels = preprocessing([image])
    annotations = engine.annotate(pixels)
    stopwatch, steps = Stopwatch(engine), search(engine, annotations).words.shape[2]
    scores = np.random.default_rng(0).random((1, BEAM_SIZE * len(captioner.vocabulary)), dtype=np.float32)
    actions = {
        "whole": lambda: captioner.caption(path),
        "reading": lambda: make_preview(load_reduced(path, MAX_PIXELS, least)[0]),
        "resizing and normalising": lambda: preprocessing([image]),
        "encoder": lambda: engine.annotate(pixels),
        "search": lambda: search(stopwatch, annotations),
        "top-k": lambda: [top(scores, BEAM_SIZE) for _ in range(steps)],
    }
    times = seconds_of_each(actions, repeats)
    within = {name: statistics.median(each[1:]) for name, each in stopwatch.sums(repeats + 1).items()}
    parts = {name: times[name] for name in ("reading", "resizing and normalising", "encoder")}
    parts["first state and keys"] = within["encode"] + within["initial_state"]
    for name, share in shares_of_step(subject, annotations).items():
        parts[name] = share * within["step"]
    parts["top-k"] = times["top-k"]
    parts["bookkeeping of the search"] = times["search"] - sum(within.values()) - times["top-k"]
    whole = times["whole"]
    parts["threads and the Caption"] = whole - sum(parts.values())
    limit = 1000 * subject.least_seconds([path])
    return [
        Figure(f"milliseconds of one caption of {steps} steps", 1000 * whole, None, limit, 1.0),
        *(Figure(f"milliseconds: {name}", 1000 * part, share=part / whole) for name, part in parts.items()),
    ]


def shares_of_step(subject: Subject, annotations: np.ndarray) -> dict[str, float]:
    """The shares of attention, the LSTM and the output layer in a step of the decoder by ONNX Runtime.

    Raises:
        Skipped: the decoder is no LSTM.
    """
    import onnx
    import onnxruntime

    if subject.captioner.config.decoder != "lstm":
        raise Skipped("only the step of an LSTM is divided into parts")
    graphs, file = subject.captioner.graphs, subject.captioner.file
    assert graphs is not None
    assert file is not None
    engine = copy.copy(subject.on_onnx)
    with tempfile.TemporaryDirectory() as folder, opened(file) as weights:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/step"
        options.optimized_model_filepath = f"{folder}/step.onnx"  # its nodes are those of the profile
        options.log_severity_level = 3  # it warns that this file is for the same machine only
        graph = graphs.quantized_step or graphs.step
        engine.stepping = open_session(graph, weights.get_tensor, options)
        for _ in range(subject.repeats):
            search(engine, annotations)
        events = json.loads(Path(engine.stepping.end_profiling()).read_text())
        nodes = onnx.load(f"{folder}/step.onnx", load_external_data=False).graph.node
    part_of = parts_of_step(nodes)
    times: Counter[str] = Counter()
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name in part_of:
            times[part_of[name]] += event["dur"]
    return {name: times[name] / times.total() for name in ("attention", "LSTM", "output layer")}


def parts_of_step(nodes: Sequence[Any]) -> dict[str, str]:
    """The part of the decoder that each node of a step's graph belongs to, by the node's name.

    Attention is what alpha, beta and the weighted sum of the annotation vectors need; the LSTM what its next state
    needs besides; all else is the output layer.
    """
    maker = {name: node for node in nodes for name in node.output}
    part_of: dict[str, str] = {}

    def claim(name: str, part: str) -> None:
        """Assign the node that gives this array, and those that it needs, unless they are assigned."""
        node = maker.get(name)
        if node is not None and node.name not in part_of:
            part_of[node.name] = part
            for needed in node.input:
                claim(needed, part)

    weighted = [name for node in nodes if "annotations" in node.input for name in node.output]
    for part, arrays in (
        ("attention", ["alpha", "beta", *weighted]),
        ("LSTM", ["next_hidden", "next_cell"]),
        ("output layer", ["logits"]),
    ):
        for name in arrays:
            claim(name, part)
    return part_of


def measure_stream(subject: Subject, size: tuple[int, int] = (4000, 3000)) -> list[Figure]:
    """`Captioner.stream` on large photographs: its rate over that of small pictures in memory, and its own memory.

    The memory is the highest growth of the process during one stream, after another one to warm up; it is measured on
    Linux only.
    """
    captioner, photographs = subject.captioner, subject.photographs
    if not photographs:
        raise Skipped("--photographs is 0")
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
        actions = {
            "pictures": lambda: list(captioner.stream(pictures, batch_size=8)),
            "files": lambda: list(captioner.stream(paths, batch_size=8)),
        }
        times = seconds_of_each(actions, subject.repeats)
        peak = peak_memory(lambda: list(captioner.stream(paths, batch_size=8)))
    figures = [
        Figure("rate of a stream of files / of pictures in memory", times["pictures"] / times["files"]),
        Figure("photographs a second: a stream of files", photographs / times["files"]),
    ]
    if peak is not None:
        megapixels = size[0] * size[1] / 1e6
        figures.append(Figure(f"MB: a stream of {photographs} photographs of {megapixels:g} megapixels", peak))
    return figures
