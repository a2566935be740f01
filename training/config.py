"""The options of a training run: a dataclass, with a flag for each of its fields; a TOML file may set any of them."""

import argparse
import dataclasses
import math
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.config import ModelConfig
from captioner.images import Preprocessing
from captioner.network.attention import MECHANISMS
from captioner.network.model import DECODERS
from captioner.search import BEAM_SIZE, MAX_LENGTH

from . import command


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field of the config with the help text of its flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def options_of_mechanisms() -> str:
    """The options of all attention mechanisms with their defaults, for the help text."""
    described = {
        name: ", ".join(f"{option}={value}" for option, value in mechanism.option_defaults().items())
        for name, mechanism in MECHANISMS.items()
    }
    return "; ".join(f"{name}: {options}" for name, options in described.items() if options)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train a captioner. Fields are flags with dashes: `label_smoothing` is `--label-smoothing`.

    Stage one trains the decoder on features of the frozen encoder, computed once per image. Stage two continues from
    the best model of stage one and tunes the encoder too, on augmented images. Stage three rewards captions that the
    model generates for their CIDEr-D (self-critical sequence training, Rennie et al. 2017).
    """

    data: tuple[str, ...] = option(
        ("flickr8k",),
        "a data set, as NAME=FOLDER (flickr8k, flickr30k, coco; NAME alone: data/NAME), your own captions, as "
        "FILE.csv, FILE.jsonl or NAME=FILE, or WebDataset shards, as 'train-{000..127}.tar', an address, "
        "'pipe:COMMAND', or NAME= and one of these; may be given several times",
    )
    data_weight: tuple[str, ...] = option(
        (), "NAME=WEIGHT: weight of the loss on this data set's captions, 1 by default; may be given several times"
    )
    output: str = option("runs/flickr8k", "run folder; the best model is saved there, ready to be loaded")

    encoder: str = option(ModelConfig.encoder, "torchvision classification network")
    encoder_weights: str = option("DEFAULT", "torchvision weights name (downloaded) or a file")
    node: str = option(ModelConfig.node, "node of the encoder to read; empty: its last feature map")
    grid: int = option(ModelConfig.grid[0], "rows and columns of regions")
    image_size: int = option(Preprocessing.size[0], "height and width that images are resized to, in pixels")
    start_from: str = option(
        "", "folder or name of a trained model to go on from; its words and sizes are kept, except grid and image_size"
    )
    decoder: str = option(ModelConfig.decoder, "decoder", tuple(DECODERS))
    attention: str = option(ModelConfig.attention, "attention mechanism", tuple(MECHANISMS))
    attention_options: tuple[str, ...] = option(
        (), f"KEY=VALUE: an option of the mechanism ({options_of_mechanisms()}); may be given several times"
    )
    encoder_self_attention: int = option(
        ModelConfig.encoder_self_attention, "layers in which annotation vectors attend to each other"
    )
    heads: int = option(ModelConfig.heads, "heads of self-attention, in the encoder and in a transformer")
    layers: int = option(ModelConfig.layers, "layers of a transformer decoder")
    annotation_size: int = option(
        ModelConfig.annotation_size, "size of projected annotation vectors; 0: the encoder's own, as in the paper"
    )
    attention_size: int = option(ModelConfig.attention_size, "size of the keys and queries of attention")
    embedding_size: int = option(ModelConfig.embedding_size, "size of word embeddings, of an lstm")
    hidden_size: int = option(ModelConfig.hidden_size, "size of the LSTM's state, of a transformer's vectors")
    dropout: float = option(ModelConfig.dropout, "share of activations dropped in the decoder")
    tie_embeddings: bool = option(
        ModelConfig.tie_embeddings, "share one matrix between word embeddings and output layer"
    )

    minimum_count: int = option(5, "words rarer than this in the training captions become <unk>")
    max_length: int = option(MAX_LENGTH, "captions are cut after this many words")

    language: str = option("", "text file (or .gz) of captions without pictures, one a line, to be learnt first")
    language_epochs: int = option(1, "epochs on these captions, before stage one")
    epochs: int = option(10, "stage one: epochs with the encoder frozen")
    learning_rate: float = option(1e-3, "stage one: peak learning rate")
    finetune_epochs: int = option(10, "stage two: epochs that tune the encoder too")
    finetune_learning_rate: float = option(4e-4, "stage two: peak learning rate of the decoder")
    encoder_learning_rate: float = option(1e-4, "stage two: peak learning rate of the encoder")
    finetune_from: str = option("", "stage two: first block of the encoder to tune, such as features.4; empty: all")
    augment: bool = option(True, "stage two: random crops, flips (never where a caption says left or right), colours")
    crop_area: float = option(0.6, "smallest share of an image's area that a crop keeps")
    colour_change: float = option(0.2, "largest relative change of brightness, contrast and saturation in augmentation")
    views: int = option(
        0,
        "fixed views of each image, the first one the whole image and the others augmented, for which the maps below "
        "finetune_from are cached, so that an epoch computes only the tuned blocks; 0: augment anew in every epoch",
    )
    composed: float = option(
        0.0, "pictures composed of two photographs that are added to each batch, as a share of its size; at most 0.5"
    )
    pointing: float = option(
        1.0, "weight of the loss that keeps attention on the right photograph of composed pictures"
    )
    scst_epochs: int = option(0, "stage three: epochs of self-critical training on CIDEr-D")
    scst_learning_rate: float = option(1e-4, "stage three: peak learning rate of the decoder")
    scst_encoder_learning_rate: float = option(0.0, "stage three: peak learning rate of the encoder; 0: frozen")
    scst_share: float = option(
        1.0,
        "share of stage three's weights in the model that is scored and saved; the rest are those before that stage",
    )
    sharpen: float = option(
        1.0,
        "stage three begins by multiplying attention's scores by this; above 1, maps become narrower, and the best "
        "model of stage three is kept, even where that costs some of the score",
    )
    scst_search: str = option("beam", "how captions are generated in stage three", ("beam", "sample"))
    scst_samples: int = option(5, "captions generated for each image in stage three")
    scst_baseline: str = option(
        "others",
        "baseline of a caption's reward: the image's other captions, or greedy search",
        ("others", "greedy"),
    )
    batch_size: int = option(32, "images in a batch, over all processes; each comes with all its captions")
    accumulate: int = option(
        1, "parts that a batch is computed in, one after the other, for less memory; the loss is that of the batch"
    )
    warmup_steps: int = option(200, "steps over which each stage's learning rate rises to its peak")
    final_rate: float = option(0.05, "share of the peak that the cosine ends each stage with")
    weight_decay: float = option(0.01, "AdamW's weight decay, on matrices and kernels only")
    clip_norm: float = option(5.0, "gradients are scaled down to this norm")
    scheduled_sampling: float = option(
        0.0, "share of input words that are the model's own at the end of stages one and two"
    )
    label_smoothing: float = option(0.1, "probability spread over all words in the targets")
    doubly_stochastic: float = option(0.005, "weight of the doubly stochastic attention term, lambda in the paper")
    attention_entropy: float = option(
        1.0,
        "stage two: bound on the mean entropy of attention over a caption, as a share of its maximum, that makes maps "
        "narrower; it falls from 1 to this in the first half of the epochs",
    )
    ema_decay: float = option(
        0.998, "decay of the moving average of the weights; the averaged model is scored and saved"
    )

    monitor: str = option("CIDEr", "score of the dev captions that selects the best model", ("CIDEr", "BLEU-4"))
    monitor_beam: int = option(BEAM_SIZE, "beam size for these captions; all else is as in Captioner.caption")
    patience: int = option(5, "a stage ends after this many epochs without a better score")

    seed: int = option(0, "seed of the initial weights, the order of the images, dropout and augmentation")
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto: a GPU if there is one")
    precision: str = option(
        "auto", "floating-point type in training; auto: bfloat16 on GPUs", ("auto", "float32", "bfloat16")
    )
    export: bool = option(True, "keep models with the graphs that ONNX Runtime captions with, where onnx is installed")
    compile: bool = option(False, "compile the encoder with torch.compile, for long runs")
    workers: int = option(2, "processes that load images in stage two; 0: none")
    checkpoint_every: int = option(500, "steps between checkpoints within an epoch; one follows every epoch")
    cache: str = option("", "folder for cached features and shards; empty: captioner/ in the user's cache folder")
    resume: bool = option(False, "continue from the last checkpoint in the run folder, if there is one")


def parse_arguments(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The options given by flags and by `--config FILE.toml`; flags take precedence over the file.

    Exits with status 2 and a message if a flag, a key of the file or a value is not valid.
    """
    parser = argparse.ArgumentParser(
        prog=command("train"),
        description="Train a captioner.",
        epilog=f"Example: {command('train')} --data flickr8k=data/flickr8k --output runs/flickr8k",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="options from a TOML file")
    types = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind: dict[str, Any] = {"type": types[field.name], "choices": field.metadata["choices"]}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif types[field.name] == tuple[str, ...]:
            kind = {"action": ReplaceThenAppend, "metavar": field.name.upper()}
        elif not field.metadata["choices"]:
            kind["metavar"] = types[field.name].__name__.upper()
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", default=field.default, help=field.metadata["help"], **kind
        )

    path = parser.parse_known_args(arguments)[0].config
    if path:
        try:
            parser.set_defaults(**read_toml(Path(path), types))
        except (OSError, ValueError) as error:
            parser.error(f"--config {path}: {error}")
    options = vars(parser.parse_args(arguments))
    config = TrainConfig(**{field.name: options[field.name] for field in dataclasses.fields(TrainConfig)})
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    """Add the `--data` of training to another command line."""
    (field,) = (field for field in dataclasses.fields(TrainConfig) if field.name == "data")
    parser.add_argument(
        "--data", action=ReplaceThenAppend, metavar="DATA", default=field.default, help=field.metadata["help"]
    )


class ReplaceThenAppend(argparse.Action):
    """Collects the values of a flag that may be repeated; the first value replaces the default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Add one value."""
        given = namespace.__dict__.setdefault("_given", {})
        given[self.dest] = (*given.get(self.dest, ()), values)
        setattr(namespace, self.dest, given[self.dest])


def read_toml(path: Path, types: dict[str, type]) -> dict[str, Any]:
    """The options in a TOML file. Raises ValueError for a key that is no option or a value of another type."""
    options = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text("utf-8")).items()}
    for key, value in options.items():
        if key not in types:
            raise ValueError(f"no option {key!r}")
        if types[key] is float and type(value) is int:
            options[key] = float(value)
        elif types[key] == tuple[str, ...]:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{key} should be a list of strings, not {value!r}")
            options[key] = tuple(value)
        elif type(value) is not types[key]:
            raise ValueError(f"{key} should be a {types[key].__name__}, not {value!r}")
    return options


def data_weights(config: TrainConfig) -> dict[str, float]:
    """The weight of each data set that has one. Raises ValueError where a weight is not a positive number."""
    weights = {}
    for text in config.data_weight:
        name, _, weight = text.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = math.nan
        if not name or not 0 < weights[name] < math.inf:
            raise ValueError(f"data_weight should be NAME=WEIGHT with a weight above 0, not {text!r}")
    return weights


def check(config: TrainConfig) -> None:
    """Raise ValueError for the first option whose value is not valid."""
    data_weights(config)
    for name in (
        "batch_size",
        "accumulate",
        "minimum_count",
        "max_length",
        "grid",
        "image_size",
        "monitor_beam",
        "patience",
        "checkpoint_every",
        "heads",
        "layers",
        "scst_samples",
    ):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    for name in (
        "epochs",
        "finetune_epochs",
        "scst_epochs",
        "language_epochs",
        "views",
        "pointing",
        "warmup_steps",
        "workers",
        "annotation_size",
        "encoder_self_attention",
    ):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} cannot be negative, but is {getattr(config, name)}")
    for name in ("dropout", "label_smoothing", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(config, name)}")
    for name in ("scheduled_sampling", "colour_change", "attention_entropy"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {getattr(config, name)}")
    if not 0 < config.sharpen < math.inf:
        raise ValueError(f"sharpen must be above 0 and finite, not {config.sharpen}")
    if not 0 < config.scst_share <= 1:
        raise ValueError(f"scst_share must be above 0 and at most 1, not {config.scst_share}")
    if not 0 <= config.composed <= 0.5:
        raise ValueError(f"composed must be from 0 to 0.5, not {config.composed}")
    if config.views and not config.finetune_from:
        raise ValueError("views are cached below the first tuned block; name it with finetune_from")
    if not 0 < config.crop_area <= 1:
        raise ValueError(f"crop_area must be above 0 and at most 1, not {config.crop_area}")
    if config.scst_baseline == "others" and config.scst_epochs and config.scst_samples < 2:
        raise ValueError("scst_samples must be at least 2 for scst_baseline others")
