"""The best model of a run, in the run folder."""

import dataclasses
import logging
from typing import Any

from torch import Tensor

from captioner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.engine import Graphs
from captioner.images import Preprocessing
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import Vocabulary

from .config import TrainConfig

log = logging.getLogger("training")


class BestModel:
    """The best model of a run, saved as `Captioner.from_pretrained` loads it.

    Args:
        config: the options, which are saved with the model.
        vocabulary, preprocessing: the model's.
    """

    def __init__(self, config: TrainConfig, vocabulary: Vocabulary, preprocessing: Preprocessing) -> None:
        self.config, self.vocabulary, self.preprocessing = config, vocabulary, preprocessing
        self.graphs: Graphs | None = None
        self.exported = False

    def save(self, model: ShowAttendTell, row: dict[str, Any]) -> None:
        """Replace the saved model. Raises what `save_checkpoint` raises; the previous model is kept then.

        Args:
            model: the network.
            row: its figures on the dev images, which are saved with it.
        """
        if self.config.export and not self.exported:
            self.graphs, self.exported = export(model, self.preprocessing), True
        about = {"training": dataclasses.asdict(self.config), "dev": row}
        save_checkpoint(self.config.output, Checkpoint(model, self.vocabulary, self.preprocessing, about, self.graphs))

    def weights(self) -> dict[str, Tensor]:
        """The weights of the saved model."""
        return load_checkpoint(self.config.output).model.state_dict()


def export(model: ShowAttendTell, preprocessing: Preprocessing) -> Graphs | None:
    """The network for ONNX Runtime, the same for all models of a run; None where it cannot be exported."""
    try:
        from captioner.network.export import export_graphs

        return export_graphs(model.config, preprocessing.size)
    except Exception as error:  # the exporter raises many kinds, and none is worth the run
        log.warning("models are kept without graphs for ONNX Runtime: %s", error)
        return None
