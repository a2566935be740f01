"""A page that captions photographs inside the browser, as a folder for any web server; for `captioner-export --web`."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from pathlib import Path

from captioner.files import replacing
from captioner.heatmap import ANCHORS, colour_table
from captioner.hiding import EVIDENCE_WINDOW
from captioner.modelfile import MODEL_FILE, read_model, save_model
from captioner.search import BEAM_SIZE, BLOCK_NGRAMS, LENGTH_PENALTY, MAX_LENGTH

FILES = Path(__file__).parent  # of the page; some are also the demo's
VIEWER = tuple(FILES / name for name in ("regions.js", "changes.js", "viewer.js"))
RUNTIME_PACKAGE, RUNTIME = "onnxruntime-web@1.30.0", "onnxruntime-web-1.30.0.tgz"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # from npm
TIMEOUT = 300  # seconds for npm to fetch it
ONE_FILE = b"model.safetensors"  # in graphs that were written before each weight was a file of its own


def write_page(model: Path, folder: Path, runtime: bytes) -> None:
    """Write the page with a model.

    The folder then has the page's own files, the model with its weights in float16, and ONNX Runtime. A model that is
    stored in float16 gives the captions that it gives in the library with `engine="onnx-float32"`.

    Args:
        model: the model's file. Graphs are made for the page where it has none, or those of an earlier version, which
            needs torch.
        folder: where to write; made if need be. Other files in it are left as they are.
        runtime: what `read_runtime` gave.

    Raises:
        CheckpointError: there is no such model, it has a weight that is not finite in float16, or it cannot be written.
        ImportError: a package for graphs is missing.
        OSError: a file cannot be written.
    """
    description, weights = read_model(model)
    graphs = description.graphs
    if graphs is None or ONE_FILE in graphs.step.model:
        from captioner.network.export import export_graphs

        graphs = export_graphs(description.config, description.preprocessing.size)
    # In WebAssembly a step in 8 bits is the slower one: the operator makes float32 of all integers each time.
    description = dataclasses.replace(description, graphs=graphs._replace(quantized_step=None))
    save_model(folder / MODEL_FILE, description, weights, half=True)
    copied = shutil.ignore_patterns("*.py", "__pycache__", "make.js", *(path.name for path in VIEWER))
    shutil.copytree(FILES, folder, ignore=copied, dirs_exist_ok=True)
    viewer = f"export function viewer(element, props, watch, trigger) {{\n{component_script(*VIEWER)}}}\n"
    (folder / "viewer.js").write_text(viewer, "utf-8")
    search: dict[str, float] = {
        "beam_size": BEAM_SIZE,
        "max_length": MAX_LENGTH,
        "length_penalty": LENGTH_PENALTY,
        "block_ngrams": BLOCK_NGRAMS,
    }
    colours = {name: colour_table(name).astype(int).tolist() for name in ANCHORS}
    settings = {"search": search, "evidence_window": EVIDENCE_WINDOW, "colours": colours}
    (folder / "settings.json").write_text(json.dumps(settings), "utf-8")
    write_runtime(runtime, folder / "onnxruntime")


def component_script(*scripts: Path) -> str:
    """The body of the function that draws a component: scripts of this folder or of the demo, after what all use."""
    return "".join(file.read_text("utf-8") for file in (FILES / "make.js", *scripts))


def write_runtime(runtime: bytes, folder: Path) -> None:
    """Write ONNX Runtime for one thread on the CPU, with its licence.

    The script ends in `.js`, because some web servers do not know `.mjs`. The program is compressed here, from 14 MB
    to 4, because few web servers do so by themselves.
    """
    import onnxruntime

    folder.mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(runtime)) as archive:
        script, program = (
            archive.extractfile(f"package/dist/{name}").read()  # type: ignore[union-attr]  # they are regular files
            for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
        )
    (folder / "ort.js").write_bytes(script)
    (folder / "ort.wasm.zlib").write_bytes(zlib.compress(program, 9))
    # The package of npm has no licence in it; Python's is of the same project.
    for name in ("LICENSE", "ThirdPartyNotices.txt"):
        shutil.copy(Path(onnxruntime.__file__).parent / name, folder)


def read_runtime(path: Path | None = None) -> bytes:
    """The package onnxruntime-web of npm, in the version that the page is written for.

    The program `npm` fetches it once; it is kept in the user's cache folder.

    Args:
        path: the package's file, as `npm pack` gives it; None to fetch it.

    Raises:
        OSError: the file cannot be read, or npm is not installed or cannot fetch it.
        ValueError: it is not that version.
    """
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "captioner" / RUNTIME
    if path or cached.is_file():
        return checked((path or cached).read_bytes(), str(path or cached))
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", RUNTIME_PACKAGE, "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            raise OSError(f"npm pack {RUNTIME_PACKAGE}: {reason}; give its file with --onnxruntime-web") from error
        data = checked((Path(folder) / RUNTIME).read_bytes(), RUNTIME_PACKAGE)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with replacing(cached) as temporary:
        temporary.write_bytes(data)
    return data


def checked(data: bytes, source: str) -> bytes:
    """The same data. Raises ValueError unless it is `RUNTIME`, by its checksum."""
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != RUNTIME_SHA512:
        raise ValueError(f"{source} is not {RUNTIME}: it has another checksum")
    return data
