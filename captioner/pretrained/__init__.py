"""The models in the package. Each folder here with a `model.safetensors` is one; its name is that of the folder."""

import dataclasses
import json
from pathlib import Path

from captioner.modelfile import MODEL_FILE, read_metadata

DEFAULT_MODEL = "base"
PRETRAINED = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model in the package.

    Attributes:
        name: the name to give to `Captioner.from_pretrained`.
        folder: the folder of its files. `MODEL_CARD.md` there describes its uses and limits.
        megabytes: size of its files on disk, in units of 10^6 bytes.
        encoder: the name of its encoder in torchvision.
        image_size: height and width in pixels to which images are resized.
        trained_on: its training data and their terms, in one line.
        scores: by data set and metric, as `scores["coco dev"]["CIDEr"]`; fractions, where papers print them times 100.
    """

    name: str
    folder: Path
    megabytes: float
    encoder: str
    image_size: tuple[int, int]
    trained_on: str
    scores: dict[str, dict[str, float]]


def list_models() -> list[ModelInfo]:
    """The models in the package, the default first. Only the headers of their files are read; torch is not needed."""
    return [read_info(name, folder) for name, folder in model_folders().items()]


def model_folders() -> dict[str, Path]:
    """The folder of each model in the package by its name, the default first."""
    folders = [weights.parent for weights in PRETRAINED.glob(f"*/{MODEL_FILE}")]
    return {folder.name: folder for folder in sorted(folders, key=lambda each: (each.name != DEFAULT_MODEL, each.name))}


def read_info(name: str, folder: Path) -> ModelInfo:
    """Read the description of a model in the header of its file."""
    metadata = read_metadata(folder / MODEL_FILE)
    about = json.loads(metadata["about"])
    height, width = json.loads(metadata["preprocessing"])["size"]
    return ModelInfo(
        name=name,
        folder=folder,
        megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        encoder=json.loads(metadata["model"])["encoder"],
        image_size=(height, width),
        trained_on=about.get("trained_on", ""),
        scores={key: entry["scores"] for key, entry in about.items() if isinstance(entry, dict) and "scores" in entry},
    )
