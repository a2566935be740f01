"""The benchmark compares implementations that give the same numbers, and every section has its figures."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_model

from captioner import reading
from captioner.api import Captioner
from captioner.checkpoint import Checkpoint
from captioner.images import Preprocessing
from captioner.network.model import ModelConfig, ShowAttendTell
from captioner.vocabulary import Vocabulary
from training import benchmark
from training.speed import captioning, measure, processes, steps
from training.speed.captioning import Subject
from training.speed.measure import Rates, Skipped, operations, seconds_of_each

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    """Products and copies that take no time."""
    monkeypatch.setitem(measure.PRODUCT, "cpu", (8, 256, 512))
    monkeypatch.setitem(measure.COPIED, "cpu", 2**20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    vocabulary = Vocabulary([f"word{i}" for i in range(40)])
    sizes = {"annotation_size": 16, "attention_size": 16, "embedding_size": 16, "hidden_size": 16}
    model = ShowAttendTell(ModelConfig(len(vocabulary), grid=(2, 2), dropout=0.0, **sizes))
    folder = tmp_path_factory.mktemp("tiny")
    Captioner(Checkpoint(model, vocabulary, Preprocessing(size=(64, 64)))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(
        'finetune_from = "features.17"\nviews = 2\nprecision = "float32"\nscst_samples = 2\nmax_length = 5\n'
    )
    return path


@pytest.fixture
def tiny(folder, recipe) -> Subject:
    """The tiny model, three photographs, every measurement made once."""
    return Subject(str(folder), "cpu", images=3, repeats=1, recipe=recipe, photographs=2)


@pytest.fixture
def packaged() -> Subject:
    """A model with graphs for ONNX Runtime."""
    return Subject("small", "cpu", images=2, repeats=1)


def values(figures) -> dict[str, float]:
    assert all(figure.value > 0 for figure in figures)
    return {figure.name: figure.value for figure in figures}


def test_the_tutorial_implementation_agrees_with_ours_before_it_is_timed(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.in_torch.model.state_dict().items()}
    assert len(values(steps.measure_tutorial(tiny))) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.in_torch.model.state_dict().items())


def test_a_tutorial_implementation_that_disagrees_is_not_timed(tiny, monkeypatch):
    monkeypatch.setattr(steps, "tutorial_beam", lambda *_: [4, 2])
    with pytest.raises(RuntimeError, match="other captions"):
        steps.measure_tutorial(tiny)
    with pytest.raises(RuntimeError, match="another loss"):
        steps.check_equal(lambda: torch.tensor(1.0), lambda: torch.tensor(1.01))


def test_another_kind_of_attention_has_no_tutorial(tiny):
    tiny.__dict__["in_torch"] = SimpleNamespace(model=small_model(attention="dot"))
    with pytest.raises(Skipped, match="additive"):
        steps.measure_tutorial(tiny)


def test_captions_are_measured_with_their_physical_limit(packaged):
    figures = captioning.measure_captions(packaged)
    one, many = figures[0], figures[3]
    assert (one.name, one.target) == ("one photograph from files to captions / encoder pass", 1.8)
    assert (many.name, many.target) == ("2 photographs from files to captions / encoder pass", 1.25)
    values(figures)
    assert one.limit > 0
    assert many.limit > 0


def test_the_parts_of_a_caption_add_up_to_the_whole(packaged):
    whole, *parts = captioning.measure_parts(packaged)
    assert whole.name.startswith("milliseconds of one caption")
    names = [part.name.removeprefix("milliseconds: ") for part in parts]
    assert names[3:8] == ["first state and keys", "attention", "LSTM", "output layer", "top-k"]
    assert sum(part.value for part in parts) == pytest.approx(whole.value)
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert all(part.value > 0 for part in parts[:8])


def test_a_model_without_graphs_has_no_parts(tiny):
    with pytest.raises(Skipped, match="captioner-export"):
        captioning.measure_parts(tiny)


def test_what_only_the_cpu_computes_is_skipped_on_a_gpu(tiny):
    tiny.device = torch.device("cuda")
    for measurement in (captioning.measure_parts, processes.measure_cold_start):
        with pytest.raises(Skipped, match="on the CPU only"):
            measurement(tiny)


def test_the_nodes_of_a_step_belong_to_attention_the_lstm_or_the_output_layer():
    def node(name, inputs, output):
        return SimpleNamespace(name=name, input=inputs, output=[output])

    nodes = [
        node("scores", ["hidden", "keys"], "scored"),
        node("softmax", ["scored"], "alpha"),
        node("sum", ["alpha", "annotations"], "context"),
        node("cell", ["context", "tokens"], "next_cell"),
        node("hidden", ["next_cell"], "next_hidden"),
        node("out", ["next_hidden", "context"], "logits"),
    ]
    found = captioning.parts_of_step(nodes)
    assert [found[name] for name in ("scores", "softmax", "sum")] == ["attention"] * 3
    assert [found[name] for name in ("cell", "hidden", "out")] == ["LSTM", "LSTM", "output layer"]


def test_the_decoder_of_tutorials_is_measured_with_one_and_with_five_captions(tiny):
    one, five = steps.measure_decoder(tiny, steps.Sizes(regions=6, channels=12, vocabulary=50, hidden=8))
    assert (one.target, five.target) == (7.0, 8.0)
    assert "6 x 12" in one.name
    values([one, five])
    assert one.limit > 0


def test_self_critical_and_imitation_steps_are_measured(tiny):
    ratio, rate = steps.measure_self_critical(tiny)
    assert ratio.target == 3.0
    values([ratio, rate])


def test_throughput_has_the_share_of_the_matrix_rate_on_any_device(tiny):
    figures = steps.measure_throughput(tiny)
    assert [name.partition(": ")[2] for name in values(figures)] == [
        "captions by torch",
        "training step that tunes the encoder from features.17, on cached maps",
        "training step that tunes the encoder from features.17, on images",
    ]
    assert all(0 < figure.share == pytest.approx(figure.value / figure.limit) for figure in figures)


def test_a_model_without_a_recipe_is_not_trained(tiny):
    tiny.recipe = None
    with pytest.raises(Skipped, match="--recipe"):
        steps.measure_throughput(tiny)


def test_a_cold_command_is_measured_over_its_imports(packaged):
    ratio, cold = processes.measure_cold_start(packaged)
    values([ratio, cold])
    assert ratio.value > 1
    assert ratio.limit > 1
    imports = cold.limit / ratio.limit
    assert ratio.value == pytest.approx(cold.value / imports)


def test_the_demo_is_measured_from_its_start_to_its_first_caption(packaged, monkeypatch):
    pytest.importorskip("gradio")
    imports = iter([2.5, 1.5])
    monkeypatch.setattr(processes, "time_of", lambda _: next(imports))
    monkeypatch.setattr(packaged, "least_seconds", lambda _: 0.25)
    (figure,) = processes.measure_demo(packaged)
    assert figure.value > 0
    assert figure.limit == 1.5 + 0.25


def test_a_program_that_fails_is_a_reason():
    with pytest.raises(Skipped, match="no such thing"):
        processes.run("-c", "raise SystemExit('no such thing')")


def test_another_captioner_is_measured_where_its_package_is(tiny, monkeypatch):
    asked = []
    blip = SimpleNamespace(generate=lambda **options: asked.append(options))
    ratio, duration = processes.compare_with_blip(tiny, blip)
    assert ratio.value > 0
    assert duration.value > 0
    assert asked[0]["num_beams"] == 3
    assert asked[0]["pixel_values"].shape == (1, 3, 384, 384)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Skipped, match="pip install transformers"):
        processes.measure_peer(tiny)


def test_the_command_prints_its_figures_and_writes_them(folder, recipe, tmp_path, capsys):
    output = tmp_path / "figures.json"
    few = ["--images", "2", "--repeats", "1", "--photographs", "1", "--recipe", str(recipe)]
    only = ["--only", "caption,parts,self-critical,stream"]
    assert benchmark.main(["--model", str(folder), *few, *only, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["one photograph: torch / default engine"] > 0
    assert figures["self-critical step / imitation step, cached features, target"] == 3.0
    assert figures["rate of a stream of files / of pictures in memory"] > 0
    printed = capsys.readouterr()
    assert "skipped parts: the model has no graphs" in printed.err
    for name in figures:
        assert name.rpartition(", ")[0] in printed.out


def test_a_section_that_fails_does_not_end_the_run(folder, monkeypatch, capsys):
    def wrong(_):
        raise RuntimeError("the tutorial search gives other captions")

    monkeypatch.setitem(benchmark.SECTIONS, "tutorial", wrong)
    monkeypatch.setitem(benchmark.SECTIONS, "caption", lambda _: [measure.Figure("a ratio", 2.0, 3.0, 4.0)])
    assert benchmark.main(["--model", str(folder), "--only", "tutorial,caption"]) == 1
    printed = capsys.readouterr()
    assert "error: tutorial: the tutorial search gives other captions" in printed.err
    assert "2.00     3.00      4.00          a ratio" in printed.out


def test_an_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "caption,everything"])
    assert "no section 'everything'" in capsys.readouterr().err


def test_actions_take_turns():
    calls = []
    times = seconds_of_each({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_operations_are_those_of_matrix_products_and_the_limit_is_the_longer_of_two():
    left, right = torch.ones(2, 3), torch.ones(3, 5, requires_grad=True)
    assert operations(lambda: (left @ right).sum().backward()) == 2 * 2 * (2 * 3 * 5)
    rates = Rates(CPU, repeats=1)
    rates.found["GB a second, a copy in memory"] = 10.0
    assert rates.least_seconds(operations=100.0, weights=20.0, rate=20.0) == 5.0
    assert rates.least_seconds(operations=10.0, weights=20.0, rate=20.0) == 2.0


@pytest.mark.parametrize("groups", [1, 4])
def test_the_gradients_of_a_convolution_with_groups_take_twice_its_own_operations(groups):
    layer, images = torch.nn.Conv2d(4, 8, 3, groups=groups), torch.ones(2, 4, 5, 5, requires_grad=True)
    forward = 2 * (2 * 8 * 3 * 3) * (4 // groups * 3 * 3)
    assert operations(lambda: layer(images)) == forward
    assert operations(lambda: layer(images).sum().backward()) == 3 * forward
    assert operations(lambda: layer(images.detach()).sum().backward()) == 2 * forward


def test_every_rate_is_measured_once(monkeypatch):
    rates = Rates(CPU, repeats=1)
    found = [rates.memory, rates.in_torch(torch.float32), rates.in_onnx(int8=False), rates.in_onnx(int8=True)]
    assert all(rate > 0 for rate in found)
    assert [rates.memory, rates.in_torch(torch.float32), rates.in_onnx(False), rates.in_onnx(True)] == found


def test_a_stream_of_large_photographs_is_measured_with_its_memory(tiny, monkeypatch):
    """Ten whole photographs would have 240 MB; two threads have one each, and every caption a preview of 1.5."""
    monkeypatch.setattr(reading, "THREADS", 2)
    tiny.photographs = 10
    *figures, memory = captioning.measure_stream(tiny, size=(4000, 2000))
    assert memory.name == "MB: a stream of 10 photographs of 8 megapixels"
    assert 0 <= memory.value < 200
    assert len(values(figures)) == 2
