"""What the comparison of `compare` found: tables, a plot of the scores, and one word's map under every kind."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from captioner.api import Captioner
from captioner.heatmap import figure

from .scorers import NEED_JAVA

SCORES = ("BLEU-4", "METEOR", "CIDEr")
# What is measured of the maps, in the order of the second table.
MAPS = (
    "pointing hits",
    "pointing weight",
    "attention deletion",
    "evidence deletion",
    "attention insertion",
    "evidence insertion",
    "attention, evidence",
    "attention, input gradient",
)

Row = Mapping[str, Any]


def summary(kind: str, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean and the standard deviation ("spread") over the seeds of each figure that all results have."""
    row: dict[str, Any] = {"kind": kind, "seeds": len(results)}
    for name in (name for name in results[0] if all(name in result for result in results)):
        values = [result[name] for result in results]
        row[name] = float(np.mean(values))
        row[f"{name} spread"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return row


def markdown(rows: Sequence[Row], maps: Sequence[Row] = ()) -> str:
    """The tables; figures as mean ± standard deviation over the seeds.

    Of several data sets, first the means over them.

    Args:
        rows: a summary of each kind.
        maps: of the kinds whose maps were measured, a summary of the runs in which they were; a table of its own.
    """
    of_sets = [name for name in rows[0] if name.endswith(tuple(f" {score}" for score in SCORES))]
    scores = [
        ["attention", "learning rate", "dropout", "parameters", "epochs", "s an epoch", *SCORES, *of_sets, "entropy"],
        *(
            [
                f"`{row['kind']}`",
                f"{row['learning_rate']:g}",
                f"{row['dropout']:g}",
                f"{row['parameters'] / 1e6:.2f} M",
                f"{row['epochs']:.0f}",
                f"{row['seconds an epoch']:.0f}",
                *(cell(row, name) for name in (*SCORES, *of_sets)),
                cell(row, "entropy", 2),
            ]
            for row in rows
        ),
    ]
    if not maps:
        return table(scores)
    figures = [[f"`{row['kind']}`", str(row["seeds"]), *(cell(row, name, 2) for name in MAPS)] for row in maps]
    return f"{table(scores)}\n\n{table([['maps', 'seeds', *MAPS], *figures])}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown from a header and rows."""
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" + "|--:" * (len(lines[0]) - 1) + "|", *rows])


def cell(row: Row, name: str, digits: int = 1) -> str:
    """One figure as text, with its spread over the seeds."""
    if math.isnan(row[name]):
        return "left out" if name.rpartition(" ")[2] in NEED_JAVA else "-"
    spread = f" ± {row[f'{name} spread']:.{digits}f}" if row["seeds"] > 1 else ""
    return f"{row[name]:.{digits}f}{spread}"


def draw_scores(rows: Sequence[Row], path: Path) -> None:
    """Draw the scores of every kind as bars, with their standard deviation."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(11, 3.6), layout="constrained")
    kinds = [row["kind"] for row in rows]
    for axes, name in zip(plot.subplots(1, len(SCORES)), SCORES, strict=True):
        values = [row[name] for row in rows]
        axes.barh(kinds, values, xerr=[row[f"{name} spread"] for row in rows], color="#4c72b0")
        axes.invert_yaxis()
        axes.set_title(f"{name} on dev")
        known = [value for value in values if not math.isnan(value)]
        if known:
            axes.set_xlim(0.85 * min(known), 1.05 * max(known))
    plot.savefig(path, format="png", dpi=110)


def same_word(photo: Image.Image, sentence: str, word: str, models: Mapping[str, Captioner]) -> Image.Image:
    """One photograph with the map of each kind for one word, under teacher forcing with the same sentence.

    Args:
        photo: the photograph.
        sentence, word: the caption that all read, and the word in it whose maps are drawn.
        models: by the title of their map; all have the same encoder.
    """
    captions = [captioner.teacher_forced(photo, sentence) for captioner in models.values()]
    maps = np.stack([caption.attention[caption.index(word)] for caption in captions])
    # Each map has its own scale: hard attention's one weight of 1 would leave the others in the dark.
    return figure(
        photo,
        list(models),
        maps,
        scale="word",
        columns=math.ceil((len(models) + 1) / 2),
        displacement=captions[0].displacement,
    )
