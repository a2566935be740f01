"""The speed of programs from their start, and that of another captioner for scale."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import captioner

from .captioning import Subject
from .measure import Figure, Skipped, seconds_of_each, time_of

IMPORTS = "import numpy, PIL.Image, onnxruntime"
DEMO = "captioner_app" if __package__.startswith("captioner_") else "app"
# What people use today: 384 pixels, 3 beams, 10 words.
PEER_PIXELS, PEER_BEAMS, PEER_WORDS = 384, 3, 10


def run(*arguments: str) -> str:
    """What a Python program prints to stdout. Its packages are those of this process.

    Raises:
        Skipped: it failed.
    """
    paths = [str(Path(captioner.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"python {' '.join(arguments[:2])} failed: {done.stderr.strip()[-200:]}")
    return done.stdout


def measure_cold_start(subject: Subject) -> list[Figure]:
    """`captioner photo.jpg` from its start to its end, over the time that its imports take."""
    subject.on_onnx  # noqa: B018  # it is skipped where ONNX Runtime does not compute the model
    path = subject.paths[0]
    limit = subject.least_seconds([path])
    actions = {
        "imports": lambda: run("-c", IMPORTS),
        "cold": lambda: run("-m", "captioner", path, "--model", subject.model),
    }
    times = seconds_of_each(actions, subject.repeats)
    imports, cold = times["imports"], times["cold"]
    return [
        Figure(f"captioner photo.jpg, cold / {IMPORTS}", cold / imports, 2.5, 1 + limit / imports),
        Figure("seconds: captioner photo.jpg, cold", cold, 1.0, imports + limit),
    ]


def measure_demo(subject: Subject) -> list[Figure]:
    """The demo from its start until its first caption is answered, over HTTP on this machine."""
    if importlib.util.find_spec("gradio") is None:
        raise Skipped("the demo needs Gradio: pip install 'captioner[app]'")
    subject.on_onnx  # noqa: B018  # as above
    limit = subject.least_seconds(subject.paths[:1])

    def imports() -> float:
        return time_of(lambda: run("-c", f"{IMPORTS}, gradio"))

    # Other programs only make imports slower: the faster of the two before and after the demo is nearer to the limit.
    before = imports()
    started = float(run("-m", f"{DEMO}.benchmark", "--start", "--model", subject.model))
    least = min(before, imports())
    return [Figure("seconds: the demo's start to its first caption answered", started, None, least + limit)]


def measure_peer(subject: Subject) -> list[Figure]:
    """BLIP-base with random weights, as torch computes it, over the default engine; one photograph each.

    Raises:
        Skipped: the package `transformers` is missing.
    """
    try:
        from transformers import BlipConfig, BlipForConditionalGeneration
    except ImportError as error:
        raise Skipped("BLIP needs the package transformers: pip install transformers") from error
    config = BlipConfig()
    config.vision_config.image_size = PEER_PIXELS
    return compare_with_blip(subject, BlipForConditionalGeneration(config).eval().to(subject.device))


def compare_with_blip(subject: Subject, network: Any) -> list[Figure]:
    """The figures of `measure_peer` for a BLIP of any size."""
    numbers = np.random.default_rng(0).standard_normal((1, 3, PEER_PIXELS, PEER_PIXELS), dtype=np.float32)
    pixels = torch.from_numpy(numbers).to(subject.device)
    words = {"max_new_tokens": PEER_WORDS, "min_new_tokens": PEER_WORDS, "num_beams": PEER_BEAMS}
    actions = {
        "peer": lambda: network.generate(pixel_values=pixels, **words),
        "own": lambda: subject.captioner.caption(subject.paths[0]),
    }
    times = seconds_of_each(actions, subject.repeats, subject.device)
    return [
        Figure("one photograph: BLIP-base without reading / from its file to a caption", times["peer"] / times["own"]),
        Figure("seconds: BLIP-base, one photograph", times["peer"]),
    ]
