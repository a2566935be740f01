"""The benchmark compares implementations that give the same numbers."""

import json

import pytest
import torch

from captioner import reading
from captioner.api import Captioner
from captioner.checkpoint import Checkpoint
from captioner.images import Preprocessing
from captioner.network.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import Vocabulary
from training import benchmark


@pytest.fixture(scope="module")
def small() -> Captioner:
    torch.manual_seed(0)
    vocabulary = Vocabulary([f"word{i}" for i in range(40)])
    sizes = {"annotation_size": 16, "attention_size": 16, "embedding_size": 16, "hidden_size": 16}
    model = ShowAttendTell(ModelConfig(len(vocabulary), grid=(2, 2), dropout=0.0, **sizes))
    return Captioner(Checkpoint(model, vocabulary, Preprocessing(size=(64, 64))))


def test_the_tutorial_implementation_agrees_with_ours_before_it_is_timed(small):
    before = {name: tensor.clone() for name, tensor in small.model.state_dict().items()}
    figures = benchmark.benchmark(small, images=3, repeats=1)
    assert all(figure > 0 for figure in figures.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.model.state_dict().items())


def test_what_cached_maps_save_is_measured_where_training_tuned_an_upper_part(small):
    about = {"training": {"finetune_from": "features.17"}}
    figures = benchmark.benchmark(
        Captioner(Checkpoint(small.model, small.vocabulary, small.preprocessing, about)), images=3, repeats=1
    )
    assert figures["step that tunes the encoder from features.17, on images / on cached maps"] > 0
    assert not any(weights.requires_grad for weights in small.model.encoder.parameters())


def test_a_tutorial_implementation_that_disagrees_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(benchmark, "tutorial_beam", lambda *_: [4, 2])
    with pytest.raises(RuntimeError, match="other captions"):
        benchmark.benchmark(small, images=2, repeats=1)


def test_the_command_prints_its_figures_and_writes_them(small, tmp_path, capsys):
    small.save_pretrained(tmp_path / "model")
    output = tmp_path / "figures.json"
    few = ["--images", "2", "--repeats", "1", "--photographs", "1"]
    assert benchmark.main(["--model", str(tmp_path / "model"), *few, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["one photograph: torch / default engine"] > 0
    assert len(figures) == len(capsys.readouterr().out.strip().splitlines())
    assert figures["rate of a stream of files / of pictures in memory"] > 0


def test_a_stream_of_large_photographs_is_measured_with_its_memory(small, monkeypatch):
    """Ten whole photographs would have 240 MB; two threads have one each, and every caption a preview of 1.5."""
    monkeypatch.setattr(reading, "THREADS", 2)
    figures = benchmark.stream_benchmark(small, photographs=10, size=(4000, 2000), repeats=1)
    assert 0 <= figures.pop("MB: a stream of 10 photographs of 8 megapixels", 0.0) < 200
    assert len(figures) == 2
    assert all(figure > 0 for figure in figures.values())
