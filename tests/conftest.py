"""What several test files share."""

import atexit
import contextlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from captioner.api import Captioner
from captioner.checkpoint import Checkpoint
from captioner.images import Preprocessing
from captioner.network.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import Vocabulary

# Sums in another order differ in the last digit: runs that are compared compute with as many threads.
torch.set_num_threads(1)

PHOTOS = Path(__file__).parent / "photos"
# A demo that stops deletes its uploads: not those of the demos that other processes test at the same time.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="captioner-tests-")
atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)


def small_model(words: int = 40, seed: int = 0, **changes) -> ShowAttendTell:
    """A model of the real shape and tiny size, with random weights."""
    torch.manual_seed(seed)
    sizes = {"annotation_size": 12, "attention_size": 10, "embedding_size": 8, "hidden_size": 9, "grid": (2, 3)}
    return ShowAttendTell(ModelConfig(words, **(sizes | changes))).eval()


def small_captioner() -> Captioner:
    """A captioner with random weights whose images are 64 pixels wide and high."""
    vocabulary = Vocabulary([f"word{number}" for number in range(36)])
    return Captioner(Checkpoint(small_model(len(vocabulary)), vocabulary, Preprocessing(size=(64, 64)), {"a": 1}))


@pytest.fixture(scope="session")
def small() -> Captioner:
    """That captioner."""
    return small_captioner()


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory) -> Path:
    """The same captioner as a folder."""
    folder = tmp_path_factory.mktemp("small")
    small.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The folder of the real data set; tests that need it are skipped where it is missing."""
    root = Path(os.environ.get("CAPTIONER_FLICKR8K", Path(__file__).parents[2] / "shared" / "flickr8k"))
    if not root.is_dir():
        pytest.skip(f"Flickr8k is not at {root}; set CAPTIONER_FLICKR8K")
    return root


@contextlib.contextmanager
def run_app(models, **options) -> Iterator[str]:
    """The demo on a free port of this machine, for as long as the block lasts; its address."""
    from app.server import configure, create

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = configure(create(models, **options), "127.0.0.1", port, log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)
