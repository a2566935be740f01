"""The record of a run: `history.csv`, `curves.png`, and events for TensorBoard."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from captioner.files import replacing


class History:
    """Writes the record of a run into its folder.

    Args:
        folder: the run folder; it is created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps = 0
        self._writer: Any = None

    @property
    def writer(self) -> Any:
        """TensorBoard's writer, created at the first use, so that it drops the events after the resumed step."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.steps or None)
        return self._writer

    def step(self, loss: float, learning_rate: float) -> None:
        """Record one training step."""
        self.writer.add_scalar("train/loss", loss, self.steps)
        self.writer.add_scalar("train/learning_rate", learning_rate, self.steps)
        self.steps += 1

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        """Record an epoch.

        Args:
            rows: the figures of all epochs so far, those of this epoch last.
        """
        text = io.StringIO()
        table = csv.DictWriter(text, list(rows[-1]))
        table.writeheader()
        table.writerows(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "history.csv") as path:
            path.write_text(text.getvalue(), "utf-8")
        for name, value in rows[-1].items():
            if isinstance(value, float):
                self.writer.add_scalar(f"dev/{name}", value, self.steps)
        self.plot(rows)

    def plot(self, rows: list[dict[str, Any]]) -> None:
        """Draw training loss and dev scores over the epochs."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        losses, scores = figure.subplots(1, 2)
        epochs = range(1, len(rows) + 1)
        # The model that a run starts from has scores, but no loss.
        losses.plot(epochs, [row["loss"] or math.nan for row in rows], marker=".")
        losses.set(title="training loss", xlabel="epoch")
        for name in ("BLEU-4", "CIDEr"):
            scores.plot(epochs, [100 * row[name] for row in rows], marker=".", label=name)
        scores.set(title="dev scores (x 100)", xlabel="epoch")
        scores.legend()
        for number, row in enumerate(rows[1:], start=1):
            if row["stage"] != rows[number - 1]["stage"]:
                for axes in (losses, scores):
                    axes.axvline(number + 0.5, color="grey", linestyle=":")
        with replacing(self.folder / "curves.png") as path:
            figure.savefig(path, format="png", dpi=110)

    def close(self) -> None:
        """Flush the events that TensorBoard has not written yet."""
        if self._writer is not None:
            self._writer.close()
