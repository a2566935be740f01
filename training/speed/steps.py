"""The speed of steps of training, and of searches in torch."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from captioner.config import ModelConfig
from captioner.network.decoder import AttentionLSTM
from captioner.network.model import ShowAttendTell
from captioner.search import beam_search
from captioner.vocabulary import END, PAD, SPECIAL, START, Vocabulary

from ..config import TrainConfig, parse_arguments
from ..data.batches import Batch
from ..data.images import BlankSource
from ..data.items import CaptionedImage
from ..losses import caption_loss
from ..objectives import Imitation, Objective
from ..optimisation import build_optimiser
from ..self_critical import SelfCritical
from ..stages import Stage
from ..state import Progress
from ..train import prepare_model
from .captioning import Subject, search
from .measure import Figure, Skipped, operations, seconds, seconds_of_each
from .tutorial import check_tutorial, tutorial_beam, tutorial_loss

ROWS = 5  # captions an image
RECIPES = Path(__file__).parents[1] / "recipes"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder that tutorials train."""

    regions: int = 196
    channels: int = 2048
    vocabulary: int = 9490
    hidden: int = 512


def draw_captions(vocabulary_size: int, images: int, rows: int = ROWS) -> Tensor:
    """Captions of random words with realistic lengths, (images, rows, length) ids, the longest of an image first."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(7, 17, (images, rows), generator=generator).sort(dim=1, descending=True)[0]
    words = torch.randint(len(SPECIAL), vocabulary_size, (images, rows, 18), generator=generator)
    captions = torch.where(torch.arange(18) < lengths[..., None] + 1, words, PAD)
    captions[..., 0] = START
    return captions.scatter(2, lengths[..., None] + 1, END)


def measure_tutorial(subject: Subject) -> list[Figure]:
    """Training and search of the model in torch, over the tutorial implementation of it.

    Raises:
        RuntimeError: the tutorial implementation gives other results.
        Skipped: there is no tutorial implementation of this kind of model.
    """
    captioner, device = subject.in_torch, subject.device
    check_tutorial(captioner.model.decoder)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(subject.images, 3, *captioner.preprocessing.size, generator=generator).to(device)
    captions = draw_captions(len(captioner.vocabulary), subject.images).to(device)
    return compare_searches(subject, pixels) + compare_training(subject, pixels, captions)


@torch.inference_mode()
def compare_searches(subject: Subject, pixels: Tensor) -> list[Figure]:
    """Beam search for a batch, over the tutorial's."""
    model, device = subject.in_torch.model, subject.device
    decoder = model.decoder
    decoder.remember_words()
    annotations = model.annotate(pixels)
    ours = beam_search(decoder, annotations, beam_size=5, max_length=20).words[:, 0].tolist()
    theirs = [tutorial_beam(decoder, one[None], 5, 20) for one in annotations]
    if [[word for word in row if word != PAD] for row in ours] != theirs:
        raise RuntimeError("the tutorial search gives other captions")

    def tutorial() -> None:
        for one in pixels:
            tutorial_beam(decoder, model.annotate(one[None]), 5, 20)

    own = seconds(lambda: beam_search(decoder, model.annotate(pixels), beam_size=5), subject.repeats, device)
    ratio = seconds(tutorial, 1, device) / own
    return [Figure(f"tutorial search, beam 5 / ours, {len(pixels)} images, encoder included", ratio)]


def compare_training(subject: Subject, pixels: Tensor, captions: Tensor) -> list[Figure]:
    """A training step on cached features, over the tutorial's, with the encoder and without."""
    model: ShowAttendTell = subject.in_torch.model
    decoder, device, images = cast(AttentionLSTM, model.decoder), subject.device, len(pixels)
    model.encoder.train_from(None)
    with torch.no_grad():
        features = model.encoder(pixels)
    each, flat = features.repeat_interleave(ROWS, dim=0), captions.flatten(0, 1)

    def whole() -> Tensor:
        return tutorial_loss(decoder, model.annotate(pixels.repeat_interleave(ROWS, dim=0)), flat)

    def without_encoder() -> Tensor:
        return tutorial_loss(decoder, model.annotate(each), flat)

    loss = imitation_loss(model, features, captions)
    check_equal(loss, without_encoder)
    model.train()
    actions = {"ours": lambda: loss().backward(), "tutorial": lambda: without_encoder().backward()}
    times = seconds_of_each(actions, subject.repeats, device)
    own, theirs = times["ours"], times["tutorial"]
    least = operations(actions["ours"]) / subject.rates.in_torch(torch.float32)
    with_encoder = seconds(lambda: whole().backward(), 1, device)  # it takes long
    model.zero_grad()
    model.eval()
    return [
        Figure("tutorial training step / ours, encoder frozen", with_encoder / own, None, with_encoder / least),
        Figure("tutorial training step / ours, decoder alone", theirs / own, None, theirs / least),
        Figure("images a second: training step, cached features", images / own, None, images / least),
    ]


def imitation_loss(model: nn.Module, features: Tensor, captions: Tensor) -> Callable[[], Tensor]:
    """What computes the cross-entropy of captions with this project's code."""

    def loss() -> Tensor:
        output = model(features, captions)
        return caption_loss(output, len(output.targets), captions.shape[0] * captions.shape[1], 0.0, 0.0)

    return loss


def check_equal(ours: Callable[[], Tensor], tutorial: Callable[[], Tensor]) -> None:
    """Raise RuntimeError where two losses differ; computed without gradients and in evaluation mode."""
    with torch.no_grad():
        if abs(float(ours()) - float(tutorial())) > 1e-3:
            raise RuntimeError("the tutorial training gives another loss")


def measure_decoder(subject: Subject, sizes: Sizes = Sizes()) -> list[Figure]:
    """Training steps on cached features over the tutorial's code, at the sizes that tutorials use.

    The decoder reads the encoder's channels as they are. The tutorial's batch has one caption of each image. With five,
    the time is that of one caption.
    """
    images, device = subject.images, subject.device
    torch.manual_seed(0)
    size: dict[str, Any] = {"attention_size": sizes.hidden, "embedding_size": sizes.hidden, "hidden_size": sizes.hidden}
    decoder = AttentionLSTM(ModelConfig(sizes.vocabulary, annotation_size=0, **size), sizes.channels).eval().to(device)
    features = torch.randn(images, sizes.regions, sizes.channels, device=device).relu()
    captions = draw_captions(sizes.vocabulary, images).to(device)
    numbers = torch.arange(images)
    single = captions[numbers, numbers % ROWS]  # so that their lengths are distributed as those of all
    ours = imitation_loss(decoder, features, single[:, None])
    every = imitation_loss(decoder, features, captions)

    def tutorial() -> Tensor:
        return tutorial_loss(decoder, features, single)

    check_equal(ours, tutorial)
    decoder.train()
    actions = {
        "tutorial": lambda: tutorial().backward(),
        "one caption": lambda: ours().backward(),
        "five captions": lambda: every().backward(),
    }
    times = seconds_of_each(actions, subject.repeats, device)
    theirs, rate = times["tutorial"] / images, subject.rates.in_torch(torch.float32)
    figures = []
    for name, rows, target in (("one caption", 1, 7.0), ("five captions", ROWS, 8.0)):
        of_step = images * rows
        limit = theirs / (operations(actions[name]) / rate / of_step)
        figures.append(
            Figure(
                f"training step a caption, {sizes.regions} x {sizes.channels}: tutorial / ours with {name} an image",
                theirs / (times[name] / of_step),
                target,
                limit,
            )
        )
    return figures


def measure_self_critical(subject: Subject) -> list[Figure]:
    """A self-critical step over an imitation step, on the same images, whose features are cached."""
    captioner = subject.fresh()
    config = dataclasses.replace(recipe_of(subject), scst_encoder_learning_rate=0.0)
    prepare_model(captioner.model, config, subject.device)
    with torch.no_grad():
        features = captioner.model.encoder(torch.from_numpy(subject.pixels(subject.paths)).to(subject.device))
    batch = make_batch(features, captioner.vocabulary)
    times = []
    for self_critical in (False, True):  # one after the other: each sets the network's mode
        objective = make_objective(captioner.model, captioner.vocabulary, config, batch, self_critical)
        step = training_step(objective, batch)
        times.append(seconds(step, subject.repeats, subject.device))
    imitation, own = times
    least = operations(step) / subject.rates.in_torch(captioner.model.encoder.autocast_dtype or torch.float32)
    images = subject.images
    return [
        Figure("self-critical step / imitation step, cached features", own / imitation, 3.0, least / imitation),
        Figure("images a second: self-critical step, cached features", images / own, None, images / least),
    ]


def recipe_of(subject: Subject) -> TrainConfig:
    """The options of the run that trained the model. Raises Skipped where no recipe is named as it."""
    path = subject.recipe or RECIPES / f"{subject.model}.toml"
    if not path.exists():
        raise Skipped(f"there is no recipe {path}; give one with --recipe")
    return parse_arguments(["--config", str(path)])


def make_batch(images: Tensor, vocabulary: Vocabulary) -> Batch:
    """A batch of one process with random captions."""
    captions = draw_captions(len(vocabulary), len(images))
    words, rows = int((captions[..., 1:] != PAD).sum()), captions.shape[1]
    weights = torch.ones(len(images))
    return Batch(images, captions, 1.0, words, len(images) * rows, len(images), list(range(len(images))), weights)


def make_objective(
    model: ShowAttendTell,
    vocabulary: Vocabulary,
    config: TrainConfig,
    batch: Batch,
    self_critical: bool = False,
    train_from: str | None = None,
) -> Objective:
    """The objective of a stage on one batch, in the network's mode for it."""
    model.encoder.train_from(train_from)
    blank = BlankSource(model.encoder.channels)  # the batch is here already
    rates = (config.finetune_learning_rate, config.encoder_learning_rate)
    stage = Stage("measured", 1, *rates, train_from, blank, blank, self_critical=self_critical)
    arguments = (config, stage, Progress(), model, model, vocabulary)
    if not self_critical:
        objective: Objective = Imitation(*arguments)
    else:
        texts = [tuple(" ".join(vocabulary.decode(row)) for row in rows) for rows in batch.captions.tolist()]
        objective = SelfCritical([CaptionedImage(Path(), captions) for captions in texts], *arguments)
    objective.begin_epoch()
    return objective


def training_step(objective: Objective, batch: Batch) -> Callable[[], None]:
    """A step of the trainer, without the moving average of the weights: loss, gradients, clipping and optimiser."""
    model, config = objective.model, objective.config
    optimiser = build_optimiser(model, objective.stage, config.weight_decay)

    def step() -> None:
        optimiser.zero_grad()
        objective.loss(batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()

    return step


def measure_throughput(subject: Subject) -> list[Figure]:
    """Images a second of the recipe's training steps and of captions by torch, with the share of the matrix rate.

    The share is that of the floating-point operations of matrix products and convolutions, gradients included, over the
    rate of a matrix product of the same type on the same device.
    """
    captioner, device = subject.fresh(), subject.device
    config, model = recipe_of(subject), captioner.model
    pixels, engine = subject.pixels(subject.paths), captioner.engine
    # On a GPU, convolutions of float32 are computed in shorter types too.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures = [rate_of(subject, "captions by torch", dtype, lambda: search(engine, engine.annotate(pixels)))]
    prepare_model(model, config, device)
    dtype = model.encoder.autocast_dtype or torch.float32
    on_device = torch.from_numpy(pixels).to(device)
    model.encoder.split(config.finetune_from)
    with torch.no_grad():
        maps = model.encoder.lower(on_device)
    name = f"training step that tunes the encoder from {config.finetune_from}"
    for source, images in (("cached maps", maps), ("images", on_device)):
        batch = make_batch(images, captioner.vocabulary)
        objective = make_objective(model, captioner.vocabulary, config, batch, train_from=config.finetune_from)
        figures.append(rate_of(subject, f"{name}, on {source}", dtype, training_step(objective, batch)))
    return figures


def rate_of(subject: Subject, name: str, dtype: torch.dtype, action: Callable[[], object]) -> Figure:
    """Images a second of a call that computes a batch, with its share of the matrix rate of a type."""
    needed = operations(action)
    took = seconds(action, subject.repeats, subject.device)
    rate = subject.rates.in_torch(dtype)
    share = needed / rate / took
    return Figure(f"images a second: {name}", subject.images / took, None, subject.images * rate / needed, share)
