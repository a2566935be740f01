"""What captioning asks of a network, and the engine that computes it with ONNX Runtime, without torch."""

import base64
import collections
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from captioner.arrays import Array

MAX_GRAPH = 2**24  # bytes of a graph, which has no weights in it
BLOCK = 128  # weights of 8 bits that share a scale
OPTIONAL = ("beta", "scores", "word_alpha")  # what only some decoders give at a step; outputs of their graphs


class Step(NamedTuple):
    """What one step of a decoder gives.

    logits: (images, rows, vocabulary), scores of the next word before softmax.
    state: the state after it, a named tuple of arrays (images, rows, ...).
    alpha: (images, rows, heads, regions), where it looked; sums to 1 over the regions.
    beta: (images, rows), how far the context vector was let in, 0 to 1; None where there is no such gate.
    drawn: (images, rows, layers), the region that each layer's attention drew, where it draws any.
    scores: (images, rows, regions), how well each region answered, before softmax; None where regions are not scored,
        or by several heads.
    word_alpha: (images, rows, layers, heads, words), the weights of the decoder's self-attention over the words that it
        has read, `START` first and this step's last; each head's sum to 1. None for a decoder without self-attention,
        and where the model's graphs do not give it, since they were made before there was this output.
    """

    logits: Array
    state: Any
    alpha: Array
    beta: Array | None = None
    drawn: Array | None = None
    scores: Array | None = None
    word_alpha: Array | None = None


class Engine(Protocol):
    """What captioning asks of a network. The arrays that it gives, and takes again, are NumPy's or torch's."""

    @property
    def heads(self) -> int:
        """Attention maps of each word."""

    @property
    def displacement(self) -> float:
        """See `captioner.network.encoder.Encoder`."""

    @property
    def device(self) -> str:
        """Where it computes."""

    def annotate(self, images: np.ndarray) -> Array:
        """The annotation vectors of images, (images, regions, channels).

        Args:
            images: what `captioner.images.Preprocessing` gives, float32 (images, 3, height, width).
        """

    def array(self, values: np.ndarray) -> Array:
        """A NumPy array as one of the engine's."""

    def encode(self, annotations: Array, mask: Array | None = None) -> Any:
        """Everything that does not depend on words, computed once per image: what `step` reads.

        Args:
            annotations: what `annotate` gave.
            mask: (images, regions), True where a region is real; None where all are.
        """

    def initial_state(self, memory: Any, rows: int) -> Any:
        """The state before the first word, for so many captions of each image."""

    def step(self, memory: Any, state: Any, tokens: Array) -> Step:
        """Read one word of each caption, (images, rows) ids, and score the next one."""


class Graph(NamedTuple):
    """One part of a network as an ONNX model whose weights are elsewhere.

    model: the bytes of the ONNX model.
    weights: the names of its weights, which are those in the model's file.
    quantized: the names of the others, which it takes in 8 bits: NAME:int8 and NAME:scales; see `quantize`.
    """

    model: bytes
    weights: tuple[str, ...]
    quantized: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self._asdict(), "model": base64.b64encode(zlib.compress(self.model, 9)).decode()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Graph":
        """What `to_dict` gave. Raises what Python raises where it is something else."""
        weights, quantized = (tuple(map(str, values.get(name, ()))) for name in ("weights", "quantized"))
        return cls(inflate(base64.b64decode(values["model"])), weights, quantized)


class Graphs(NamedTuple):
    """A network without its weights; made by `captioner.network.export.export_graphs` from its configuration.

    annotate: images -> annotations.
    encode: annotations, mask -> keys, state.
    step: annotations, mask, keys, state, tokens -> logits, alpha, next state; those of `OPTIONAL` that there are.
    quantized_step: the same with large weights in 8 bits; None where it has none.
    displacement: see `captioner.network.encoder.Encoder`.
    configuration: `digest_of` the configuration that they were made from.
    """

    annotate: Graph
    encode: Graph
    step: Graph
    quantized_step: Graph | None
    displacement: float
    configuration: str

    def to_text(self) -> str:
        """For the header of a model's file."""
        parts = {name: part.to_dict() if isinstance(part, Graph) else part for name, part in self._asdict().items()}
        return json.dumps(parts)

    @classmethod
    def from_text(cls, text: str) -> "Graphs":
        """What `to_text` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = json.loads(text)
            annotate, encode, step = (Graph.from_dict(values[name]) for name in ("annotate", "encode", "step"))
            # Files that were written before there were such graphs have none.
            quantized_step = Graph.from_dict(found) if (found := values.get("quantized_step")) else None
            displacement, configuration = float(values["displacement"]), str(values["configuration"])
            return cls(annotate, encode, step, quantized_step, displacement, configuration)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error) as error:
            raise ValueError(f"the graphs cannot be read: {type(error).__name__}: {error}") from error


def inflate(data: bytes) -> bytes:
    """Decompress a graph. Raises ValueError where it is larger than any."""
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, MAX_GRAPH)
    if not stream.eof:
        raise ValueError(f"a graph is truncated, or has more than {MAX_GRAPH >> 20} MiB")
    return inflated


def digest_of(config: Mapping[str, Any], size: tuple[int, int]) -> str:
    """SHA-256 of what decides a network's graphs: its configuration, and the rows and columns of its images."""
    return hashlib.sha256(json.dumps([config, size], sort_keys=True).encode()).hexdigest()


class OnnxEngine:
    """A network computed by ONNX Runtime on the CPU, in float32.

    It may be used by several threads at a time.

    Args:
        graphs: the network.
        weights: gives the weight of a name, in any floating-point type of NumPy.
        int8: whether the large matrices of a step have 8 bits, where there is a graph for that. A step reads all of
            them for a few captions, so that it takes as long as the memory takes to give them.

    Raises:
        ValueError: ONNX Runtime cannot read the graphs with these weights, or a weight is not finite.
    """

    device = "cpu"

    def __init__(self, graphs: Graphs, weights: Callable[[str], np.ndarray], int8: bool = False) -> None:
        step = (graphs.quantized_step if int8 else None) or graphs.step
        self.annotating, self.encoding, self.stepping = (
            open_session(graph, weights) for graph in (graphs.annotate, graphs.encode, step)
        )
        self.displacement = graphs.displacement
        self.outputs = [output.name for output in self.stepping.get_outputs()]
        shapes = {output.name: output.shape for output in self.stepping.get_outputs()}
        try:
            self.heads = int(shapes["alpha"][2])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError("the graphs are not those of a decoder that attends") from error
        prefix = "next_"
        fields = [name.removeprefix(prefix) for name in self.outputs if name.startswith(prefix)]
        self.State: Any = collections.namedtuple("State", fields)  # type: ignore[misc]  # known at run time only

    def annotate(self, images: np.ndarray) -> np.ndarray:
        """See `Engine.annotate`."""
        return self.annotating.run(None, {"images": images})[0]

    def array(self, values: np.ndarray) -> np.ndarray:
        """The same."""
        return values

    def encode(self, annotations: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """See `Engine.encode`: what the graph gives, and what it was given, by their names."""
        if mask is None:
            mask = np.ones(annotations.shape[:2], dtype=bool)
        given = {"annotations": annotations, "mask": mask}
        names = [output.name for output in self.encoding.get_outputs()]
        return {**given, **dict(zip(names, self.encoding.run(None, given), strict=True))}

    def initial_state(self, memory: dict[str, np.ndarray], rows: int) -> Any:
        """See `Engine.initial_state`."""
        return self.State(*(memory[f"next_{name}"].repeat(rows, axis=1) for name in self.State._fields))

    def step(self, memory: dict[str, np.ndarray], state: Any, tokens: np.ndarray) -> Step:
        """See `Engine.step`."""
        given = {name: array for name, array in memory.items() if not name.startswith("next_")}
        given |= {**state._asdict(), "tokens": tokens}
        found = dict(zip(self.outputs, self.stepping.run(None, given), strict=True))
        state = self.State(*(found[f"next_{name}"] for name in self.State._fields))
        optional = {name: found[name] for name in OPTIONAL if name in found}
        return Step(found["logits"], state, found["alpha"], **optional)


def open_session(graph: Graph, weights: Callable[[str], np.ndarray], options: Any = None) -> Any:
    """An ONNX Runtime session of a graph with its weights, in float32 or in 8 bits.

    Args:
        graph, weights: see `OnnxEngine`.
        options: `onnxruntime.SessionOptions` to add to, such as those that ask for a profile.
    """
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    # Threads wait by spinning within a run, and sleep after it: the sessions of an engine take turns, and threads of
    # one that go on spinning would take the cores of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without this a graph could ask for any file of the machine as its weights.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    try:
        values = {name: np.asarray(weights(name), dtype=np.float32, order="C") for name in graph.weights}
        for name in graph.quantized:
            values[f"{name}:int8"], values[f"{name}:scales"] = quantize(np.asarray(weights(name), dtype=np.float32))
        for name, array in values.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name.partition(':')[0]} holds numbers that are not finite")
        given = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in values.values()]
        options.add_external_initializers(list(values), given)
        return onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has many kinds of its own
        raise ValueError(f"ONNX Runtime cannot use the graphs: {type(error).__name__}: {error}") from error


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix in 8 bits, as ONNX Runtime's operator MatMulNBits takes it.

    Args:
        weight: (outputs, inputs), where inputs is a multiple of `BLOCK`.

    Returns:
        The integers, uint8 (outputs, inputs / BLOCK, BLOCK), in which 128 stands for 0; and the scale of each block,
        float32 (outputs, inputs / BLOCK), by which its largest weight is 127.
    """
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1)) / np.float32(127)
    integers = blocks * (1 / np.maximum(scales, np.finfo(np.float32).tiny))[..., None]
    integers += 128.5  # conversion to integers cuts
    return integers.astype(np.uint8), scales


def threads() -> int:
    """How many threads to compute with: `OMP_NUM_THREADS`, or as many as this process may; 0 is one for each core."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit():
        return int(wanted)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return 0 if usable == os.cpu_count() else int(usable or 0)
