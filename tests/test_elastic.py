"""A process that is killed is started again by torchrun, and the run computes what an undisturbed one computes."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import tiny
from test_training import PROJECT, assert_same_run, losses

from training import state, trainer
from training.distributed import Distributed
from training.train import main

# Run by torchrun: in the first two lives of the run a process kills itself, in the middle of an epoch.
KILLED = """
import os, signal, sys
from training.train import main
from training.trainer import Trainer

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
step = Trainer.step

def step_or_die(self, batch):
    place = (self.progress.total_steps, rank)
    if life < 2 and place == ((2, 1), (4, 0))[life]:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)

Trainer.step = step_or_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Flags of a run of two stages with three steps an epoch."""
    folder = tmp_path_factory.mktemp("elastic")
    weights = tiny.encoder_weights(folder / "mobilenet_v2.safetensors")
    data = ["--data", f"flickr8k={tiny.draw(folder / 'data')}", "--cache", str(folder / "cache")]
    stages = ["--epochs", "1", "--finetune-epochs", "1", "--finetune-from", "features.17", "--workers", "0"]
    stages += ["--dropout", "0"]
    return [*data, "--encoder-weights", str(weights), *tiny.SMALL, *stages, "--checkpoint-every", "1", "--resume"]


def test_a_run_whose_processes_are_killed_goes_on_as_if_they_had_not_been(options, tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.2"]
    elastic = ["--nnodes", "1:4", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-conf", "last_call_timeout=1"]
    elastic += ["--rdzv-endpoint", f"127.0.0.1:{port}", tmp_path / "killed.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    environment |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [*launcher, *elastic, *options, "--output", tmp_path / "killed"]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9") == 2
    assert main([*options, "--output", str(tmp_path / "whole")]) == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole", tolerance=1e-4)
    assert len(losses(tmp_path / "killed")) == 2


def test_restarts_that_would_hang_are_refused(options, tmp_path, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "MAX_RESTARTS": "3", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name if name == "WORLD_SIZE" else f"TORCHELASTIC_{name}", value)
    assert main([*options, "--output", str(tmp_path / "run")]) == 1
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err.splitlines()[-1]


def test_machines_that_do_not_share_the_run_folder_are_told(options, tmp_path, monkeypatch, capsys):
    gather = Distributed.gather

    def with_another(self, value):
        return [value, state.Progress(total_steps=7)] if isinstance(value, state.Progress) else gather(self, value)

    monkeypatch.setattr(Distributed, "gather", with_another)
    assert main([*options, "--output", str(tmp_path / "run")]) == 1
    assert f"{tmp_path / 'run'} is not the same folder on all machines" in capsys.readouterr().err


def test_training_goes_on_while_a_checkpoint_is_written(options, tmp_path, monkeypatch):
    begun, overlapped = [], []
    save, step = state.save_tensors, trainer.Trainer.step

    def save_slowly(path, tensors, metadata):
        taken, until = json.loads(metadata["progress"])["total_steps"], time.monotonic() + 1
        while len(begun) == taken and time.monotonic() < until:
            time.sleep(0.01)
        overlapped.append(len(begun) > taken)
        save(path, tensors, metadata)

    def step_and_count(self, batch):
        begun.append(batch)
        return step(self, batch)

    monkeypatch.setattr(state, "save_tensors", save_slowly)
    monkeypatch.setattr(trainer.Trainer, "step", step_and_count)
    assert main([*options, "--output", str(tmp_path / "run")]) == 0
    # Three steps an epoch; after the last one comes validation, and the save after that is awaited.
    first, between, second = [True, True, False, False], [False], [True, True, False, False]
    assert overlapped == [*first, *between, *second]
