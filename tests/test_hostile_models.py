"""A model file from a stranger either loads or gives a CheckpointError, soon, and within little memory."""

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_model
from fuzz import SECONDS, one_sentence, peak_memory
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save

from captioner.api import Captioner
from captioner.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.images import Preprocessing
from captioner.modelfile import MODEL_FILE, CheckpointError
from captioner.vocabulary import Vocabulary

# A model in parts: the texts of the header by name, and under "weights" a file with the tensors alone.
Parts = dict[str, Any]

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
def parts(tmp_path_factory) -> Parts:
    """A tiny model."""
    path = tmp_path_factory.mktemp("tiny") / MODEL_FILE
    vocabulary = Vocabulary([f"word{number}" for number in range(16)])
    save_checkpoint(path, Checkpoint(small_model(20, **CHANGES), vocabulary, Preprocessing((64, 64)), {"a": 1}))
    with safe_open(path, "pt") as file:
        return {**file.metadata(), "weights": save(load(path.read_bytes()))}


def assemble(parts: Parts | bytes) -> bytes:
    """The bytes of a model's file; those of a file are returned as they are."""
    if isinstance(parts, bytes):
        return parts
    header, body = split(parts["weights"])
    header["__metadata__"] = {name: text for name, text in parts.items() if name != "weights"}
    return join(json.dumps(header).encode(), body)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def with_values(parts: Parts, part: str, **values: object) -> Parts:
    """The model with values of its configuration or its preprocessing replaced."""
    return {**parts, part: json.dumps({**json.loads(parts[part]), **values})}


def with_words(parts: Parts, words: object) -> Parts:
    return {**parts, "vocabulary": json.dumps(words)}


def with_tensor(parts: Parts, name: str, change) -> Parts:
    tensors = load(parts["weights"])
    tensors[name] = change(tensors[name])
    return {**parts, "weights": save(tensors)}


WEIGHT = "decoder.output_bias"
WORDS = [f"word{number}" for number in range(16)]
DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {
    "hidden size": (lambda f: with_values(f, "model", hidden_size=10**9), "hidden_size cannot be 1000000000"),
    "hidden size within limits": (lambda f: with_values(f, "model", hidden_size=2**20), "shape"),
    "every size": (
        lambda f: with_values(f, "model", hidden_size=2**20, embedding_size=2**20, attention_size=2**20),
        "shape",
    ),
    "negative size": (lambda f: with_values(f, "model", attention_size=-1), "attention_size cannot be -1"),
    "text for a number": (lambda f: with_values(f, "model", hidden_size="9"), "hidden_size cannot be '9'"),
    "truth for a number": (lambda f: with_values(f, "model", hidden_size=True), "hidden_size cannot be True"),
    "grid": (lambda f: with_values(f, "model", grid=[10**9, 10**9]), "grid cannot be"),
    "layers": (lambda f: with_values(f, "model", encoder_self_attention=10**9), "encoder_self_attention cannot be"),
    "large encoder": (lambda f: with_values(f, "model", encoder="regnet_y_128gf"), "lacks"),
    "no encoder": (lambda f: with_values(f, "model", encoder="os.system"), "no classification network"),
    "encoder that downloads": (
        lambda f: with_values(f, "model", encoder="fasterrcnn_resnet50_fpn"),
        "no classification network 'fasterrcnn_resnet50_fpn'",
    ),
    "unknown name": (lambda f: with_values(f, "model", __class__=1), "__class__"),
    "options of another kind": (
        lambda f: with_values(f, "model", attention_options=[1]),
        "attention_options cannot be",
    ),
    "unknown option": (lambda f: with_values(f, "model", attention_options={"x": 1}), "has no option 'x'"),
    "nested option": (lambda f: with_values(f, "model", attention_options={"x": [1]}), "attention_options cannot be"),
    "many heads": (
        lambda f: with_values(f, "model", attention="multi_head", attention_options={"heads": 2**23}),
        "cannot be divided",
    ),
    "text for heads": (
        lambda f: with_values(f, "model", attention="multi_head", attention_options={"heads": "2"}),
        "'heads' of attention 'multi_head' should be a int",
    ),
    "long name": (lambda f: with_values(f, "model", encoder="x" * 10**6), "encoder cannot be"),
    "model of another kind": (lambda f: {**f, "model": "[1]"}, "its model should be a JSON dict, not a list"),
    "no preprocessing": (lambda f: {**f, "preprocessing": "null"}, "its preprocessing should be a JSON dict"),
    "missing preprocessing": (
        lambda f: {name: text for name, text in f.items() if name != "preprocessing"},
        "its preprocessing is missing",
    ),
    "about of another kind": (lambda f: {**f, "about": "[1]"}, "its about should be a JSON dict"),
    "no format": (lambda f: {name: text for name, text in f.items() if name != "format"}, "names no format"),
    "long format": (lambda f: {**f, "format": "9" * 10**6}, "is of format 999"),
    "huge input": (lambda f: with_values(f, "preprocessing", size=[10**9, 10**9]), "from 1 to 4096"),
    "deep configuration": (lambda f: {**f, "model": DEEP}, "its model is truncated or not JSON"),
    "deep header": (lambda f: join(b'{"__metadata__":' + DEEP.encode() + b"}", b""), "not a safetensors file"),
    "text in no UTF-8": (lambda f: assemble(f).replace(b"word7", b"word\xff"), "not a safetensors file"),
    "half a letter in the header": (lambda f: {**f, "about": "\ud800"}, "not a safetensors file"),
    "repeated word": (lambda f: with_words(f, WORDS[:-1] + WORDS[:1]), "repeat"),
    "special word": (lambda f: with_words(f, [*WORDS[:-1], "<end>"]), "repeat"),
    "empty word": (lambda f: with_words(f, [*WORDS[:-1], ""]), "empty word"),
    "number for a word": (lambda f: with_words(f, [*WORDS[:-1], 1]), "strings, not 1"),
    "list for a word": (lambda f: with_words(f, [*WORDS[:-1], []]), r"strings, not \[\]"),
    "half a letter": (lambda f: with_words(f, [*WORDS[:-1], "\ud800"]), "surrogates not allowed"),
    "too many words": (lambda f: with_words(f, [*WORDS, "more"]), "has 21 words"),
    "repeated long words": (lambda f: with_words(f, [*WORDS[:-2], "x" * 10**6, "x" * 10**6]), "repeat"),
    "deep vocabulary": (lambda f: {**f, "vocabulary": DEEP}, "its vocabulary is truncated or not JSON"),
    "truncated file": (lambda f: assemble(f)[:-9], "truncated or not a safetensors file"),
    "extended file": (lambda f: assemble(f) + b"more", "truncated or not a safetensors file"),
    "integers": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.int), "is of type I32, expected torch.float32"),
    "double precision": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.double), "is of type F64"),
    "truth values": (lambda f: with_tensor(f, WEIGHT, torch.Tensor.bool), "is of type BOOL"),
    "not a number": (lambda f: with_tensor(f, WEIGHT, lambda t: t * float("nan")), "not finite"),
    "other shape": (lambda f: with_tensor(f, WEIGHT, lambda t: t[None]), "has shape"),
    "no tensors": (lambda f: {**f, "weights": save({})}, "lacks"),
    "long header": (lambda f: {**f, "about": "b" * 10**8}, "header has more than 16 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_model_is_refused_soon_and_within_little_memory(parts, tmp_path, case):
    change, message = HOSTILE[case]
    path = tmp_path / MODEL_FILE
    path.write_bytes(assemble(change(parts)))
    before, began = peak_memory(reset=True), time.process_time()
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(tmp_path)
    assert one_sentence(str(error.value))
    assert str(path) in str(error.value)
    assert time.process_time() - began < SECONDS
    assert peak_memory() - before < 200


def mutated(parts: Parts, chance: random.Random) -> bytes:
    """The model's file with one random change."""
    data = bytearray(assemble(parts))
    kind = chance.choice(["bytes", "cut", "value", "value", "value", "value"])
    if kind == "bytes":
        end = len(data) if chance.random() < 0.3 else 8000  # most often in the header
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(end)] = chance.randrange(256)
        return bytes(data)
    if kind == "cut":
        first, last = sorted(chance.randrange(len(data)) for _ in range(2))
        return bytes(data[:first] + data[last:])
    part = chance.choice(["model", "model", "model", "preprocessing", "vocabulary", "weights", "weights"])
    if part in ("model", "preprocessing"):
        name = chance.choice(sorted(json.loads(parts[part])))
        return assemble(with_values(parts, part, **{name: chance.choice(JUNK)}))
    if part == "vocabulary":
        words = json.loads(parts["vocabulary"])
        words[chance.randrange(len(words))] = chance.choice([*JUNK, *words, "<pad>", "\x1b[2J", "a b", "\ud800"])
        return assemble(with_words(parts, words))
    tensors = load(parts["weights"])
    name, other = chance.sample(sorted(tensors), 2)
    changes = [
        lambda: tensors.update({name: tensors[other], other: tensors[name]}),
        lambda: tensors.pop(name),
        lambda: tensors.update(
            {name: tensors[name].to(chance.choice([torch.int8, torch.float64, torch.bool, torch.half]))}
        ),
        lambda: tensors.update({name: tensors[name].flatten()[:-1].clone()}),
        lambda: tensors.update(
            {name: torch.full_like(tensors[name].float(), chance.choice([float("nan"), 1e38, -1e38, 0]))}
        ),
        lambda: tensors.update({f"{name}x": tensors[name]}),
    ]
    chance.choice(changes)()
    return assemble({**parts, "weights": save({key: tensor.clone() for key, tensor in tensors.items()})})


def try_models(parts: Parts, path: Path, count: int, seed: int) -> tuple[int, int]:
    """Load that many models with random changes; how many loaded and how many were refused. Those loaded are used."""
    chance, loaded = random.Random(seed), 0
    photo = Image.new("RGB", (64, 64), "red")
    for number in range(count):
        path.write_bytes(mutated(parts, chance))
        began = time.process_time()
        try:
            captioner = Captioner.from_pretrained(path)
        except CheckpointError as error:
            text = str(error)
        else:
            text = str(captioner.caption(photo, beam_size=2, max_length=2))
            loaded += 1
        assert one_sentence(text), (seed, number)
        assert time.process_time() - began < SECONDS, (seed, number)
    return loaded, count - loaded


def test_models_with_random_changes_load_or_are_refused(parts, tmp_path):
    before = peak_memory(reset=True)
    loaded, refused = try_models(parts, tmp_path / MODEL_FILE, 200, seed=0)
    assert loaded > 10
    assert refused > 50
    assert peak_memory() - before < 200
