"""The notebook runs from top to bottom, and holds no output that was not run."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "training" / "notebooks" / "attention.ipynb"


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def test_no_output_is_stored(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 10
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_each_section_begins_with_a_question_and_ends_with_something_to_try(cells):
    text = "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    contents, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    titles = [section.partition("\n")[0] for section in sections]
    assert titles == re.findall(r"^(\d+\. .*\?) \*", contents, flags=re.MULTILINE)
    assert len(titles) == 11
    assert all("**Try:**" in section for section in sections)


def test_it_runs_from_top_to_bottom(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Elsewhere than in the checkout, as a person may do who has the package and the notebook alone.
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = {cell.id: cell.outputs for cell in code}
    pictures = [cell_id for cell_id, of_cell in outputs.items() if "image/png" in str(of_cell)]
    assert len(pictures) >= 10
    assert "<button" in str(outputs["self-code"])
    printed = "".join(output.get("text", "") for output in outputs["train-look"])
    right = {kind: int(share) for kind, share in re.findall(r"(\w+) +(\d+)% of the captions", printed)}
    assert right["distance"] > right["none"]
    assert right["distance"] >= 80
