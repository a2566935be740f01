"""Show, Attend and Tell: the encoder and the decoder in one module."""

from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.network.decoder import AttentionLSTM, TeacherForced
from captioner.network.encoder import Encoder
from captioner.network.transformer import AnnotationTransformer, TransformerDecoder

DECODERS: dict[str, type[AttentionLSTM] | type[TransformerDecoder]] = {
    "lstm": AttentionLSTM,
    "transformer": TransformerDecoder,
}


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
        if config.decoder not in DECODERS:
            raise ValueError(f"no decoder {config.decoder!r}; choose one of {', '.join(DECODERS)}")
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
        self.decoder = DECODERS[config.decoder](config, channels)

    def annotate(self, images: Tensor) -> Tensor:
        """The annotation vectors that the decoder reads, (batch, regions, annotation_size).

        Args:
            images: (batch, 3, height, width), or what `self.encoder` gave for them, (batch, regions, channels), so
                that a frozen encoder reads an image only once.
        """
        return self.refine(self.project(self.encoder(images) if images.dim() == 4 else images))

    def forward(
        self, images: Tensor, captions: Tensor, inputs: Tensor | None = None, drawn: Tensor | None = None
    ) -> TeacherForced:
        """Captions under teacher forcing.

        Args:
            images: (batch, 3, height, width) or encoder features (batch, regions, channels).
            captions: (batch, rows, length) ids, several captions per image; see `AttentionLSTM.forward`.
            inputs: the same shape, read in their place.
            drawn: regions that attention drew earlier, to be used again; see `AttentionLSTM.forward`.
        """
        return self.decoder(self.annotate(images), captions, inputs=inputs, drawn=drawn)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device
