"""The encoder: an image classification network whose last feature map gives the annotation vectors."""

import enum
import math
import re
from collections import OrderedDict
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, fx, nn
from torch.func import functional_call
from torchvision.models import GoogLeNet, Inception3, VisionTransformer, WeightsEnum
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vision_transformer import interpolate_embeddings

from captioner.config import ModelConfig

# Height and width in pixels of the image for which the shapes of a network's outputs are inferred.
PROBE = 224
# The node of the last feature map, for families in which it is not "features"; see `default_node` for VGG.
DEFAULT_NODES = {
    "resnet": "layer4",
    "resnext": "layer4",
    "wide_resnet": "layer4",
    "regnet": "trunk_output",
    "densenet": "relu",
    "mnasnet": "layers",
    "shufflenet": "conv5",
    "googlenet": "inception5b",
    "inception": "Mixed_7c",
    "maxvit": "blocks.3",
    "swin": "permute",
    "vit": "encoder.ln",
}


class Layout(enum.Enum):
    """The layout of a node's output."""

    CHANNELS_FIRST = "(batch, channels, rows, columns)"
    CHANNELS_LAST = "(batch, rows, columns, channels)"
    TOKENS = "(batch, 1 + rows * columns, channels), the class token first"


class Encoder(nn.Module):
    """A torchvision classification network without its classifier (Xu et al. 2015, section 3.1.1).

    It may be convolutional, or a transformer whose tokens are the patches of a grid (`vit_b_16`, `swin_t`).

    Args:
        name: the network's name in `torchvision.models`, such as "mobilenet_v2" or "resnet101".
        node: the node of its graph whose output is read; empty for the last feature map.
        grid: rows and columns of regions; another size than the network's own is reached by average pooling.
        weights: a torchvision weights name ("DEFAULT", "IMAGENET1K_V1"), downloaded by torchvision; the path of
            a state dict (.safetensors, .pth), which need not have a classifier; or None for random weights, to be
            loaded later. Images have to be normalised as in `normalisation`.

    Attributes:
        channels: size D of an annotation vector.
        grid: rows and columns; there are rows * columns regions.
        parts: after `split`, the body below and above the first block that is tuned; they share its weights.
        displacement: offset in pixels of the input between the centre of a region's receptive field and the centre of
            its cell, which is further down and to the right. Heatmaps take it into account.
        autocast_dtype: set it to `torch.bfloat16` to run the network in that type.

    Raises:
        ValueError: there is no such network, node or weights, or the node's output has no rows and columns.
    """

    def __init__(
        self,
        name: str = ModelConfig.encoder,
        node: str = ModelConfig.node,
        grid: tuple[int, int] = ModelConfig.grid,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        network = build_network(name)
        self.name, self.node = name, node or default_node(name, network)
        self.grid = (int(grid[0]), int(grid[1]))
        self.autocast_dtype: torch.dtype | None = None
        try:
            self.body = create_feature_extractor(network, {self.node: "map"}, suppress_diff_warning=True)
        except ValueError as error:
            raise ValueError(f"{name} has no node {self.node!r}; it has {blocks_of(network)}") from error
        if weights is not None:
            load_weights(network, self.body, name, weights)
        self.body.eval()
        # In a list, so that they are not submodules, and the weights that they share with the body are saved once.
        self.parts: list[fx.GraphModule] = []
        self.cut_layout = Layout.CHANNELS_FIRST
        found = output_of(self.body, PROBE, PROBE)
        layout = layout_of(found)
        if layout is None:
            given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"node {self.node!r} of {name} gives {given}, not a feature map; choose one of {blocks_of(network)}"
            )
        self.layout = layout
        _, self.channels, rows, _ = to_map(found, layout).shape
        self.displacement = displacement_of(self.body, rows)
        self.body.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Annotation vectors a_1 ... a_L of each image.

        Args:
            images: (batch, 3, height, width), normalised as the weights expect; or the maps that `lower` gave for
                them, (batch, channels, rows, columns).

        Returns:
            (batch, regions, channels) in float32; the regions run row by row from the top left.

        Raises:
            ValueError: the network cannot read images of that size. `vit_*` and `maxvit_t` read 224 x 224 pixels only.
        """
        if self.parts and images.shape[1] != 3:
            output = self.run(self.parts[1], from_lower(images, self.cut_layout))
        else:
            output = self.run(self.body, images)
        feature_map = to_map(output, self.layout)
        if feature_map.shape[-2:] != self.grid:
            feature_map = nn.functional.adaptive_avg_pool2d(feature_map, self.grid)
        return feature_map.flatten(2).transpose(1, 2).float()

    def run(self, part: fx.GraphModule, images: Tensor) -> Tensor:
        """The output of a part of the network, computed in `autocast_dtype`. Raises ValueError as `forward` does."""
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        kind = self.autocast_dtype
        try:
            with nullcontext() if kind is None else torch.autocast(images.device.type, kind):
                output: Tensor = part.forward(images)["map"]  # see `output_of`
        except (AssertionError, RuntimeError):
            if part in (self.body, *self.parts[:1]):  # which read images
                self.check_size(images.shape[2], images.shape[3])
            raise
        return output

    def check_size(self, rows: int, columns: int) -> None:
        """Raise ValueError unless the network can read images of that size; nothing is computed."""
        try:
            output_of(self.body, rows, columns)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} cannot read images of {rows} x {columns} pixels; {PROBE} x {PROBE} is a size that it can"
            ) from error

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode, so that batch normalisation keeps the statistics of the pretraining."""
        return super().train(False)

    def split(self, block: str) -> None:
        """Divide the body below a block, so that the part that is not tuned can be computed once per image.

        Afterwards `lower` gives maps, and `forward` accepts them in place of images.

        Args:
            block: as in `train_from`; the cut lies at the last single tensor before its first weight is used.

        Raises:
            ValueError: there is no such block, or there is nothing below it.
        """
        self.train_from(block)
        tuned = {name for name, parameter in self.body.named_parameters() if parameter.requires_grad}
        self.train_from(None)
        cut = last_cut(self.body, tuned)
        parts = [] if cut is None else list(divide(self.body, cut))
        layout = layout_of(output_of(parts[0], PROBE, PROBE)) if parts else None
        if layout is None:
            raise ValueError(f"no single feature map of the encoder lies below the block {block!r}; tune a later one")
        self.parts, self.cut_layout = parts, layout

    def lower(self, images: Tensor) -> Tensor:
        """The map where `split` divided the body, (batch, channels, rows, columns), for normalised images.

        The tokens of a vision transformer are its rows, in one column, the class token first.
        """
        return to_lower(self.run(self.parts[0], images), self.cut_layout)

    def train_from(self, block: str | None) -> None:
        """Make the weights from a block upwards trainable; None freezes all of them.

        Args:
            block: the beginning of a parameter's name, such as "features.4" or "layer3"; "" means everything.

        Raises:
            ValueError: there is no such block.
        """
        trainable = False
        for name, parameter in self.body.named_parameters():
            trainable = trainable or (block is not None and f"{name}.".startswith(f"{block}." if block else ""))
            parameter.requires_grad_(trainable)
        if block is not None and not trainable:
            blocks = sorted({".".join(name.split(".")[:2]) for name, _ in self.body.named_parameters()})
            raise ValueError(f"the encoder has no block {block!r}; it has {', '.join(blocks)}")


def last_cut(body: fx.GraphModule, tuned: Collection[str]) -> fx.Node | None:
    """The last node before the first tuned weight whose output alone determines the outputs of all later nodes."""
    nodes = list(body.graph.nodes)
    positions = {node: position for position, node in enumerate(nodes)}
    alive: set[fx.Node] = set()
    cut = None
    for position, node in enumerate(nodes):
        if node.op == "output" or any(f"{name}.".startswith(f"{node.target}.") for name in tuned):
            break
        alive = {n for n in {*alive, node} if any(positions[user] > position for user in n.users)}
        if alive == {node} and node.op != "placeholder":
            cut = node
    return cut


def divide(body: fx.GraphModule, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The part of a graph up to a node, and the part after it; both use the weights of `body`."""
    nodes = list(body.graph.nodes)
    position = nodes.index(cut)
    lower, upper = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[: position + 1]:
        copies[node] = lower.node_copy(node, copies.__getitem__)
    lower.output({"map": copies[cut]})
    copies = {cut: upper.placeholder("lower")}
    for node in nodes[position + 1 :]:
        copies[node] = upper.node_copy(node, copies.__getitem__)
    return fx.GraphModule(body, lower).eval(), fx.GraphModule(body, upper).eval()


def output_of(body: fx.GraphModule, rows: int, columns: int) -> Any:
    """The output of a network for one image of that size, on the meta device: a shape, and nothing is computed."""
    shell = nn.Module()  # a traced module's own `__call__` prints every error
    shell.body, shell.forward = body, body.forward
    weights = {name: tensor.to("meta") for name, tensor in (*shell.named_parameters(), *shell.named_buffers())}
    with torch.no_grad():
        return functional_call(shell, weights, torch.empty(1, 3, rows, columns, device="meta"))["map"]


def layout_of(output: Any) -> Layout | None:
    """The layout of a node's output for a square image; None where it is not a map."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        return None
    shape = output.shape
    if len(shape) == 3:
        return Layout.TOKENS if shape[1] > 1 and math.isqrt(shape[1] - 1) ** 2 == shape[1] - 1 else None
    if shape[2] == shape[3]:
        return Layout.CHANNELS_FIRST
    return Layout.CHANNELS_LAST if shape[1] == shape[2] else None


def to_map(output: Tensor, layout: Layout) -> Tensor:
    """A node's output as a map (batch, channels, rows, columns), without a class token."""
    if layout is Layout.CHANNELS_LAST:
        return output.permute(0, 3, 1, 2)
    if layout is Layout.TOKENS:
        return output[:, 1:].transpose(1, 2).unflatten(2, (math.isqrt(output.shape[1] - 1), -1))
    return output


def to_lower(output: Tensor, layout: Layout) -> Tensor:
    """A node's output as a map, the inverse of `from_lower`; tokens are in one column, the class token first."""
    return output.transpose(1, 2)[..., None] if layout is Layout.TOKENS else to_map(output, layout)


def from_lower(maps: Tensor, layout: Layout) -> Tensor:
    """The output of a node from the maps (batch, channels, rows, columns) that `to_lower` made of it."""
    if layout is Layout.CHANNELS_LAST:
        return maps.permute(0, 2, 3, 1)
    return maps[..., 0].transpose(1, 2) if layout is Layout.TOKENS else maps


def displacement_of(body: fx.GraphModule, rows: int) -> float:
    """Offset in pixels between the centre of a region's receptive field and the centre of its cell, further down.

    A window of odd size and stride two is centred on the first of two pixels, one of even size between them. For each
    node this computes the centre of the first region's receptive field and the distance to that of the next region.
    Networks that halve their maps in other ways merge patches, whose centres are those of the cells.

    Args:
        body: a network.
        rows: rows of its map for an image of `PROBE` rows.
    """
    centres: dict[fx.Node, tuple[float, float]] = {}
    for node in body.graph.nodes:
        inputs = [centres[other] for other in node.all_input_nodes if other in centres]
        if node.op == "placeholder":
            centres[node] = (0.0, 1.0)
        elif inputs and node.op != "output":
            first, distance = max(inputs, key=lambda centre: centre[1])
            module = body.get_submodule(str(node.target)) if node.op == "call_module" else nn.Identity()
            if isinstance(module, nn.AdaptiveAvgPool2d):
                continue  # it gives one value for the whole image
            for layer in module.modules():  # a node may be one of torchvision's modules with several layers
                if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
                    window, stride, padding = (
                        int(value[0] if isinstance(value, tuple) else value)
                        for value in (layer.kernel_size, layer.stride, layer.padding)
                    )
                    first += distance * ((window - 1) / 2 - padding)
                    distance *= stride
            centres[node] = (first, distance)
    first, distance = centres.get(body.graph.output_node().all_input_nodes[0], (0.0, 0.0))
    if rows * distance < PROBE / 2:
        return 0.0
    return (PROBE - 1) / 2 - (first + (rows - 1) / 2 * distance)


def build_network(name: str) -> nn.Module:
    """A torchvision classification network with random weights. Raises ValueError where there is none of that name."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ValueError(f"torchvision has no classification network {name!r}; it has {', '.join(names)}")
    # Without this option these two warn and initialise slowly.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    if isinstance(network, GoogLeNet | Inception3):
        # Their weights were trained with another normalisation; this converts the usual one.
        network.transform_input = True
    return network


def normalisation(
    name: str, weights: str | Path | None
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of the three channels of the images that a network's weights were trained on.

    Args:
        name, weights: as for `Encoder`; for a file, the normalisation of the network's default weights.

    Raises:
        ValueError: no such network or weights.
    """
    transforms = named_weights(name, "DEFAULT" if weights is None or is_file(weights) else weights).transforms()
    mean, std = transforms.mean, transforms.std
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def is_file(weights: str | Path) -> bool:
    """Whether weights are given as a file, not by name."""
    return Path(weights).suffix != ""


def named_weights(name: str, weights: str | Path) -> WeightsEnum:
    """The entry of torchvision's weights of that name. Raises ValueError where there is none."""
    build = torchvision.models.get_model_weights
    try:
        entries = build(name)
    except ValueError as error:
        raise ValueError(f"torchvision has no weights for a network {name!r}") from error
    if str(weights) not in entries.__members__:
        raise ValueError(
            f"torchvision has no weights {str(weights)!r} of {name}; it has {', '.join(entries.__members__)}"
        )
    return entries[str(weights)]


def load_weights(network: nn.Module, body: nn.Module, name: str, weights: str | Path) -> None:
    """Load weights into a torchvision network (see `Encoder`). Only tensors are ever unpickled.

    Args:
        body: the part of it that is used; weights of the rest, such as the classifier, may be missing.
    """
    if not is_file(weights):
        try:
            state = named_weights(name, weights).get_state_dict(check_hash=True)
        except OSError as error:
            raise ValueError(
                f"cannot download the weights {str(weights)!r} of {name}: {error}; give the path of a file instead"
            ) from error
    else:
        state = read_state(Path(weights))
    try:
        result = network.load_state_dict(adapted(state, network), strict=False)
        missing = [key for key in result.missing_keys if key in body.state_dict()]
        if missing or result.unexpected_keys:
            named = ", ".join((missing + result.unexpected_keys)[:3])
            raise ValueError(f"{len(missing)} tensors are missing, {len(result.unexpected_keys)} unknown: {named} ...")
    except Exception as error:
        raise ValueError(f"encoder weights {weights} do not fit {name}: {error}") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file. Raises ValueError where the file has none."""
    if not path.is_file():
        raise ValueError(f"encoder weights {path} are not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"encoder weights {path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"encoder weights {path} are no state dict but a {type(state).__name__}")
    return state


def adapted(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict with the names and shapes of current torchvision.

    DenseNet's files have older names, "norm.1" for "norm1". The position embeddings of a vision transformer are
    interpolated if they were trained on images of another size.
    """
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name): tensor for name, tensor in state.items()}
    if isinstance(network, VisionTransformer) and "encoder.pos_embedding" in state:
        state = interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state))
    return state


def blocks_of(network: nn.Module) -> str:
    """The nodes of a network that `Encoder` may read, down to the second level."""
    names = get_graph_node_names(network)[1]
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))


def default_node(name: str, network: nn.Module) -> str:
    """The node of a torchvision network's last feature map; in VGG the one before the last pooling.

    That is the paper's choice: 14 x 14 regions for a 224 x 224 image.
    """
    if name.startswith("vgg"):
        relus = [i for i, layer in enumerate(network.features) if isinstance(layer, nn.ReLU)]  # type: ignore[arg-type]
        return f"features.{relus[-1]}"
    return next((node for family, node in DEFAULT_NODES.items() if name.startswith(family)), "features")
