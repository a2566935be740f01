"""The stages of a run, and the images that each is trained on."""

import dataclasses
import gzip
from collections.abc import Sequence
from pathlib import Path

from captioner.images import Preprocessing
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import Vocabulary

from .config import TrainConfig
from .data.batches import encode_captions
from .data.features import cache_folder, cached_maps
from .data.images import BlankSource, FeatureSource, ImageSource, MapSource, Source
from .data.items import CaptionedImage, DatasetError
from .distributed import Distributed


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stretch of training with its own learning rates.

    name: in the history and in messages.
    epochs: at most; a stage ends earlier if the dev score no longer improves.
    learning_rate, encoder_learning_rate: peak learning rates of the decoder and of the encoder.
    train_from: first block of the encoder that is tuned, "" for all of it, None for none.
    train, dev: give the images.
    sharpen: factor that the scores of the decoder's attention are multiplied by before the first step.
    share: share of this stage's weights in the model that is scored and saved; the rest are those before the stage.
    entropy_bound: what the mean entropy of attention over a caption is kept below, as a share of its maximum. It falls
        from 1 to this in the first half of the epochs, so that the best model is one with narrow maps.
    self_critical: whether the objective is self-critical instead of imitation.
    captions: ids of captions that replace those of the training images; see `encode_captions`.
    """

    name: str
    epochs: int
    learning_rate: float
    encoder_learning_rate: float
    train_from: str | None
    train: Source
    dev: Source
    sharpen: float = 1.0
    share: float = 1.0
    entropy_bound: float = 1.0
    self_critical: bool = False
    captions: Sequence[Sequence[Sequence[int]]] | None = None


def plan(
    config: TrainConfig,
    model: ShowAttendTell,
    vocabulary: Vocabulary,
    preprocessing: Preprocessing,
    train_items: Sequence[CaptionedImage],
    dev_items: Sequence[CaptionedImage],
    processes: Distributed,
) -> list[Stage]:
    """The stages that the config asks for. The outputs of the frozen part of the encoder are cached first.

    Raises:
        DatasetError: the captions of the language stage cannot be read.
        OSError: the disk has no space for the cache.
        ValueError: the encoder has no block of the name in `finetune_from`.
    """
    cache = cache_folder(config.cache)
    plain, plain_dev = (ImageSource(items, preprocessing, augment=False) for items in (train_items, dev_items))
    augmented = ImageSource(
        train_items, preprocessing, config.augment, config.seed, config.crop_area, config.colour_change
    )
    frozen: tuple[Source, Source] = (plain, plain_dev)
    photographs: tuple[Source, Source] = (augmented, plain_dev)
    # As long as nothing has tuned the encoder, its features can be computed once.
    tuned = bool(config.finetune_epochs or config.scst_encoder_learning_rate)
    if config.views:
        model.encoder.split(config.finetune_from)
        views = [(plain, 0)] + [(augmented, view) for view in range(1, config.views)]
        maps = [
            cached_maps(model.encoder, source, cache, processes, view, below=True)
            for source, view in [*views, (plain_dev, 0)]
        ]
        photographs = frozen = (MapSource(maps[:-1]), MapSource(maps[-1:]))
    elif config.epochs > 0 or (config.scst_epochs > 0 and not tuned):
        train_features, dev_features = (
            cached_maps(model.encoder, source, cache, processes) for source in (plain, plain_dev)
        )
        frozen = (FeatureSource(train_features), FeatureSource(dev_features))

    stages = []
    if config.language and config.language_epochs > 0:
        captions = language_captions(Path(config.language), vocabulary, config.max_length)
        blank = BlankSource(model.encoder.channels)
        stages.append(
            Stage(
                "language", config.language_epochs, config.learning_rate, 0.0, None, blank, frozen[1], captions=captions
            )
        )
    if config.epochs > 0:
        stages.append(Stage("frozen encoder", config.epochs, config.learning_rate, 0.0, None, *frozen))
    if config.finetune_epochs > 0:
        stages.append(
            Stage(
                "fine-tuning",
                config.finetune_epochs,
                config.finetune_learning_rate,
                config.encoder_learning_rate,
                config.finetune_from,
                *photographs,
                entropy_bound=config.attention_entropy,
            )
        )
    if config.scst_epochs > 0:
        train, dev = photographs if tuned else frozen
        stages.append(
            Stage(
                "self-critical",
                config.scst_epochs,
                config.scst_learning_rate,
                config.scst_encoder_learning_rate,
                config.finetune_from if config.scst_encoder_learning_rate else None,
                train,
                dev,
                sharpen=config.sharpen,
                share=config.scst_share,
                self_critical=True,
            )
        )
    return stages


def language_captions(path: Path, vocabulary: Vocabulary, max_length: int) -> list[list[list[int]]]:
    """Ids of the captions in a text file with one on each line, perhaps compressed by gzip, in groups of five.

    Raises:
        DatasetError: the file cannot be read or has no caption.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the captions in {path}: {error}") from error
    if not lines:
        raise DatasetError(f"{path} holds no caption")
    groups = [CaptionedImage(path, tuple(lines[first : first + 5])) for first in range(0, len(lines), 5)]
    return [encode_captions(group, vocabulary, max_length) for group in groups]
