"""A data set of drawn pictures in the layout of Flickr8k's release, and the smallest model to train on it."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw
from safetensors.torch import save_file

COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
SHAPES = ["circle", "square"]
# Every flag that makes training small.
SMALL = """--image-size 64 --grid 2 --annotation-size 16 --embedding-size 16 --hidden-size 16
--attention-size 16 --minimum-count 1 --batch-size 5 --warmup-steps 2 --monitor-beam 1 --device cpu""".split()


def draw(root: Path, train: int = 12, dev: int = 6) -> Path:
    """Write the data set to `root`: coloured shapes, each with several captions."""
    (root / "Flicker8k_Dataset").mkdir(parents=True)
    (root / "Flickr8k_text").mkdir()
    names, lines = [], []
    for number in range(train + dev):
        colour, shape = COLOURS[number % 6], SHAPES[number // 6 % 2]
        image = Image.new("RGB", (80, 60), "grey")
        pen = ImageDraw.Draw(image)
        getattr(pen, {"circle": "ellipse", "square": "rectangle"}[shape])((15, 5, 65, 55), fill=colour)
        names.append(f"{number:02d}.png")
        image.save(root / "Flicker8k_Dataset" / names[-1])
        captions = [f"a {colour} {shape} .", f"there is a {colour} {shape} on grey", f"{shape}"][: 2 + number % 2]
        lines += [f"{names[-1]}#{n}\t{caption}" for n, caption in enumerate(captions)]
    (root / "Flickr8k_text" / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    for split, chosen in (("train", names[:train]), ("dev", names[train:])):
        (root / "Flickr8k_text" / f"Flickr_8k.{split}Images.txt").write_text("\n".join(chosen) + "\n")
    return root


def draw_karpathy(root: Path, train: int = 4, dev: int = 2) -> Path:
    """Write a data set of triangles to `root` in Karpathy's layout for COCO; every other image has one caption only."""
    (root / "images").mkdir(parents=True)
    entries = []
    for number in range(train + dev):
        colour = COLOURS[number % 6]
        image = Image.new("RGB", (70, 90), "grey")
        ImageDraw.Draw(image).polygon([(10, 80), (35, 10), (60, 80)], fill=colour)
        image.save(root / "images" / f"{number}.png")
        captions = [f"a {colour} triangle", f"a triangle that is {colour}"][: 1 + number % 2]
        split = "train" if number < train else "val"
        entries.append(
            {"filename": f"{number}.png", "split": split, "sentences": [{"raw": caption} for caption in captions]}
        )
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries}))
    return root


def draw_own(root: Path, count: int = 20) -> Path:
    """Draw stars beside a file of captions for them, in the ImageFolder convention; the file."""
    (root / "photos").mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(count):
        colour, size = COLOURS[number % 6], 15 + 5 * (number // 6)
        image = Image.new("RGB", (80, 60), "grey")
        pen = ImageDraw.Draw(image)
        pen.line((40 - size, 30, 40 + size, 30), fill=colour, width=5)
        pen.line((40, 30 - size, 40, 30 + size), fill=colour, width=5)
        image.save(root / "photos" / f"{number}.png")
        lines += [f"photos/{number}.png,a {colour} star", f'photos/{number}.png,"a star, all {colour}"']
    (root / "stars.csv").write_text("\n".join(lines) + "\n")
    return root / "stars.csv"


def encoder_weights(path: Path, name: str = "mobilenet_v2") -> Path:
    """Random weights for a torchvision network, with the batch-norm statistics that let it tell images apart."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            colours = torch.rand(16, 3, 1, 1) * 4 - 2
            network(colours + torch.randn(16, 3, 64, 64) / 2)
    save_file(network.state_dict(), path)
    return path


def start(arguments: Sequence[str], killed_at_image: int = 0, errors: Path | None = None) -> multiprocessing.Process:
    """Training in a process of its own, which has imported what it needs already.

    With `killed_at_image` it kills itself as it reads that photograph for the cache of features. What it writes to
    stderr goes to `errors`.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["training.train", "training.history", "torch.utils.tensorboard", "matplotlib.figure"])
    process = forks.Process(target=train, args=(list(arguments), killed_at_image, errors))
    process.start()
    return process


def train(arguments: list[str], killed_at_image: int, errors: Path | None) -> None:
    """Run training with as many threads as the tests, and end the process."""
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    from training.data.images import ImageSource
    from training.train import main

    torch.set_num_threads(1)
    if killed_at_image:
        one, read = ImageSource.one, []

        def one_or_die(self: ImageSource, index: int, epoch: int) -> Image.Image:
            read.append(index)
            if len(read) == killed_at_image:
                os.kill(os.getpid(), signal.SIGKILL)
            return one(self, index, epoch)

        ImageSource.one = one_or_die
    sys.exit(main(arguments))
