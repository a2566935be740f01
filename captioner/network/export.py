"""The network as ONNX graphs, with which ONNX Runtime captions without torch; for the command `captioner-export`."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call

from captioner.config import ModelConfig
from captioner.engine import BLOCK, OPTIONAL, Graph, Graphs, digest_of
from captioner.modelfile import read_model, save_model
from captioner.network.decoder import AttentionLSTM, Memory
from captioner.network.model import ShowAttendTell
from captioner.network.transformer import TransformerDecoder

OPSET = 18
QUANTIZED = 2**17  # weights of the smallest matrix that is worth having in 8 bits
IMAGES, ROWS, STEPS = 2, 3, 4  # sizes of the examples that graphs are traced with; they may have any afterwards


class Example(nn.Module):
    """Some modules of a network and a function that calls them."""

    def __init__(self, modules: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = function

    def forward(self, *arrays: Tensor) -> Any:
        """What the function gives."""
        return self.function(*arrays)


class WeightsGiven(nn.Module):
    """Another module, whose weights are arguments, so that no exporter can fold them into constants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.modules_called = [module]  # in a list, so that its weights are not this module's

    def forward(self, weights: dict[str, Tensor], arrays: Sequence[Tensor]) -> Any:
        """What the module gives with these weights."""
        return functional_call(self.modules_called[0], weights, tuple(arrays))


def export_graphs(config: ModelConfig, size: tuple[int, int]) -> Graphs:
    """The graphs of a network. Its weights do not matter to them.

    Args:
        config: the network's.
        size: rows and columns of its images.

    Raises:
        ImportError: the package `onnx` is missing.
    """
    with torch.random.fork_rng(devices=[]):  # a run that is trained goes on with the same random numbers
        model = ShowAttendTell(config).eval()
    images = torch.zeros(IMAGES, 3, *size)
    annotations = model.annotate(images).detach()
    encoder = {"encoder": model.encoder, "project": model.project, "refine": model.refine}
    encode, step = export_decoder(model.decoder, annotations)
    return Graphs(
        export(Example(encoder, model.annotate), {"images": images}, ["annotations"]),
        encode,
        step,
        quantize_graph(step),
        model.encoder.displacement,
        digest_of(dataclasses.asdict(config), size),
    )


def export_decoder(decoder: AttentionLSTM | TransformerDecoder, annotations: Tensor) -> tuple[Graph, Graph]:
    """The graphs `encode` and `step` of a decoder, traced with annotations (images, regions, channels)."""
    mask = torch.ones(annotations.shape[:2], dtype=torch.bool)
    tokens = torch.ones(len(annotations), ROWS, dtype=torch.long)
    several = isinstance(decoder, TransformerDecoder)  # which has a memory for each layer

    def encode(annotations: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        memory: Any = decoder.encode(annotations, mask)
        return (*(layer.keys for layer in (memory if several else [memory])), *decoder.initial_state(memory, 1))

    def step(annotations: Tensor, mask: Tensor, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        layers = tuple(Memory(annotations, each, mask) for each in rest[: len(keys)])
        memory: Any = layers if several else layers[0]
        found = decoder.step(memory, type(state)(*rest[len(keys) :]), tokens)
        optional = [part for name in OPTIONAL if (part := getattr(found, name)) is not None]
        return (found.logits, found.alpha, *found.state, *optional)

    with torch.no_grad():
        memory: Any = decoder.encode(annotations, mask)
        state: Any = decoder.initial_state(memory, ROWS)
        for _ in range(STEPS):
            found = decoder.step(memory, state, tokens)
            state = found.state
    keys = {f"keys_{number}": layer.keys for number, layer in enumerate(memory if several else [memory])}
    following = [f"next_{name}" for name in state._fields]
    optional = [name for name in OPTIONAL if getattr(found, name) is not None]
    shared = {"annotations": annotations, "mask": mask}
    # Of states and tokens also the rows vary; of a transformer's state also the steps, its fourth axis.
    varying = {name: (0, 1, 3) if array.dim() == 5 else (0, 1) for name, array in state._asdict().items()}
    varying["tokens"] = (0, 1)
    module = {"decoder": decoder}
    return (
        export(Example(module, encode), shared, [*keys, *following]),
        export(
            Example(module, step),
            {**shared, "tokens": tokens, **keys, **state._asdict()},
            ["logits", "alpha", *following, *optional],
            varying,
        ),
    )


def export(
    module: Example, inputs: dict[str, Tensor], outputs: list[str], varying: Mapping[str, Sequence[int]] | None = None
) -> Graph:
    """One graph.

    Args:
        module: what it computes.
        inputs: examples of the arrays that it is given, by their names.
        outputs: names of what it gives.
        varying: the axes of an input that may have any size; the first alone where it is not named.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # which torch's exporter needs
    except ImportError as error:
        raise ImportError("to export a model, pip install 'captioner[export]'") from error
    weights = {name: tensor.detach() for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
    sizes = [dict.fromkeys((varying or {}).get(name, (0,)), Dim.DYNAMIC) for name in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            WeightsGiven(module),
            (weights, list(inputs.values())),
            dynamo=True,
            optimize=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[*weights, *inputs],
            output_names=outputs,
            dynamic_shapes=({name: {} for name in weights}, sizes),
        )
    assert program is not None
    model = program.model_proto
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    for given in [given for given in graph.input if given.name in weights]:
        graph.input.remove(given)
        if given.name in used:
            add_weight(graph, given.name, onnx.TensorProto.FLOAT, weights[given.name].shape)
    names = tuple(tensor.name for tensor in graph.initializer if tensor.name in weights)
    # What the exporter notes about itself is many times larger than the graph.
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return Graph(model.SerializeToString(), names)


def add_weight(graph: Any, name: str, kind: int, shape: Sequence[int]) -> None:
    """Declare a weight that the graph is given when it is loaded.

    It is said to be a file of the weight's name, because in the browser ONNX Runtime takes weights as such files.
    """
    from onnx import TensorProto

    tensor = graph.initializer.add(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=name)


def quantize_graph(graph: Graph) -> Graph | None:
    """The graph with products of large matrices in 8 bits; None where there are none.

    MatMulNBits also rounds the vectors that it multiplies, each by itself, so that a caption does not depend on
    the others of its batch.
    """
    import onnx

    model = onnx.load_model_from_string(graph.model)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    transposed = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Transpose"}
    quantized: list[str] = []
    for node in model.graph.node:
        weight = transposed.get(node.input[1], "") if node.op_type == "MatMul" else ""
        outputs, inputs = shapes.get(weight, (0, 0))
        if outputs * inputs < QUANTIZED or inputs % BLOCK:
            continue
        blocks = inputs // BLOCK
        node.op_type, node.domain = "MatMulNBits", "com.microsoft"
        node.input[1:] = [f"{weight}:int8", f"{weight}:scales"]
        # Level 4: it multiplies integers.
        options = {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in options.items())
        if weight not in quantized:
            quantized.append(weight)
            add_weight(model.graph, f"{weight}:int8", onnx.TensorProto.UINT8, (outputs, blocks, BLOCK))
            add_weight(model.graph, f"{weight}:scales", onnx.TensorProto.FLOAT, (outputs, blocks))
    if not quantized:
        return None
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    used = names_read(model.graph)
    for node in [node for node in model.graph.node if used.isdisjoint(node.output)]:
        model.graph.node.remove(node)
    used = names_read(model.graph)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return Graph(model.SerializeToString(), tuple(name for name in graph.weights if name in used), tuple(quantized))


def names_read(graph: Any) -> set[str]:
    """The names that the nodes of an ONNX graph read, and those of what it gives."""
    return {name for node in graph.node for name in node.input} | {output.name for output in graph.output}


def export_file(path: Path) -> None:
    """Write the graphs of a model into its file; the weights stay as they are.

    Raises:
        CheckpointError: there is no model, or the file cannot be written.
        ImportError: the package `onnx` is missing.
    """
    description, weights = read_model(path)
    graphs = export_graphs(description.config, description.preprocessing.size)
    save_model(path, dataclasses.replace(description, graphs=graphs), weights)
