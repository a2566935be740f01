"""Train a captioner: `python -m training.train --data flickr8k=data/flickr8k --output runs/flickr8k`.

The same command under `torchrun --nproc-per-node N -m training.train ...` trains on N GPUs.
"""

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Sequence

import torch

from captioner.api import find_model
from captioner.checkpoint import CheckpointError, load_checkpoint
from captioner.config import ModelConfig
from captioner.images import Preprocessing
from captioner.network.attention import parse_options
from captioner.network.encoder import normalisation
from captioner.network.model import ShowAttendTell
from captioner.vocabulary import Vocabulary

from .config import TrainConfig, data_weights, parse_arguments
from .data.features import unreadable
from .data.items import CaptionedImage, DatasetError
from .data.sources import read_sources
from .distributed import Distributed, distributed
from .interruption import Interrupted
from .stages import plan
from .state import TrainingError
from .trainer import Trainer
from .words import tokenize

log = logging.getLogger("training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0 done, 1 failed, 2 wrong usage, 130 stopped by a signal."""
    config = parse_arguments(arguments)
    # Of several processes one logs.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(level)
    try:
        with distributed(config.device) as processes:
            train(config, processes)
    except Interrupted:
        log.error("stopped; run the same command with --resume to go on from here")
        return 130
    except (TrainingError, DatasetError, CheckpointError, ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def train(config: TrainConfig, processes: Distributed) -> float:
    """Train with the given options and save the best model in the output folder. Returns that model's dev score.

    Raises:
        TrainingError: the run cannot be resumed, the loss is not finite, or the disk is full.
        Interrupted: SIGINT or SIGTERM came; the state has been saved first.
        DatasetError, CheckpointError, ValueError, OSError: an input cannot be used.
    """
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    parse_options(config.attention, config.attention_options)  # an unknown one is refused before any image is read
    train_items, dev_items = load_items(config, processes)
    if config.start_from:
        start = load_checkpoint(find_model(config.start_from))
        vocabulary = start.vocabulary
        preprocessing = dataclasses.replace(start.preprocessing, size=(config.image_size, config.image_size))
        model = with_grid(start.model, config.grid)
    else:
        vocabulary = Vocabulary.build(
            (tokenize(caption) for item in train_items for caption in item.captions), config.minimum_count
        )
        preprocessing = build_preprocessing(config)
        model = build_model(config, len(vocabulary))
    warn_of_small_data(train_items, vocabulary, config)
    prepare_model(model, config, processes.device)
    log.info(
        "%d training images, %d dev images, %d words, %.1f million weights, %d process(es) on %s",
        len(train_items),
        len(dev_items),
        len(vocabulary),
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        processes.size,
        processes.device,
    )
    stages = plan(config, model, vocabulary, preprocessing, train_items, dev_items, processes)
    trainer = Trainer(config, model, vocabulary, preprocessing, train_items, dev_items, stages, processes)
    try:
        best = trainer.run()
    except OSError as error:
        raise TrainingError(
            f"cannot save the run in {config.output}: {error.strerror or error}; "
            "what was saved before is whole, so free some space and run again with --resume"
        ) from error
    log.info("best %s on dev: %.1f; the model is in %s", config.monitor, 100 * best, config.output)
    return best


def load_items(config: TrainConfig, processes: Distributed) -> tuple[list[CaptionedImage], list[CaptionedImage]]:
    """The training and dev items whose images are readable; the others are logged and counted."""
    datasets = read_sources(config.data, config.cache, processes)
    if unknown := data_weights(config).keys() - {dataset.name for dataset in datasets}:
        raise DatasetError(f"data_weight names {', '.join(sorted(unknown))}, which is no data set of this run")
    splits = {}
    problems = [problem for dataset in datasets for problem in dataset.problems]
    for split in ("train", "dev"):
        items = [item for dataset in datasets for item in dataset.splits.get(split, ())]
        parts = processes.gather(unreadable(items[processes.rank :: processes.size], processes.quiet))
        damaged = {key: reason for part in parts for key, reason in part.items()}
        splits[split] = [item for item in items if item.key not in damaged] if damaged else items
        problems += damaged.values()
        if not splits[split]:
            of_sets = ", ".join(f"{dataset.name} ({dataset.layout})" for dataset in datasets)
            raise DatasetError(f"there is no usable image in the {split} split of {of_sets}")
    for problem in problems[:20]:
        log.warning("skipped: %s", problem)
    if len(problems) > 20:
        log.warning("... and %d more; %d skipped in all", len(problems) - 20, len(problems))
    return splits["train"], splits["dev"]


def warn_of_small_data(items: Sequence[CaptionedImage], vocabulary: Vocabulary, config: TrainConfig) -> None:
    """Warn where many words of the training captions are not in the vocabulary, or an epoch has only a few steps.

    Raises:
        DatasetError: not one of the words is in the vocabulary.
    """
    words = [word for item in items for caption in item.captions for word in tokenize(caption)]
    unknown = [word for word in words if word not in vocabulary]
    if config.start_from:
        remedy = f"the vocabulary stays that of {config.start_from}; without --start-from a new one is made"
    else:
        remedy = f"only words that occur {config.minimum_count} times are kept; --minimum-count 1 keeps all"
    if len(unknown) == len(words):
        raise DatasetError(f"none of the {len(set(words))} words in the training captions is known: {remedy}")
    if len(unknown) > len(words) / 10:
        log.warning(
            "%.0f%% of the words in the training captions (%d of %d different ones) become <unk>: %s",
            100 * len(unknown) / len(words),
            len(set(unknown)),
            len(set(words)),
            remedy,
        )
    if (steps := math.ceil(len(items) / config.batch_size)) < 10:
        log.warning(
            "%d training images are %d step(s) an epoch; with so few, a smaller --batch-size and more --epochs and "
            "--patience are needed",
            len(items),
            steps,
        )


def build_preprocessing(config: TrainConfig) -> Preprocessing:
    """The preprocessing that the encoder's weights were trained with, at the configured size."""
    mean, std = normalisation(config.encoder, config.encoder_weights or None)
    return Preprocessing((config.image_size, config.image_size), mean, std)


def build_model(config: TrainConfig, vocabulary_size: int) -> ShowAttendTell:
    """A new model of the configured sizes, its encoder pretrained."""
    return ShowAttendTell(
        ModelConfig(
            vocabulary_size=vocabulary_size,
            encoder=config.encoder,
            node=config.node,
            grid=(config.grid, config.grid),
            decoder=config.decoder,
            attention=config.attention,
            attention_options=parse_options(config.attention, config.attention_options),
            encoder_self_attention=config.encoder_self_attention,
            heads=config.heads,
            layers=config.layers,
            annotation_size=config.annotation_size,
            attention_size=config.attention_size,
            embedding_size=config.embedding_size,
            hidden_size=config.hidden_size,
            dropout=config.dropout,
            tie_embeddings=config.tie_embeddings,
        ),
        config.encoder_weights or None,
    )


def with_grid(model: ShowAttendTell, grid: int) -> ShowAttendTell:
    """The model with another number of regions. Raises ValueError if it has weights for each region."""
    other = ShowAttendTell(dataclasses.replace(model.config, grid=(grid, grid)))
    try:
        other.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"a model of {model.config.grid} regions cannot go on with a grid of {grid}: {error}"
        ) from error
    return other


def prepare_model(model: ShowAttendTell, config: TrainConfig, device: torch.device) -> None:
    """Set the model's device, precision and dropout for training."""
    model.to(device)
    on_gpu = device.type == "cuda"
    if config.precision == "bfloat16" or (config.precision == "auto" and on_gpu):
        model.encoder.autocast_dtype = torch.bfloat16
    if config.compile:
        model.encoder.compile()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = config.dropout


if __name__ == "__main__":
    sys.exit(main())
