"""Show, Attend and Tell: the encoder, the decoder, and what describes them."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.decoder import AttentionLSTM, TeacherForced
from captioner.encoder import Encoder


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build the network again, as plain data.

    encoder, node, grid: see `captioner.encoder.Encoder`.
    attention: name of the attention mechanism.
    annotation_size: size of the annotation vectors that the decoder reads, a learnt projection of the encoder's
        channels; 0 to read these as they are, as the paper does.
    dropout: share dropped of projected annotation vectors, word embeddings and the output layer's input.
    """

    vocabulary_size: int
    encoder: str = "mobilenet_v2"
    node: str = ""
    grid: tuple[int, int] = (7, 7)
    attention: str = "additive"
    annotation_size: int = 512
    attention_size: int = 512
    embedding_size: int = 512
    hidden_size: int = 512
    dropout: float = 0.5
    tie_embeddings: bool = False


class ShowAttendTell(nn.Module):
    """A CNN that gives annotation vectors and an LSTM that attends over them while it writes (Xu et al. 2015).

    Args:
        config: the sizes and names.
        encoder_weights: for a new model to be trained: a torchvision weights name or a file; see `Encoder`.
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
        self.decoder = AttentionLSTM(
            config.vocabulary_size,
            channels,
            config.attention,
            config.embedding_size,
            config.hidden_size,
            config.attention_size,
            config.dropout,
            config.tie_embeddings,
        )

    def annotate(self, images: Tensor) -> Tensor:
        """The annotation vectors the decoder reads, (batch, regions, annotation_size).

        Args:
            images: (batch, 3, height, width), or what `self.encoder` gave for them, (batch, regions, channels):
                a frozen encoder needs to see an image only once.
        """
        return self.project(self.encoder(images) if images.dim() == 4 else images)

    def forward(self, images: Tensor, captions: Tensor) -> TeacherForced:
        """Captions under teacher forcing.

        Args:
            images: (batch, 3, height, width) or encoder features (batch, regions, channels).
            captions: (batch, rows, length) ids, several captions an image; see `AttentionLSTM.forward`.
        """
        return self.decoder(self.annotate(images), captions)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
