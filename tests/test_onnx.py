"""Both engines: what ONNX Runtime computes from a model's graphs is what torch computes."""

import base64
import itertools
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from conftest import PHOTOS, small_model

from captioner import Captioner, CheckpointError, cli, engine, list_models, search
from captioner.checkpoint import load_tensors, save_tensors
from captioner.engine import Graph, Graphs, OnnxEngine
from captioner.explain import explain
from captioner.hiding import measure_evidence
from captioner.modelfile import MODEL_FILE, opened
from captioner.network import export
from captioner.network.engine import TorchEngine
from training import train

ROOT = Path(__file__).parents[1]
PATHS = sorted(PHOTOS.glob("*.jpg"))
SIZE = (64, 64)
MECHANISMS = ("none", "additive", "hard", "dot", "scaled_dot", "multi_head")


def weights_of(model):
    """What `OnnxEngine` reads the weights of a model with."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}.__getitem__


def strengthened(model):
    """The model with weights so large that the scores of regions and words differ."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.startswith("decoder."):
                weights.mul_(3)
    return model


@pytest.fixture(scope="module")
def encoder_graph():
    """The graph of the encoder that all small models share."""
    return export.export_graphs(small_model(30).config, SIZE)


@pytest.fixture(scope="module")
def annotations():
    return torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1)).relu()


@pytest.mark.parametrize(("decoder", "attention"), list(itertools.product(("lstm", "transformer"), MECHANISMS)))
def test_every_decoder_with_every_mechanism_gives_the_same_steps(encoder_graph, annotations, decoder, attention):
    heads = {} if attention != "multi_head" else {"attention_options": {"heads": 3}}
    model = strengthened(small_model(30, decoder=decoder, attention=attention, attention_size=12, heads=3, **heads))
    encode, step = export.export_decoder(model.decoder, annotations[:2])
    ours = OnnxEngine(encoder_graph._replace(encode=encode, step=step), weights_of(model))
    theirs = TorchEngine(model)
    assert ours.heads == theirs.heads
    mask = torch.tensor([True, True, False, True, False, True]).expand(4, -1)
    for here in (None, mask):
        found = search.beam_search(theirs, annotations, here, beam_size=3, max_length=9)
        same = search.beam_search(
            ours, annotations.numpy(), None if here is None else here.numpy(), beam_size=3, max_length=9
        )
        assert (found.words.numpy() == same.words).all()
        assert len(np.unique(same.words)) > 2  # captions of several words are compared
        assert np.allclose(found.log_probabilities, same.log_probabilities, atol=1e-4)
        steps = search.steps_of(theirs, annotations, found.words, here)
        same_steps = search.steps_of(ours, annotations.numpy(), same.words, None if here is None else here.numpy())
        for one, other in zip(steps, same_steps, strict=True):
            for name in ("logits", "alpha", "beta", "scores", "word_alpha"):
                expected, value = getattr(one, name), getattr(other, name)
                assert (expected is None) == (value is None)
                assert expected is None or np.allclose(expected, value, rtol=1e-4, atol=5e-4)
        words, usable = same.words[:, 0], None if here is None else here.numpy()
        expected = measure_evidence(theirs, annotations, torch.from_numpy(words), (2, 3), mask=usable)
        evidence = measure_evidence(ours, annotations.numpy(), words, (2, 3), mask=usable)
        assert np.allclose(expected, evidence, atol=1e-4)
        assert evidence.max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [{"annotation_size": 0, "tie_embeddings": True}, {"encoder_self_attention": 2, "heads": 3}],
    ids=str,
)
def test_whole_networks_give_the_same(changes):
    model = small_model(30, **({"embedding_size": 9, "hidden_size": 9} | changes))
    random = torch.get_rng_state()
    ours = OnnxEngine(export.export_graphs(model.config, SIZE), weights_of(model))
    assert torch.equal(torch.get_rng_state(), random)  # models are exported in the midst of training
    theirs = TorchEngine(model)
    images = np.random.default_rng(0).normal(size=(3, 3, *SIZE)).astype(np.float32)
    annotations = theirs.annotate(images)
    assert np.allclose(annotations, ours.annotate(images), rtol=1e-4, atol=1e-6)
    assert ours.displacement == theirs.displacement
    found = search.sample(theirs, annotations, samples=3, seed=4, top_p=0.9)
    same = search.sample(ours, ours.annotate(images), samples=3, seed=4, top_p=0.9)
    assert (found.words.numpy() == same.words).all()
    assert np.allclose(found.log_probabilities, same.log_probabilities, atol=1e-4)


def test_matrices_in_8_bits_differ_from_the_weights_by_half_a_step():
    weight = np.random.default_rng(0).normal(size=(5, 3 * engine.BLOCK)).astype(np.float32)
    weight[0] = 0
    weight[1] *= 1e-30
    integers, scales = engine.quantize(weight)
    assert (integers.shape, scales.shape) == ((5, 3, engine.BLOCK), (5, 3))
    again = ((integers.astype(np.float32) - 128) * scales[..., None]).reshape(weight.shape)
    assert (np.abs(again - weight).reshape(5, 3, -1) <= scales[..., None] * 0.5001).all()
    assert (integers[0] == 128).all()


@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
def test_steps_in_8_bits_are_nearly_the_same_and_do_not_depend_on_the_batch(decoder):
    sizes = {"annotation_size": 128, "embedding_size": 128, "hidden_size": 256, "heads": 2}
    model = small_model(600, decoder=decoder, **sizes)
    graphs = export.export_graphs(model.config, SIZE)
    assert graphs == Graphs.from_text(graphs.to_text())
    assert "decoder.output_weight" in graphs.quantized_step.quantized + graphs.quantized_step.weights
    exact, rounded = (OnnxEngine(graphs, weights_of(model), int8) for int8 in (False, True))
    images = np.random.default_rng(0).normal(size=(3, 3, *SIZE)).astype(np.float32)
    annotations = exact.annotate(images)
    words = search.sample(exact, annotations, samples=2, seed=4).words
    expected, found = (search.follow(each, annotations, words).log_probabilities for each in (exact, rounded))
    assert 0 < np.abs(expected - found).max() < 0.05
    alone = np.concatenate([search.follow(rounded, annotations[i : i + 1], words[i : i + 1])[1] for i in range(3)])
    assert np.allclose(found, alone, atol=1e-5)


def test_graphs_of_files_from_before_there_were_matrices_in_8_bits_are_used(encoder_graph):
    values = json.loads(encoder_graph.to_text())
    assert encoder_graph.quantized_step is None  # the matrices of so small a model are not worth it
    del values["quantized_step"]
    for name in ("annotate", "encode", "step"):
        del values[name]["quantized"]
    assert Graphs.from_text(json.dumps(values)) == encoder_graph


def test_graphs_whose_weights_were_said_to_be_in_one_file_are_used(encoder_graph):
    """As in files that were written before each weight had a file of its own name."""
    model = small_model(30)
    before = {}
    for part in ("annotate", "encode", "step"):
        proto = onnx.load_model_from_string(getattr(encoder_graph, part).model)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                assert (entry.key, entry.value) == ("location", tensor.name)
                entry.value = MODEL_FILE
        before[part] = getattr(encoder_graph, part)._replace(model=proto.SerializeToString())
    images = np.random.default_rng(0).normal(size=(2, 3, *SIZE)).astype(np.float32)
    found = [
        search.beam_search(each, each.annotate(images), max_length=4)
        for each in (OnnxEngine(one, weights_of(model)) for one in (encoder_graph, encoder_graph._replace(**before)))
    ]
    assert all(np.array_equal(*parts) for parts in zip(*(each[:4] for each in found), strict=True))


def test_graphs_from_before_they_gave_the_weights_over_the_words_are_used(encoder_graph, annotations):
    model = strengthened(small_model(30, decoder="transformer", heads=3))
    encode, step = export.export_decoder(model.decoder, annotations[:2])
    older = onnx.load_model_from_string(step.model)
    older.graph.output.remove(next(output for output in older.graph.output if output.name == "word_alpha"))
    found = []
    for each in (step, step._replace(model=older.SerializeToString())):
        ours = OnnxEngine(encoder_graph._replace(encode=encode, step=each), weights_of(model))
        memory, state, tokens, _ = search.start(ours, annotations.numpy(), None, 3)
        found.append(ours.step(memory, state, tokens))
    assert found[0].word_alpha.shape == (4, 3, 2, 3, 1)
    assert found[1].word_alpha is None
    assert np.array_equal(found[0].logits, found[1].logits)


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The folder of a model that the command has exported."""
    folder = tmp_path_factory.mktemp("exported")
    small.save_pretrained(folder)
    assert cli.export([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def both(exported):
    """The model with either engine."""
    return Captioner.from_pretrained(exported), Captioner.from_pretrained(exported, engine="torch")


def same(one, other):
    """Whether two captions have the same words, numbers and maps."""
    return (
        one.words == other.words
        and np.allclose(one.word_log_probabilities, other.word_log_probabilities, atol=1e-4)
        and np.allclose(one.attention, other.attention, atol=1e-4)
        and (one.evidence is None or np.allclose(one.evidence, other.evidence, atol=1e-4))
        and len(one.alternatives) == len(other.alternatives)
        and all(map(same, one.alternatives, other.alternatives))
    )


def test_an_exported_model_runs_on_onnx_runtime_unless_torch_is_asked_for(both):
    assert [type(captioner.engine) for captioner in both] == [OnnxEngine, TorchEngine]
    assert both[0].about == both[1].about == {"a": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beam_size": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": -3, "alternatives": 2},
        {"batch_size": 2},
        {"hide": (0, 0, 150, 150), "evidence": True},
    ],
    ids=str,
)
def test_captions_are_the_same_with_both_engines(both, options):
    for one, other in zip(*(captioner.caption(PATHS, **options) for captioner in both), strict=True):
        assert same(one, other)


def test_the_numbers_behind_captions_are_the_same_with_both_engines(both):
    forced = [model.teacher_forced(PATHS[0], "word1 word2 word3", keep_annotations=True) for model in both]
    assert same(*forced)
    steps = [explain(model, caption) for model, caption in zip(both, forced, strict=True)]
    for one, other in zip(*steps, strict=True):
        assert one.word == other.word
        assert [word for word, _ in one.candidates] == [word for word, _ in other.candidates]
        assert one.beta == pytest.approx(other.beta, abs=1e-5)
        assert np.allclose(one.scores, other.scores, atol=1e-5)
        assert np.allclose(one.weights, other.weights, atol=1e-5)


def test_the_command_takes_an_engine(exported, capsys):
    printed = []
    for name in ("onnx", "torch"):
        assert cli.main([str(PATHS[0]), "--model", str(exported), "--engine", name]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


def test_a_model_with_either_engine_can_be_saved_with_its_graphs(both, tmp_path):
    for number, captioner in enumerate(both):
        captioner.save_pretrained(tmp_path / str(number), half=True)
        again = Captioner.from_pretrained(tmp_path / str(number))
        assert isinstance(again.engine, OnnxEngine)
        assert again.about == captioner.about
        assert again.caption(PATHS[0]).log_probability == pytest.approx(
            captioner.caption(PATHS[0]).log_probability, abs=0.05
        )
        with opened(tmp_path / str(number) / MODEL_FILE) as file:
            assert file.get_tensor("decoder.output_weight").dtype == np.float16


def test_a_model_whose_file_was_replaced_is_not_saved_with_the_weights_of_another(exported, small, tmp_path):
    shutil.copy(exported / MODEL_FILE, tmp_path)
    captioner = Captioner.from_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        captioner.save_pretrained(tmp_path / "copy")


def test_training_keeps_models_with_their_graphs(tmp_path):
    data = tiny.draw(tmp_path / "data")
    arguments = ["--data", f"flickr8k={data}", "--output", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    arguments += [*tiny.SMALL, "--encoder-weights", str(tiny.encoder_weights(tmp_path / "encoder.safetensors"))]
    assert train.main([*arguments, "--export", "--epochs", "1", "--finetune-epochs", "0"]) == 0
    captioner = Captioner.from_pretrained(tmp_path / "run")
    assert isinstance(captioner.engine, OnnxEngine)
    photo = data / "Flicker8k_Dataset" / "00.png"
    assert same(captioner.caption(photo), Captioner.from_pretrained(tmp_path / "run", engine="torch").caption(photo))


def changed(exported, folder, change):
    """A copy of an exported model after `change` of the texts in its header; its file."""
    tensors, metadata = load_tensors(exported / MODEL_FILE)
    change(metadata)
    folder.mkdir(exist_ok=True)
    save_tensors(folder / MODEL_FILE, tensors, metadata)
    return folder


def of_another_size(metadata):
    preprocessing = json.loads(metadata["preprocessing"])
    metadata["preprocessing"] = json.dumps({**preprocessing, "size": [96, 96]})


def truncated(metadata):
    metadata["graphs"] = metadata["graphs"][:-1000]


def bomb(metadata):
    graphs = json.loads(metadata["graphs"])
    graphs["step"]["model"] = base64.b64encode(zlib.compress(bytes(2**25))).decode()
    metadata["graphs"] = json.dumps(graphs)


@pytest.mark.parametrize(
    ("change", "message"), [(of_another_size, "another configuration"), (truncated, "cannot be read"), (bomb, "16 MiB")]
)
def test_graphs_that_do_not_belong_to_a_model_are_named_and_not_used(exported, tmp_path, change, message):
    folder = changed(exported, tmp_path, change)
    with pytest.warns(UserWarning, match=f"{message}.*captioner-export"):
        captioner = Captioner.from_pretrained(folder)
    assert isinstance(captioner.engine, TorchEngine)
    with pytest.warns(UserWarning, match=message), pytest.raises(CheckpointError, match="captioner-export"):
        Captioner.from_pretrained(folder, engine="onnx")


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("decoder.beta.bias", None, "decoder.beta.bias"),
        ("decoder.output_bias", torch.full((40,), torch.nan), "decoder.output_bias .* not finite"),
        ("decoder.output_bias", torch.zeros(3), "dimensions do not match"),
    ],
)
def test_weights_that_do_not_fit_the_graphs_are_named(exported, tmp_path, name, weights, message):
    tensors, metadata = load_tensors(exported / MODEL_FILE)
    del tensors[name]
    if weights is not None:
        tensors[name] = weights
    save_tensors(tmp_path / MODEL_FILE, tensors, metadata)
    with pytest.raises(CheckpointError, match=message):
        Captioner.from_pretrained(tmp_path, engine="onnx")


def test_a_graph_cannot_ask_for_another_file_as_its_weights(exported, tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(bytes(4 * 40))
    monkeypatch.chdir(tmp_path)

    def theft(metadata):
        graphs = Graphs.from_text(metadata["graphs"])
        model = onnx.load_model_from_string(graphs.step.model)
        for tensor in model.graph.initializer:
            if tensor.name == "decoder.output_bias":
                tensor.external_data[0].value = "secret"
        names = tuple(name for name in graphs.step.weights if name != "decoder.output_bias")
        metadata["graphs"] = graphs._replace(step=Graph(model.SerializeToString(), names)).to_text()

    with pytest.raises(CheckpointError, match="ONNX Runtime"):
        Captioner.from_pretrained(changed(exported, tmp_path / "thief", theft), engine="onnx")


def test_engines_and_devices_that_do_not_fit_are_refused(exported, small_folder):
    with pytest.raises(ValueError, match="engine must be one of onnx, onnx-float32, torch"):
        Captioner.from_pretrained(exported, engine="jax")
    with pytest.raises(ValueError, match="CPU"):
        Captioner.from_pretrained(exported, "cuda", engine="onnx")
    with pytest.raises(CheckpointError, match="captioner-export"):
        Captioner.from_pretrained(small_folder, engine="onnx")
    assert isinstance(Captioner.from_pretrained(small_folder).engine, TorchEngine)


def test_a_captioner_says_where_its_network_is(both):
    assert both[1].model.config == both[0].config
    with pytest.raises(AttributeError, match='engine="torch"'):
        both[0].model  # noqa: B018


@pytest.mark.parametrize("threads", ["1", "3"])
def test_onnx_runtime_has_as_many_threads_as_it_may(monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert engine.threads() == int(threads)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(int(threads))), raising=False)
    assert engine.threads() == int(threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert engine.threads() == 0


def test_exporting_without_its_package_says_what_to_install(exported, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert cli.export([str(exported)]) == 2
    assert "pip install 'captioner[export]'" in capsys.readouterr().err


def test_nothing_of_torch_is_imported_to_caption(exported):
    code = f"""
import sys
from captioner import Captioner
from captioner.explain import explain
model = Captioner.from_pretrained({str(exported)!r})
caption = model.caption({str(PATHS[0])!r}, keep_annotations=True)
explain(model, caption), caption.figure()
sys.exit(any(name.partition(".")[0] in ("torch", "torchvision", "onnx") for name in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", [model.name for model in list_models()])
def test_the_models_in_the_package_give_the_same_with_both_engines(name):
    one, other = (Captioner.from_pretrained(name, engine=engine) for engine in ("onnx-float32", "torch"))
    assert isinstance(one.engine, OnnxEngine)
    assert all(map(same, one.caption(PATHS), other.caption(PATHS)))
