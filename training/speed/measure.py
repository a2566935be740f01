"""Times, the rates of the machine, and the work that a computation needs."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from captioner.engine import Graph, open_session
from captioner.network.export import OPSET, add_weight, quantize_graph

PRODUCT = {"cpu": (512, 1024, 2048), "cuda": (8192, 8192, 8192)}  # rows, inputs and outputs of the matrix product
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes of the copy


class Figure(NamedTuple):
    """One measurement.

    name: what it is; a ratio is "numerator / denominator".
    value: in the unit that the name says.
    target: what it should reach, where there is such an aim.
    limit: what it would be if this project's part of the work took no longer than `Rates.least_seconds`; the other
        side of a ratio stays as measured.
    share: of a whole that the name says, or of the measured matrix rate.
    """

    name: str
    value: float
    target: float | None = None
    limit: float | None = None
    share: float | None = None


class Skipped(Exception):
    """A measurement that is not possible here; the message says why."""


def time_of(action: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call, until the device (None for the CPU) has computed everything that it was given."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def seconds(action: Callable[[], object], repeats: int, device: torch.device | None = None) -> float:
    """The median time of `repeats` calls in seconds, after one call to warm up; see `seconds_of_each`."""
    return seconds_of_each({"": action}, repeats, device)[""]


def seconds_of_each(
    actions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    """The median time of each of several actions in seconds.

    They take turns, so that other programs on the machine slow all of them down alike.

    Args:
        actions: what is called, by its name.
        repeats: how often each is measured, after one call to warm up.
        device: where they compute; None for the CPU.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, action in actions.items():
            times[name].append(time_of(action, device))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def operations(action: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products and convolutions of a call in torch, gradients included."""
    corrected = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter:
        action()
    return float(counter.get_total_flops())


def convolution_backward(gradient: Any, inputs: Any, weight: Any, *options: Any, out_shape: Any) -> int:
    """Operations of a convolution's gradients, from shapes: as many for the inputs and for the weight as forwards.

    Torch's own count takes every convolution for one without groups.
    """
    *_, transposed, _, _, wanted = options
    return sum(wanted[:2]) * conv_flop_count(inputs, weight, gradient, transposed)


class Rates:
    """The rates of the machine, each measured when it is first asked for.

    Args:
        device: what is measured.
        repeats: number of runs of each measurement, of which the fastest is taken, since it is for a limit.

    Attributes:
        found: those that have been measured, by their names.
    """

    def __init__(self, device: torch.device, repeats: int = 5) -> None:
        self.device, self.repeats = device, repeats
        self.product = PRODUCT.get(device.type, PRODUCT["cpu"])
        self.found: dict[str, float] = {}

    def once(self, name: str, measure: Callable[[], float]) -> float:
        """The rate of that name."""
        if name not in self.found:
            self.found[name] = measure()
        return self.found[name]

    def in_torch(self, dtype: torch.dtype) -> float:
        """Operations a second of a matrix product in torch."""
        kind = str(dtype).removeprefix("torch.")
        return self.once(f"10^9 operations a second, torch in {kind}", lambda: self.torch_product(dtype))

    def in_onnx(self, int8: bool) -> float:
        """Operations a second of a matrix product by ONNX Runtime, in float32 or with a matrix in 8 bits."""
        kind = "8 bits" if int8 else "float32"
        return self.once(f"10^9 operations a second, ONNX Runtime in {kind}", lambda: self.onnx_product(int8))

    @property
    def memory(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        return self.once("GB a second, a copy in memory", self.copy)

    @property
    def operations(self) -> float:
        """Floating-point operations of the matrix product that is measured."""
        return 2.0 * math.prod(self.product)

    def fastest(self, action: Callable[[], object]) -> float:
        """Seconds of the fastest call, after one to warm up."""
        return min([time_of(action, self.device) for _ in range(self.repeats + 1)][1:])

    def copy(self) -> float:
        """See `memory`."""
        source = torch.ones(COPIED.get(self.device.type, COPIED["cpu"]), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.fastest(lambda: target.copy_(source))

    def torch_product(self, dtype: torch.dtype) -> float:
        """See `in_torch`."""
        rows, inputs, outputs = self.product
        left = torch.randn(rows, inputs, device=self.device, dtype=dtype)
        right = torch.randn(inputs, outputs, device=self.device, dtype=dtype)
        return self.operations / self.fastest(lambda: left @ right)

    def onnx_product(self, int8: bool) -> float:
        """See `in_onnx`; the session is like those of `captioner.engine.OnnxEngine`."""
        from onnx import TensorProto, helper

        rows, inputs, outputs = self.product
        nodes = [
            helper.make_node("Transpose", ["weight"], ["transposed"], perm=[1, 0]),
            helper.make_node("MatMul", ["given", "transposed"], ["found"]),
        ]
        given = helper.make_tensor_value_info("given", TensorProto.FLOAT, [rows, inputs])
        found = helper.make_tensor_value_info("found", TensorProto.FLOAT, [rows, outputs])
        graph = helper.make_graph(nodes, "product", [given], [found])
        add_weight(graph, "weight", TensorProto.FLOAT, (outputs, inputs))
        opset = helper.make_opsetid("", OPSET)
        product = Graph(helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString(), ("weight",))
        quantized = quantize_graph(product) if int8 else product
        assert quantized is not None, "the matrix is too small for 8 bits"
        numbers = np.random.default_rng(0)
        weight = numbers.standard_normal((outputs, inputs), dtype=np.float32)
        session = open_session(quantized, lambda name: weight)
        values = {"given": numbers.standard_normal((rows, inputs), dtype=np.float32)}
        return self.operations / self.fastest(lambda: session.run(None, values))

    def least_seconds(self, operations: float, weights: float, rate: float) -> float:
        """The physical limit: operations at a matrix rate, or each weight read once, whichever takes longer.

        Args:
            operations: floating-point operations.
            weights: bytes of the weights.
            rate: operations a second.
        """
        return max(operations / rate, weights / self.memory)


def bytes_of(module: nn.Module) -> int:
    """Bytes of the weights of a module."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


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
