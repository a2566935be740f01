"""`ModelConfig`: everything that is needed to build a network, as plain data."""

import dataclasses
from typing import Any

MAX_SIZE = 2**24  # of anything in a configuration without a smaller limit
MAX_SIZES = {"encoder_self_attention": 64, "layers": 64, "heads": 1024, "grid": 128}
MAX_TEXT = 100  # characters of a name or another text
MAX_OPTIONS = 32


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The names and sizes of a network. Their defaults are defined here and nowhere else.

    Attributes:
        vocabulary_size: number of words, special ones included.
        encoder: name of a classification network of torchvision.
        node: node of its graph whose output is read; empty for the last feature map.
        grid: rows and columns of regions.
        encoder_self_attention: layers in which the annotation vectors attend to each other before the decoder reads
            them; 0 for none, as in the paper.
        decoder: "lstm", the paper's, or "transformer".
        attention: name of the attention mechanism, a key of `captioner.network.attention.MECHANISMS`.
        attention_options: options of the mechanism by name; those that are missing have their defaults.
        annotation_size: size of the annotation vectors that the decoder reads, a learnt projection of the encoder's
            channels; 0 to read these as they are, as in the paper.
        attention_size: size of the space in which attention compares regions with the decoder's state.
        embedding_size: size of the word embeddings of an LSTM; those of a transformer have hidden_size.
        hidden_size: size of an LSTM's state, or of a transformer's vectors.
        dropout: share dropped of projected annotation vectors, word embeddings and the output layer's input.
        tie_embeddings: whether word embeddings and output layer share one matrix.
        heads: heads of self-attention, in the encoder's layers and in a transformer decoder.
        layers: layers of a transformer decoder.
    """

    vocabulary_size: int
    encoder: str = "mobilenet_v2"
    node: str = ""
    grid: tuple[int, int] = (7, 7)
    encoder_self_attention: int = 0
    decoder: str = "lstm"
    attention: str = "additive"
    attention_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    annotation_size: int = 512
    attention_size: int = 512
    embedding_size: int = 512
    hidden_size: int = 512
    dropout: float = 0.5
    tie_embeddings: bool = False
    heads: int = 8
    layers: int = 2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The configuration in a model's file, which may come from a stranger. Nothing is built.

        Raises:
            TypeError: there is an unknown name.
            ValueError: a value has the wrong type or is outside all reason.
        """
        config = cls(**values)
        for field in dataclasses.fields(cls):
            value = getattr(config, field.name)
            if field.name == "grid":
                sides = list(value) if isinstance(value, list | tuple) else []
                valid = len(sides) == 2 and all(type(n) is int and 1 <= n <= MAX_SIZES["grid"] for n in sides)
            elif field.name == "attention_options":
                valid = isinstance(value, dict) and len(value) <= MAX_OPTIONS and all(map(is_plain, value.values()))
            elif field.type is int:
                least = 0 if field.name in ("annotation_size", "encoder_self_attention") else 1
                valid = type(value) is int and least <= value <= MAX_SIZES.get(field.name, MAX_SIZE)
            elif field.type is bool:
                valid = type(value) is bool
            else:
                valid = is_plain(value) and isinstance(value, str) == (field.type is str)
            if not valid:
                raise ValueError(f"{field.name} cannot be {value!r:.100}")
        return dataclasses.replace(config, grid=(config.grid[0], config.grid[1]))


def is_plain(value: object) -> bool:
    """Whether a value is a short text, a truth value, or a number of a reasonable size."""
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    return isinstance(value, bool | int | float) and abs(value) <= MAX_SIZE  # not a number fails the comparison
