"""A saved model comes back as it was, and what is not whole is refused by name."""

import dataclasses
import errno
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from captioner import Captioner
from captioner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.images import Preprocessing
from captioner.modelfile import CheckpointError, ModelDescription, opened, read_metadata
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
    assert os.listdir(folder) == ["model.safetensors"]


def test_half_precision_is_half_the_size_and_nearly_the_same(folder, tmp_path):
    save_checkpoint(tmp_path / "half", made(), half=True)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert sizes[0] < 0.6 * sizes[1]
    half = load_checkpoint(tmp_path / "half").model.state_dict()
    for name, tensor in made().model.state_dict().items():
        assert half[name].dtype == tensor.dtype
        assert torch.allclose(half[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_model_is_given_as_its_folder_or_its_file(folder, tmp_path):
    assert same(load_checkpoint(folder / "model.safetensors"), made())
    save_checkpoint(tmp_path / "new" / "other.safetensors", made(seed=1))
    assert os.listdir(tmp_path / "new") == ["other.safetensors"]
    captioner = Captioner.from_pretrained(str(tmp_path / "new" / "other.safetensors"))
    assert same(captioner, made(seed=1))
    assert captioner.vocabulary == made(seed=1).vocabulary


def test_all_but_the_weights_can_be_read_without_torch(folder):
    path = folder / "model.safetensors"
    with opened(path) as file:
        description = ModelDescription.from_metadata(file.metadata(), path)
        weight = file.get_tensor("decoder.output_bias")
    expected = made()
    assert description == ModelDescription(
        expected.model.config, expected.vocabulary, expected.preprocessing, expected.about
    )
    assert isinstance(weight, np.ndarray)
    code = "import sys; import captioner.config, captioner.modelfile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_weights(change):
    def edit(path):
        metadata = metadata_of(path)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)

    return edit


def edit_metadata(**texts):
    def edit(path):
        changed = metadata_of(path) | texts
        save_file(load_file(path), path, {name: text for name, text in changed.items() if text is not None})

    return edit


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def shorten(tensors):
    tensors["decoder.output_bias"] = tensors["decoder.output_bias"][:-1].clone()


def not_a_number(tensors):
    tensors["decoder.output_bias"][3] = float("nan")


BEYOND_REPAIR = {
    "truncated": (truncate, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or not a safetensors"),
    "another kind of file": (lambda path: path.write_bytes(b"PK" * 500), "not a safetensors"),
    "missing": (os.remove, "missing"),
    "missing tensor": (edit_weights(lambda t: t.pop("decoder.output_bias")), "lacks"),
    "unknown tensor": (edit_weights(lambda t: t.update(x=torch.ones(1))), "unknown"),
    "wrong shape": (edit_weights(shorten), "shape"),
    "not a number": (edit_weights(not_a_number), "finite"),
    "no configuration": (edit_metadata(model=None), "its model is missing"),
    "truncated configuration": (edit_metadata(model='{"encoder":'), "its model is truncated or not JSON"),
    "list for a configuration": (edit_metadata(model="[]"), "should be a JSON dict, not a list"),
    "no vocabulary": (edit_metadata(vocabulary=None), "its vocabulary is missing"),
    "fewer words": (edit_metadata(vocabulary='["dog"]'), "has 5 words, but vocabulary_size is 20"),
    "later format": (edit_metadata(format="99"), "is of format 99; .* reads format 2"),
    "no format": (edit_metadata(format=None), "names no format"),
}


@pytest.mark.parametrize("case", BEYOND_REPAIR)
def test_a_broken_file_is_refused_by_name(folder, case):
    damage, message = BEYOND_REPAIR[case]
    damage(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_a_folder_of_the_old_format_is_refused_as_such(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, {"config": "0" * 64, "vocabulary": "1" * 64})
    (folder / "config.json").write_text("{}")
    for read in (load_checkpoint, lambda folder: read_metadata(folder / "model.safetensors")):
        with pytest.raises(CheckpointError, match=r"format 1, of three files; .* reads format 2, one file"):
            read(folder)


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


@pytest.mark.parametrize("broken", ["safetensors.numpy.save_file", "os.fsync"])
def test_a_save_that_meets_a_full_disk_leaves_the_old_model_whole(folder, monkeypatch, broken):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(folder, made(seed=1))
    monkeypatch.undo()
    assert same(load_checkpoint(folder), made(seed=0))
    assert os.listdir(folder) == ["model.safetensors"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_save_interrupted_before_its_rename_leaves_the_old_model_whole(folder, monkeypatch, error):
    def interrupted(*_):
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_checkpoint(folder, made(seed=1))
    monkeypatch.undo()
    assert os.listdir(folder) == ["model.safetensors"]
    assert same(load_checkpoint(folder), made(seed=0))


def test_a_folder_can_be_loaded_when_a_save_is_killed_before_its_rename(folder, tmp_path, monkeypatch):
    rename = os.replace

    def watched(*paths):
        shutil.copytree(folder, tmp_path / "killed")  # what a kill before the rename would leave
        rename(*paths)

    monkeypatch.setattr(os, "replace", watched)
    save_checkpoint(folder, made(seed=1))
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "killed")) == 2
    assert same(load_checkpoint(tmp_path / "killed"), made(seed=0))


@pytest.mark.parametrize(("value", "half"), [(float("nan"), False), (1e5, True)])
def test_weights_that_could_not_be_loaded_again_do_not_replace_a_model(folder, value, half):
    spoilt = made(seed=1)
    with torch.no_grad():
        spoilt.model.decoder.output_bias[5] = value
    with pytest.raises(CheckpointError, match=r"decoder\.output_bias"):
        save_checkpoint(folder, spoilt, half)
    assert same(load_checkpoint(folder), made(seed=0))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"annotation_size": 0},
        {"attention": "multi_head", "attention_options": {"heads": 2}},
        {"decoder": "transformer", "hidden_size": 8, "heads": 2},
    ],
)
def test_every_kind_of_model_comes_back(tmp_path, changes):
    saved = dataclasses.replace(made(), model=small_model(20, **changes))
    save_checkpoint(tmp_path / "model", saved)
    loaded = load_checkpoint(tmp_path / "model")
    assert same(loaded, saved)
    assert loaded.model.config == saved.model.config


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
