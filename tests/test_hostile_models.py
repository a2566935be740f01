"""A model folder from a stranger either loads or gives a CheckpointError, soon, and within little memory."""

import json
import random
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import small_model
from fuzz import SECONDS, one_sentence, peak_memory
from PIL import Image
from safetensors.torch import load, save

from captioner.api import Captioner
from captioner.checkpoint import Checkpoint, CheckpointError, digest, load_checkpoint, save_checkpoint
from captioner.images import Preprocessing
from captioner.vocabulary import Vocabulary

CHANGES = {"encoder": "squeezenet1_1", "encoder_self_attention": 1, "annotation_size": 16, "heads": 2}
JUNK = [-1, 0, 1, 3, 64, 1000, 10**9, 2**63, 10**40, 1.5, -1e300, float("nan"), float("inf"), None, True, "", "x", "12"]
JUNK += [
    [],
    {},
    [1, 2],
    [10**9, 10**9],
    [-1, 2],
    ["a", "b"],
    [[1], [2]],
    "fasterrcnn_resnet50_fpn",
    "vgg16",
    "dot",
    "features.3",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The three files of a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = Vocabulary([f"word{number}" for number in range(16)])
    save_checkpoint(folder, Checkpoint(small_model(20, **CHANGES), vocabulary, Preprocessing((64, 64)), {"a": 1}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: dict[str, bytes], sign: bool = True) -> Path:
    """Write the files of a model, with the digests of two in the third's header where it has one."""
    weights = files["model.safetensors"]
    if sign:
        size = struct.unpack("<Q", weights[:8])[0]
        header = json.loads(weights[8 : 8 + size])
        header["__metadata__"] = {name: digest(files[f"{name}.json"]) for name in ("config", "vocabulary")}
        encoded = json.dumps(header).encode()
        weights = struct.pack("<Q", len(encoded)) + encoded + weights[8 + size :]
    folder.mkdir(exist_ok=True)
    for name, data in {**files, "model.safetensors": weights}.items():
        (folder / name).write_bytes(data)
    return folder


def with_long_header(weights: bytes) -> bytes:
    """The weights file with 100 MB of metadata."""
    size = struct.unpack("<Q", weights[:8])[0]
    header = json.dumps({**json.loads(weights[8 : 8 + size]), "__metadata__": {"a": "b" * 10**8}}).encode()
    return struct.pack("<Q", len(header)) + header + weights[8 + size :]


def with_config(files: dict[str, bytes], part: str | None, **values: object) -> dict[str, bytes]:
    """The files with values of the configuration replaced, in one of its parts or at its top."""
    config = json.loads(files["config.json"])
    (config[part] if part else config).update(values)
    return {**files, "config.json": json.dumps(config).encode()}


def with_words(files: dict[str, bytes], text: str) -> dict[str, bytes]:
    return {**files, "vocabulary.json": text.encode("utf-8", "surrogatepass")}


def with_tensor(files: dict[str, bytes], name: str, change) -> dict[str, bytes]:
    tensors = load(files["model.safetensors"])
    tensors[name] = change(tensors[name])
    return {**files, "model.safetensors": save(tensors)}


WEIGHT = "decoder.output_bias"
WORDS = [f"word{number}" for number in range(16)]
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "hidden size": (lambda f: with_config(f, "model", hidden_size=10**9), "hidden_size cannot be 1000000000"),
    "hidden size within limits": (lambda f: with_config(f, "model", hidden_size=2**20), "shape"),
    "every size": (
        lambda f: with_config(f, "model", hidden_size=2**20, embedding_size=2**20, attention_size=2**20),
        "shape",
    ),
    "negative size": (lambda f: with_config(f, "model", attention_size=-1), "attention_size cannot be -1"),
    "text for a number": (lambda f: with_config(f, "model", hidden_size="9"), "hidden_size cannot be '9'"),
    "truth for a number": (lambda f: with_config(f, "model", hidden_size=True), "hidden_size cannot be True"),
    "grid": (lambda f: with_config(f, "model", grid=[10**9, 10**9]), "grid cannot be"),
    "layers": (lambda f: with_config(f, "model", encoder_self_attention=10**9), "encoder_self_attention cannot be"),
    "large encoder": (lambda f: with_config(f, "model", encoder="regnet_y_128gf"), "lacks"),
    "no encoder": (lambda f: with_config(f, "model", encoder="os.system"), "no classification network"),
    "encoder that downloads": (
        lambda f: with_config(f, "model", encoder="fasterrcnn_resnet50_fpn"),
        "no classification network 'fasterrcnn_resnet50_fpn'",
    ),
    "unknown name": (lambda f: with_config(f, "model", __class__=1), "__class__"),
    "model of another kind": (lambda f: with_config(f, None, model=[1]), "does not describe a model"),
    "no preprocessing": (lambda f: with_config(f, None, preprocessing=None), "does not describe a model"),
    "about of another kind": (lambda f: with_config(f, None, about=[1]), "about should be an object"),
    "huge input": (lambda f: with_config(f, "preprocessing", size=[10**9, 10**9]), "from 1 to 4096"),
    "deep configuration": (lambda f: {**f, "config.json": DEEP.encode()}, "truncated or not JSON"),
    "long configuration": (lambda f: {**f, "config.json": b" " * 20_000_000 + f["config.json"]}, "more than 16 MiB"),
    "configuration in no UTF-8": (lambda f: {**f, "config.json": b"\xff" + f["config.json"]}, "truncated or not JSON"),
    "repeated word": (lambda f: with_words(f, json.dumps(WORDS[:-1] + WORDS[:1])), "repeat"),
    "special word": (lambda f: with_words(f, json.dumps([*WORDS[:-1], "<end>"])), "repeat"),
    "empty word": (lambda f: with_words(f, json.dumps([*WORDS[:-1], ""])), "empty word"),
    "number for a word": (lambda f: with_words(f, json.dumps([*WORDS[:-1], 1])), "strings, not 1"),
    "list for a word": (lambda f: with_words(f, json.dumps([*WORDS[:-1], []])), r"strings, not \[\]"),
    "half a letter": (lambda f: with_words(f, json.dumps([*WORDS[:-1], "\ud800"])), "surrogates not allowed"),
    "too many words": (lambda f: with_words(f, json.dumps([*WORDS, "more"])), "has 21 words"),
    "deep vocabulary": (lambda f: with_words(f, DEEP), "truncated or not JSON"),
    "truncated weights": (
        lambda f: {**f, "model.safetensors": f["model.safetensors"][:-9]},
        "truncated or not a safetensors file",
    ),
    "extended weights": (
        lambda f: {**f, "model.safetensors": f["model.safetensors"] + b"more"},
        "truncated or not a safetensors file",
    ),
    "integers": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.int), "is of type I32, expected torch.float32"),
    "double precision": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.double), "is of type F64"),
    "truth values": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.bool), "is of type BOOL"),
    "not a number": (lambda f: with_tensor(f, WEIGHT, lambda t: t * float("nan")), "not finite"),
    "other shape": (lambda f: with_tensor(f, WEIGHT, lambda t: t[None]), "has shape"),
    "no tensors": (lambda f: {**f, "model.safetensors": save({})}, "lacks"),
    "long header": (
        lambda f: {**f, "model.safetensors": with_long_header(f["model.safetensors"])},
        "header has more than 16 MiB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_is_refused_soon_and_within_little_memory(files, tmp_path, case):
    change, message = HOSTILE[case]
    folder = write(tmp_path / "model", change(files), sign=case not in ("long header",))
    before, began = peak_memory(reset=True), time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(folder)
    assert one_sentence(str(error.value))
    assert str(folder) in str(error.value)
    assert time.process_time() - began < SECONDS
    assert peak_memory() - before < 200


def mutated(files: dict[str, bytes], chance: random.Random) -> tuple[dict[str, bytes], bool]:
    """The files with one random change, and whether their digests are made right again."""
    name = chance.choice(sorted(files))
    data = bytearray(files[name])
    kind = chance.choice(["bytes", "cut", "value", "value", "value", "value"])
    if kind == "bytes":
        end = len(data) if name != "model.safetensors" or chance.random() < 0.3 else 6000  # most often in the header
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(end)] = chance.randrange(256)
        return {**files, name: bytes(data)}, name != "model.safetensors"
    if kind == "cut":
        first, last = sorted(chance.randrange(len(data)) for _ in range(2))
        return {**files, name: bytes(data[:first] + data[last:])}, name != "model.safetensors"
    if name == "config.json":
        part = chance.choice(["model", "model", "model", "preprocessing", None])
        config = json.loads(data)
        return with_config(
            files, part, **{chance.choice(sorted(config[part] if part else config)): chance.choice(JUNK)}
        ), True
    if name == "vocabulary.json":
        words = json.loads(data)
        words[chance.randrange(len(words))] = chance.choice([*JUNK, *words, "<pad>", "\x1b[2J", "a b", "\ud800"])
        return with_words(files, json.dumps(words)), True
    tensors = load(bytes(data))
    one, other = chance.sample(sorted(tensors), 2)
    changes = [
        lambda: tensors.update({one: tensors[other], other: tensors[one]}),
        lambda: tensors.pop(one),
        lambda: tensors.update(
            {one: tensors[one].to(chance.choice([torch.int8, torch.float64, torch.bool, torch.half]))}
        ),
        lambda: tensors.update({one: tensors[one].flatten()[:-1].clone()}),
        lambda: tensors.update(
            {one: torch.full_like(tensors[one].float(), chance.choice([float("nan"), 1e38, -1e38, 0]))}
        ),
        lambda: tensors.update({f"{one}x": tensors[one]}),
    ]
    chance.choice(changes)()
    return {**files, name: save({key: tensor.clone() for key, tensor in tensors.items()})}, True


def try_models(files: dict[str, bytes], folder: Path, count: int, seed: int) -> tuple[int, int]:
    """Load that many models with random changes; how many loaded and how many were refused. Those loaded are used."""
    chance, loaded = random.Random(seed), 0
    photo = Image.new("RGB", (64, 64), "red")
    for number in range(count):
        changed, sign = mutated(files, chance)
        write(folder, changed, sign)
        began = time.process_time()
        try:
            captioner = Captioner.from_pretrained(folder)
        except CheckpointError as error:
            said = str(error)
        else:
            said = str(captioner.caption(photo, beam_size=2, max_length=2))
            loaded += 1
        assert one_sentence(said), (seed, number)
        assert time.process_time() - began < SECONDS, (seed, number)
    return loaded, count - loaded


def test_models_with_random_changes_load_or_are_refused(files, tmp_path):
    before = peak_memory(reset=True)
    loaded, refused = try_models(files, tmp_path / "model", 200, seed=0)
    assert loaded > 10
    assert refused > 50
    assert peak_memory() - before < 200
