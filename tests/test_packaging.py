"""What people install: the files of the wheel, the commands, and the names it adds to an environment."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import PHOTOS

ROOT = Path(__file__).parents[1]
COMMANDS = ["captioner", "captioner-demo", "captioner-train", "captioner-evaluate", "captioner-compare"]
COMMANDS += ["captioner-prepare", "captioner-shard", "captioner-export", "captioner-bulk"]
INSTALLED = {"captioner": "captioner", "app": "captioner_app", "training": "captioner_training"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, in which building leaves its files."""
    folder = tmp_path_factory.mktemp("source")
    for name in INSTALLED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(source: Path, kind: str, output: Path) -> Path:
    """The path of the wheel that setuptools builds: of kind `wheel` or `editable`."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(output)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (path,) = output.glob("*.whl")
    return path


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a folder of its own, without its dependencies. Returns the folder."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def run(installed: Path, *command: object) -> str:
    """What a command prints that runs in an empty folder with the installed package."""
    (installed.parent / "elsewhere").mkdir(exist_ok=True)
    done = subprocess.run(
        list(map(str, command)),
        cwd=installed.parent / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_package_of_the_checkout_is_in_the_wheel_under_its_installed_name(wheel):
    expected = set()
    for name, installed in INSTALLED.items():
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name not in ("README.md", "results.md"):
                expected.add(f"{installed}/{path.relative_to(ROOT / name).as_posix()}")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == expected


def test_the_metadata_say_that_the_weights_are_not_under_the_licence_of_the_code(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert metadata["License-Expression"] == "MIT AND LicenseRef-Weights-NonCommercial"
        assert "weights: non-commercial use" in metadata["Summary"]
        assert metadata.get_all("License-File") == ["LICENSE", "captioner/pretrained/LICENSE"]
        for file in metadata.get_all("License-File"):
            assert archive.read(name.replace("METADATA", f"licenses/{file}")) == (ROOT / file).read_bytes()


def test_an_install_adds_no_module_of_a_common_name(installed):
    folders = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {"bin", *INSTALLED.values()}
    assert {path.name for path in (installed / "bin").iterdir()} - {"__pycache__"} == set(COMMANDS)


def test_each_command_has_help_that_names_it(installed):
    script = """
import contextlib, runpy, sys
folder, *commands = sys.argv[1:]
for command in commands:
    sys.argv = [f"{folder}/{command}", "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
"""
    text = run(installed, sys.executable, "-c", script, installed / "bin", *COMMANDS)
    assert re.findall("^usage: (.+?) \\[", text, re.MULTILINE) == COMMANDS


def test_the_installed_command_captions_a_photo(installed):
    caption = run(installed, installed / "bin" / "captioner", PHOTOS / "cat.jpg")
    assert caption == "a close up of a cat looking at the camera\n"


def test_the_package_captions_and_draws_in_an_environment_without_torch(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    done = subprocess.run([programs / "pip", "install", "--quiet", wheel], capture_output=True, text=True)
    if "No matching distribution" in done.stderr:
        pytest.skip("pip finds no packages here")
    assert done.returncode == 0, done.stderr
    script = f"""
import importlib.util, sys
from captioner import Captioner
from captioner.explain import explain
assert importlib.util.find_spec("torch") is None
model = Captioner.from_pretrained()
result = model.caption({str(PHOTOS / "cat.jpg")!r}, keep_annotations=True)
result.heatmap("cat").save("cat.png")
result.figure().save("figure.png")
print(result, len(explain(model, result)), model.teacher_forced(result.image, "a cat").words, sep="\\n")
try:
    Captioner.from_pretrained(engine="torch")
except ImportError as error:
    print(error)
"""
    found = run(tmp_path / "none", programs / "python", "-c", script).splitlines()
    assert found[:3] == ["a close up of a cat looking at the camera", "11", "('a', 'cat')"]
    assert "pip install 'captioner[torch]'" in found[3]
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"cat.png", "figure.png"}
    caption = run(tmp_path / "none", programs / "captioner", PHOTOS / "cat.jpg", "--heatmaps", "maps")
    assert caption == "a close up of a cat looking at the camera\n"
    assert (tmp_path / "elsewhere" / "maps" / "cat.jpg.png").is_file()
    done = subprocess.run([programs / "captioner-train", "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "captioner-train needs the package torch: pip install 'captioner[training]'\n"


def test_the_installed_modules_import_nothing_from_a_checkout(installed):
    """Every module is imported, and none has come from elsewhere or brought one named app or training."""
    script = """
import importlib, pkgutil, sys
for name in ("captioner", "captioner_app", "captioner_training"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] in ("app", "training", "captioner", "captioner_app", "captioner_training"):
        print(name, module.__file__)
"""
    modules = dict(line.split(" ", 1) for line in run(installed, sys.executable, "-c", script).splitlines())
    assert {name.partition(".")[0] for name in modules} == set(INSTALLED.values())
    assert all(Path(file).is_relative_to(installed) for file in modules.values())
    assert {"captioner_app.server", "captioner_training.train"} <= modules.keys()


def test_an_editable_install_finds_the_packages_in_the_checkout(source, tmp_path):
    (tmp_path / "wheel").mkdir()
    folder = install(build(source, "editable", tmp_path / "wheel"), tmp_path / "installed")
    script = f"""
import importlib.util, site
site.addsitedir({str(folder)!r})
for name in ("captioner", "captioner_app", "captioner_training", "app", "training"):
    found = importlib.util.find_spec(name)
    print(found and found.origin)
"""
    # Without this environment's own packages, among which captioner may be.
    found = run(folder, sys.executable, "-I", "-S", "-c", script).split()
    assert found == [*(str(source / name / "__init__.py") for name in INSTALLED), "None", "None"]
