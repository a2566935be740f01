"""Show, Attend and Tell: the encoder, the decoder, and what describes them."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captioner.network.decoder import AttentionLSTM, TeacherForced
from captioner.network.encoder import Encoder
from captioner.network.transformer import AnnotationTransformer, TransformerDecoder

DECODERS = ("lstm", "transformer")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network again, as plain data.

    encoder, node, grid: see `captioner.network.encoder.Encoder`.
    encoder_self_attention: layers in which the annotation vectors attend to each other before the decoder reads
        them; 0 for none, as in the paper.
    decoder: "lstm", the paper's, or "transformer".
    attention: name of the attention mechanism, a key of `captioner.network.attention.MECHANISMS`.
    annotation_size: size of the annotation vectors that the decoder reads, a learnt projection of the encoder's
        channels; 0 to read these as they are, as the paper does.
    embedding_size: size of word embeddings; a transformer's are of hidden_size.
    heads: of every multi-head attention in the network.
    layers: of a transformer decoder.
    dropout: share dropped of projected annotation vectors, word embeddings and the output layer's input.
    hard_inference: what `hard` attention sees when not training, "argmax" or "expectation".
    """

    vocabulary_size: int
    encoder: str = "mobilenet_v2"
    node: str = ""
    grid: tuple[int, int] = (7, 7)
    encoder_self_attention: int = 0
    decoder: str = "lstm"
    attention: str = "additive"
    annotation_size: int = 512
    attention_size: int = 512
    embedding_size: int = 512
    hidden_size: int = 512
    dropout: float = 0.5
    tie_embeddings: bool = False
    heads: int = 8
    layers: int = 2
    hard_inference: str = "argmax"


class ShowAttendTell(nn.Module):
    """A CNN that gives annotation vectors and a decoder that attends over them while it writes (Xu et al. 2015).

    Args:
        config: the sizes and names.
        encoder_weights: for a new model to be trained: a torchvision weights name or a file; see `Encoder`.

    Raises:
        ValueError: no such encoder, decoder or attention, or sizes that do not fit each other.
    """

    def __init__(self, config: ModelConfig, encoder_weights: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.node, config.grid, encoder_weights)
        channels = config.annotation_size or self.encoder.channels
        self.project: nn.Module = nn.Identity()
        if config.annotation_size:
            self.project = nn.Sequential(
                nn.Linear(self.encoder.channels, channels), nn.ReLU(), nn.Dropout(config.dropout)
            )
        self.refine: nn.Module = nn.Identity()
        if config.encoder_self_attention:
            self.refine = AnnotationTransformer(
                channels, self.encoder.grid, config.encoder_self_attention, config.heads, config.dropout
            )
        self.decoder = build_decoder(config, channels)

    def annotate(self, images: Tensor) -> Tensor:
        """The annotation vectors the decoder reads, (batch, regions, annotation_size).

        Args:
            images: (batch, 3, height, width), or what `self.encoder` gave for them, (batch, regions, channels):
                a frozen encoder needs to see an image only once.
        """
        return self.refine(self.project(self.encoder(images) if images.dim() == 4 else images))

    def forward(
        self, images: Tensor, captions: Tensor, inputs: Tensor | None = None, drawn: Tensor | None = None
    ) -> TeacherForced:
        """Captions under teacher forcing.

        Args:
            images: (batch, 3, height, width) or encoder features (batch, regions, channels).
            captions: (batch, rows, length) ids, several captions an image; see `AttentionLSTM.forward`.
            inputs: the same shape, read in their place.
            drawn: regions that `hard` attention drew earlier, to be seen again; see `AttentionLSTM.forward`.
        """
        return self.decoder(self.annotate(images), captions, inputs=inputs, drawn=drawn)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def build_decoder(config: ModelConfig, channels: int) -> AttentionLSTM | TransformerDecoder:
    """The decoder that the config names, for annotation vectors of size `channels`."""
    if config.decoder not in DECODERS:
        raise ValueError(f"no decoder {config.decoder!r}; choose one of {', '.join(DECODERS)}")
    shared: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            "vocabulary_size",
            "attention",
            "hidden_size",
            "attention_size",
            "dropout",
            "tie_embeddings",
            "heads",
            "hard_inference",
        )
    }
    if config.decoder == "transformer":
        return TransformerDecoder(channels=channels, layers=config.layers, **shared)
    return AttentionLSTM(channels=channels, embedding_size=config.embedding_size, **shared)
