"""A saved model comes back as it was, and what is not whole is refused by name."""

import dataclasses
import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file, save_file

from captioner import checkpoint as module
from captioner.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from captioner.images import Preprocessing
from captioner.vocabulary import Vocabulary


def made(seed: int = 0) -> Checkpoint:
    vocabulary = Vocabulary([f"word{seed}-{number}" for number in range(16)])
    return Checkpoint(small_model(20, seed), vocabulary, Preprocessing(size=(64, 48)), {"scores": {"CIDEr": 0.5}})


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(tmp_path / "model", made())
    return tmp_path / "model"


def same(one: Checkpoint, other: Checkpoint) -> bool:
    weights, others = one.model.state_dict(), other.model.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_model_comes_back_bit_for_bit(folder):
    loaded = load_checkpoint(folder)
    assert same(loaded, made())
    assert loaded.vocabulary == made().vocabulary
    assert loaded.preprocessing == made().preprocessing
    assert loaded.model.config == made().model.config
    assert loaded.about == made().about
    assert not loaded.model.training
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocabulary.json"]


def test_half_precision_is_half_the_size_and_nearly_the_same(folder, tmp_path):
    save_checkpoint(tmp_path / "half", made(), half=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert sizes[0] < 0.6 * sizes[1]
    half = load_checkpoint(tmp_path / "half").model.state_dict()
    for name, tensor in made().model.state_dict().items():
        assert half[name].dtype == tensor.dtype
        assert torch.allclose(half[name], tensor, rtol=1e-3, atol=1e-4)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_weights(change):
    def edit(path):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)

    return edit


def shorten(tensors):
    tensors["decoder.output_bias"] = tensors["decoder.output_bias"][:-1].clone()


def not_a_number(tensors):
    tensors["decoder.output_bias"][3] = float("nan")


BEYOND_REPAIR = {
    "truncated weights": ("model.safetensors", truncate, "truncated"),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b""), "truncated or not a safetensors"),
    "another kind of file": ("model.safetensors", lambda path: path.write_bytes(b"PK" * 500), "not a safetensors"),
    "missing weights": ("model.safetensors", os.remove, "missing"),
    "missing tensor": ("model.safetensors", edit_weights(lambda t: t.pop("decoder.output_bias")), "lacks"),
    "unknown tensor": ("model.safetensors", edit_weights(lambda t: t.update(x=torch.ones(1))), "unknown"),
    "wrong shape": ("model.safetensors", edit_weights(shorten), "shape"),
    "not a number": ("model.safetensors", edit_weights(not_a_number), "finite"),
    "truncated config": ("config.json", truncate, "truncated or not JSON"),
    "missing config": ("config.json", os.remove, "missing"),
    "list for a config": ("config.json", lambda path: path.write_text("[]"), "should hold a JSON dict"),
    "missing vocabulary": ("vocabulary.json", os.remove, "missing"),
    "other vocabulary": ("vocabulary.json", lambda path: path.write_text('["dog"]'), "not the one"),
}


@pytest.mark.parametrize("case", BEYOND_REPAIR)
def test_a_broken_file_is_refused_by_name(folder, case):
    name, damage, message = BEYOND_REPAIR[case]
    damage(folder / name)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(folder)
    assert name in str(error.value)


def test_a_later_format_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_nothing_is_ever_unpickled(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for write in (lambda path: path.write_bytes(pickle.dumps(Bomb())), lambda path: torch.save(Bomb(), path)):
        write(folder / "model.safetensors")
        with pytest.raises(CheckpointError):
            load_checkpoint(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("broken", ["save_tensors", "fsync"])
def test_a_save_that_meets_a_full_disk_leaves_the_old_model_whole(folder, monkeypatch, broken):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((module, broken) if broken == "save_tensors" else (os, broken)), full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(folder, made(seed=1))
    monkeypatch.undo()
    assert same(load_checkpoint(folder), made(seed=0))
    assert len(os.listdir(folder)) == 3


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_save_interrupted_between_its_renames_leaves_the_old_model_whole(folder, monkeypatch, number, error):
    rename, calls = os.replace, []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == number:
            raise error
        rename(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_checkpoint(folder, dataclasses.replace(made(seed=1), about={"scores": {"CIDEr": 0.6}}))
    monkeypatch.undo()
    assert len(calls) >= number
    assert len(os.listdir(folder)) == 3
    loaded = load_checkpoint(folder)
    assert same(loaded, made(seed=0))
    assert loaded.about == made(seed=0).about


def test_a_folder_can_be_loaded_whenever_a_save_is_killed(folder, tmp_path, monkeypatch):
    rename, moments = os.replace, []

    def watched(*paths):
        moments.append(tmp_path / f"killed{len(moments)}")
        shutil.copytree(folder, moments[-1])  # what a kill before this rename would leave
        rename(*paths)

    monkeypatch.setattr(os, "replace", watched)
    save_checkpoint(folder, dataclasses.replace(made(seed=1), about={"scores": {"CIDEr": 0.6}}))
    monkeypatch.undo()
    assert len(moments) == 3
    for moment in moments:
        loaded = load_checkpoint(moment)
        assert same(loaded, made(seed=0))
        assert loaded.about == made(seed=0).about
        assert any(path.suffix == ".old" for path in moment.iterdir())
        save_checkpoint(moment, made(seed=1))
        assert same(load_checkpoint(moment), made(seed=1))
        assert not any(path.suffix == ".old" for path in moment.iterdir())


@pytest.mark.parametrize(("value", "half"), [(float("nan"), False), (1e5, True)])
def test_weights_that_could_not_be_loaded_again_do_not_replace_a_model(folder, value, half):
    spoilt = made(seed=1)
    with torch.no_grad():
        spoilt.model.decoder.output_bias[5] = value
    with pytest.raises(CheckpointError, match=r"decoder\.output_bias"):
        save_checkpoint(folder, spoilt, half)
    assert same(load_checkpoint(folder), made(seed=0))


def written(folder, words, **changes):
    """A checkpoint whose three files belong together, whatever its config says."""
    checkpoint = made()
    config = {
        "format": module.FORMAT,
        "model": dataclasses.asdict(checkpoint.model.config) | changes.pop("model", {}),
        "preprocessing": checkpoint.preprocessing.to_dict(),
    }
    data = {"config": module.encode_json(config | changes), "vocabulary": module.encode_json(words)}
    folder.mkdir()
    for name, content in data.items():
        (folder / f"{name}.json").write_bytes(content)
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {name: module.digest(content) for name, content in data.items()})
    return folder


WORDS = [f"word{number}" for number in range(16)]


@pytest.mark.parametrize(
    ("words", "changes", "name"),
    [
        (WORDS[:2], {}, "vocabulary.json"),
        (list(range(16)), {}, "vocabulary.json"),
        (["word"] * 16, {}, "vocabulary.json"),
        (WORDS, {"model": {"unknown": 1}}, "config.json"),
        (WORDS, {"model": {"hidden_size": -1}}, "config.json"),
        (WORDS, {"model": {"hidden_size": 10}}, "model.safetensors"),
        (WORDS, {"model": {"grid": [3]}}, "config.json"),
        (WORDS, {"preprocessing": [1]}, "config.json"),
    ],
)
def test_files_that_belong_together_but_describe_no_model_are_refused_by_name(tmp_path, words, changes, name):
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(written(tmp_path / "model", words, **changes))


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, {"annotation_size": 0}])
def test_every_kind_of_model_comes_back(tmp_path, changes):
    saved = dataclasses.replace(made(), model=small_model(20, **changes))
    save_checkpoint(tmp_path / "model", saved)
    assert same(load_checkpoint(tmp_path / "model"), saved)


def test_files_of_two_saves_are_never_taken_for_one_model(folder, tmp_path):
    save_checkpoint(tmp_path / "other", made(seed=1))
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(CheckpointError, match="not the one"):
        load_checkpoint(folder)


def test_a_save_replaces_what_was_there(folder):
    save_checkpoint(folder, made(seed=1))
    assert same(load_checkpoint(folder), made(seed=1))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_user_gives_to_new_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "model", made())
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


def test_weights_are_laid_out_as_in_a_new_model(folder):
    new, loaded = made().model.state_dict(), load_checkpoint(folder).model.state_dict()
    assert {name: tensor.stride() for name, tensor in loaded.items()} == {
        name: tensor.stride() for name, tensor in new.items()
    }
