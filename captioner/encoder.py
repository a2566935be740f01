"""A convolutional network read as a grid of annotation vectors."""

from collections.abc import Collection
from pathlib import Path

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

# Pixels of the square that is sent through a network to see what comes out; some take no smaller one.
PROBE = 96
# Networks that halve the image by patches that do not overlap, so that a region is seen from its middle. The others
# do it by padded 3 x 3 windows around every second pixel: theirs is seen from its top left corner.
SEEN_FROM_THE_MIDDLE = ("vgg", "convnext")
# Where the last feature map is, for families in which it is not called "features".
DEFAULT_NODES = {
    "vgg": "features.{last_relu}",
    "resnet": "layer4",
    "resnext": "layer4",
    "regnet": "trunk_output",
    "densenet": "relu",
}
# What torchvision's networks call their classifiers.
CLASSIFIERS = ("classifier.", "fc.", "head.", "heads.")


class Encoder(nn.Module):
    """A torchvision classification network without its classifier (Xu et al. 2015, section 3.1.1).

    Args:
        name: the network's name in `torchvision.models`, such as "mobilenet_v2" or "resnet101".
        node: the node of its graph whose output is read; empty for the last feature map.
        grid: rows and columns of regions; another size than the network's own is reached by average pooling.
        weights: a torchvision weights name ("DEFAULT", "IMAGENET1K_V1"), downloaded by torchvision; the path of
            a state dict (.safetensors, .pth); or None for random weights, to be loaded later.

    Attributes:
        channels: size D of an annotation vector.
        grid: rows and columns; there are rows * columns regions.
        parts: the body below and above the first block that is tuned, once `split` has divided it; they share its
            weights.
        displacement: how far up and left of its middle each region is seen from, in pixels of the input: the
            middle of its receptive field. Heatmaps are moved by it.
        autocast_dtype: set it to `torch.bfloat16` to run the convolutions, where the time goes, in that type.

    Raises:
        ValueError: no such network, node or weights, or the node's output has no places.
    """

    def __init__(
        self,
        name: str = "mobilenet_v2",
        node: str = "",
        grid: tuple[int, int] = (7, 7),
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        network = build_network(name, weights)
        self.node = node or default_node(name, network)
        self.grid = (int(grid[0]), int(grid[1]))
        self.autocast_dtype: torch.dtype | None = None
        try:
            self.body = create_feature_extractor(network, {self.node: "map"})
        except ValueError as error:
            nodes = [n for n in get_graph_node_names(network)[1] if n.count(".") <= 1]
            raise ValueError(f"{name} has no node {self.node!r}; it has {', '.join(nodes)}") from error
        self.body.eval()
        # In a list, so that they are no submodules: their weights are the body's and are saved once.
        self.parts: list[fx.GraphModule] = []
        with torch.no_grad():
            shape = self.body(torch.zeros(1, 3, PROBE, PROBE))["map"].shape
        if len(shape) != 4:
            raise ValueError(
                f"node {self.node!r} of {name} gives a tensor of shape {tuple(shape)}, not a feature map; "
                "choose an earlier node"
            )
        self.channels: int = shape[1]
        self.displacement = 0.0 if name.startswith(SEEN_FROM_THE_MIDDLE) else PROBE / shape[2] / 2
        self.body.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Annotation vectors a_1 ... a_L of each image.

        Args:
            images: (batch, 3, height, width), normalised as the weights expect; or the maps that `lower` gave for
                them, (batch, channels, rows, columns).

        Returns:
            (batch, regions, channels) in float32; the regions run row by row from the top left.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        part = self.parts[1] if self.parts and images.shape[1] != 3 else self.body
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            feature_map = part(images)["map"]
        if feature_map.shape[-2:] != self.grid:
            feature_map = nn.functional.adaptive_avg_pool2d(feature_map, self.grid)
        return feature_map.flatten(2).transpose(1, 2).float()

    def train(self, mode: bool = True) -> "Encoder":
        """Stay in evaluation mode: batch-norm statistics of the pretraining are kept while weights are tuned."""
        return super().train(False)

    def split(self, block: str) -> None:
        """Divide the body below a block, so that what is not tuned can be computed once per image.

        Afterwards `lower` gives maps, and `forward` accepts them in place of images.

        Args:
            block: as in `train_from`; the cut lies at the last single tensor before its first weight is used.

        Raises:
            ValueError: no parameter's name begins so, or there is nothing below the block.
        """
        self.train_from(block)
        tuned = {name for name, parameter in self.body.named_parameters() if parameter.requires_grad}
        self.train_from(None)
        cut = last_cut(self.body, tuned)
        if cut is None:
            raise ValueError(f"no single feature map of the encoder lies below the block {block!r}; tune a later one")
        self.parts = list(divide(self.body, cut))

    def lower(self, images: Tensor) -> Tensor:
        """The map where `split` divided the body, (batch, channels, rows, columns), for normalised images."""
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.parts[0](images)["map"]

    def train_from(self, block: str | None) -> None:
        """Make the weights from the block of that name upwards trainable; None freezes all of them.

        Args:
            block: the beginning of a parameter's name, such as "features.4" or "layer3"; "" means everything.

        Raises:
            ValueError: no parameter's name begins so.
        """
        trainable = False
        for name, parameter in self.body.named_parameters():
            trainable = trainable or (block is not None and f"{name}.".startswith(f"{block}." if block else ""))
            parameter.requires_grad_(trainable)
        if block is not None and not trainable:
            blocks = sorted({".".join(name.split(".")[:2]) for name, _ in self.body.named_parameters()})
            raise ValueError(f"the encoder has no block {block!r}; it has {', '.join(blocks)}")


def last_cut(body: fx.GraphModule, tuned: Collection[str]) -> fx.Node | None:
    """The last node before the first tuned weight through which all that follows depends on the image."""
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
    """The part of a graph up to a node, and the part that goes on from there; both use the weights of `body`."""
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


def build_network(name: str, weights: str | Path | None) -> nn.Module:
    """A torchvision classification network with the weights named (see `Encoder`)."""
    try:
        if weights is None or Path(weights).suffix:
            network = torchvision.models.get_model(name, weights=None)
        else:
            network = torchvision.models.get_model(name, weights=str(weights))
    except (ValueError, KeyError) as error:
        raise ValueError(f"torchvision has no model {name!r} with weights {str(weights)!r}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"cannot download the weights {str(weights)!r} of {name}: {error}; give the path of a file instead"
        ) from error
    if weights is not None and Path(weights).suffix:
        load_network_weights(network, Path(weights))
    return network


def load_network_weights(network: nn.Module, path: Path) -> None:
    """Fill `network` from a torchvision state dict on disk, never unpickling anything but tensors."""
    if not path.is_file():
        raise ValueError(f"encoder weights {path} are not a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        result = network.load_state_dict(state, strict=False)
        # The classifier is never used: a file without it is whole.
        missing = [name for name in result.missing_keys if not name.startswith(CLASSIFIERS)]
        if missing or result.unexpected_keys:
            named = ", ".join((missing + result.unexpected_keys)[:3])
            raise ValueError(f"{len(missing)} tensors are missing, {len(result.unexpected_keys)} unknown: {named} ...")
    except Exception as error:
        raise ValueError(f"encoder weights {path} do not fit {type(network).__name__}: {error}") from error


def default_node(name: str, network: nn.Module) -> str:
    """The node that gives a torchvision network's last feature map; in VGG the one before the last pooling.

    That is the paper's choice: 14 x 14 places for a 224 x 224 image.
    """
    if name.startswith("vgg"):
        relus = [i for i, layer in enumerate(network.features) if isinstance(layer, nn.ReLU)]  # type: ignore[arg-type]
        return f"features.{relus[-1]}"
    return next((node for family, node in DEFAULT_NODES.items() if name.startswith(family)), "features")
