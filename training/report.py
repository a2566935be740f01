"""The report of an evaluation as an HTML page: photographs, captions, references and heatmaps, worst and best first."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from captioner.captions import Caption
from captioner.files import replacing
from captioner.heatmap import shrink

from .data.items import CaptionedImage
from .evaluation import PREVIEW, Evaluation
from .metrics import Calibration

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th { white-space: nowrap }
td, th { border: 1px solid #8886; padding: .2rem .6rem; text-align: right }
article { border-top: 1px solid #8886; padding: 1rem 0 }
h3 { font-size: 1.3rem; margin: 0 }
img { max-width: 100%; height: auto; border-radius: 4px }
ul { margin: .3rem 0 }
.scores { opacity: .75 }
"""


def write_report(
    path: Path,
    title: str,
    table: str,
    evaluations: Mapping[str, tuple[Evaluation, Sequence[CaptionedImage]]],
    most: int = 50,
) -> None:
    """Write an HTML page that needs no other file and no network.

    Args:
        path: the page's file.
        title: its heading.
        table: the figures, as a Markdown table.
        evaluations: for each data set by its name, the captions and scores to show, all of one beam size, and the
            images with their references.
        most: images shown in each of a data set's two sections, the worst and the best by CIDEr.
    """
    scores = [evaluation.scores for evaluation, _ in evaluations.values()]
    reasons = {metric: why for of_set in scores for metric, why in of_set.left_out.items()}
    left_out = "".join(f"<p>{html.escape(metric)} left out: {html.escape(why)}</p>" for metric, why in reasons.items())
    beam_size = next(evaluation.beam_size for evaluation, _ in evaluations.values())
    contents = " · ".join(
        f'{html.escape(name)}: <a href="#worst-{number}">the worst</a>, <a href="#best-{number}">the best</a>'
        for number, name in enumerate(evaluations)
    )
    sections = "".join(
        section(name, number, evaluation, items, most)
        for number, (name, (evaluation, items)) in enumerate(evaluations.items())
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{html_table(table)}
{left_out}
<p>Below: beam {beam_size}, ranked by each caption's own CIDEr. {contents}</p>
{sections}</body></html>
"""
    with replacing(path) as temporary:
        temporary.write_text(page, "utf-8")


def section(name: str, number: int, evaluation: Evaluation, items: Sequence[CaptionedImage], most: int) -> str:
    """One data set: the calibration of the confidence, then the worst and the best captions."""
    scores = evaluation.scores.per_image
    shown = [item for item in items if item.key in evaluation.captions]
    ranked = sorted(shown, key=lambda item: scores[item.key]["CIDEr"])
    parts = [calibration_table(name, evaluation.calibration)]
    for kind, chosen in (("worst", ranked[:most]), ("best", ranked[::-1][:most])):
        parts.append(f'<h2 id="{kind}-{number}">{html.escape(name)}: the {len(chosen)} {kind}</h2>\n')
        parts += [entry(item, evaluation.captions[item.key], scores[item.key]) for item in chosen]
    return "".join(parts)


def calibration_table(name: str, calibration: Calibration) -> str:
    """The calibration of the model's confidence, for choosing a threshold."""
    lines = ["| confidence from | mean confidence | CIDEr | CIDEr of these and all surer ones |", "|---|---|---|---|"]
    for group in calibration.groups:
        cells = (group["confidence from"], group["mean confidence"], 100 * group["CIDEr"])
        lines.append("| {:.2f} | {:.2f} | {:.1f} | {:.1f} |".format(*cells, 100 * group["CIDEr from here on"]))
    return f"""<h2>{html.escape(name)}: confidence</h2>
<p>Captions in groups of equal number, from the least to the most confident. Spearman's correlation of a caption's
confidence with its CIDEr: {calibration.correlation:.2f}. <code>captioner --min-confidence</code> takes a threshold
from the first column; the last one says what is left.</p>
{html_table(chr(10).join(lines))}"""


def entry(item: CaptionedImage, caption: Caption, scores: dict[str, float]) -> str:
    """One photograph with its caption, scores, heatmaps and references."""
    references = "".join(f"<li>{html.escape(reference)}</li>" for reference in item.captions)
    figures = " · ".join(f"{name} {100 * value:.0f}" for name, value in scores.items() if name[:4] != "BLEU")
    picture = caption.figure(tile=PREVIEW) if caption.words else shrink(caption.image, PREVIEW)
    return f"""<article>
<h3>{html.escape(caption.sentence())}</h3>
<p class="scores">{html.escape(item.name)} · {figures} · confidence {caption.confidence:.2f}</p>
<img alt="{html.escape(str(caption) or "a photograph without a caption")}" src="{data_uri(picture)}" loading="lazy">
<ul>{references}</ul>
</article>
"""


def data_uri(picture: Image.Image) -> str:
    """A picture as a data URI of type JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def html_table(markdown: str) -> str:
    """A Markdown table in HTML."""
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + f"</tr>{rows}</table>"
