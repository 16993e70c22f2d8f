"""Imports, public names and the wheel."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mm
from mm.core import torchvision_schemas

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {
    "mm": [
        "ImageEditPipeline",
        "InterleavedPipeline",
        "Patch",
        "SVDQuantConfig",
        "SliderPrompts",
        "TextToImagePipeline",
        "UnderstandingPipeline",
        "__version__",
        "customize",
        "draw_apart",
        "erase",
        "load",
        "load_nunchaku",
        "merge",
        "quantize",
        "read_lora",
        "read_nunchaku",
        "write_lora",
    ],
    "mm.pipelines": ["ImageEditPipeline", "InterleavedPipeline", "TextToImagePipeline", "UnderstandingPipeline"],
    "mm.tokenizers": ["VisionTokenizer", "Autoencoder", "Bridge"],
}


def test_heavy_neighbours_import_from_the_root(python):
    """Root folders shadow no package, and a torchvision without its library is no obstacle."""
    code = "import mm, transformers, diffusers, peft, open_clip, tokenizers; print(tokenizers.__file__)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


@pytest.mark.parametrize("code", ["import mm, torchvision.ops", "import torch, mm, torchvision.ops"])
def test_torchvision_imports_after_mm(python, code):
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_importing_torch_runs_nothing_of_mm(python):
    code = "import torch, sys; print([name for name in sys.modules if name.split('.')[0] == 'mm'])"
    assert python("-c", code).stdout.strip() == "[]"
    points = importlib.metadata.distribution("mm-gen").entry_points
    assert {point.group for point in points} <= {"console_scripts", "mm.families"}


def test_the_version_stands_in_one_place():
    assert importlib.metadata.version("mm-gen") == mm.__version__


def test_a_torchvision_that_loads_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(torchvision_schemas, "_loads", lambda library: True)
    monkeypatch.setattr(torchvision_schemas, "_kept", [])
    torchvision_schemas._define_missing(tmp_path)
    assert torchvision_schemas._kept == []


def test_importing_mm_costs_no_torch(python):
    modules = ", ".join([*PUBLIC, "mm.kernels", "mm.ui", "mm.core.paths", "mm.cli"])
    code = (
        f"import sys, {modules}, importlib.util; importlib.util.find_spec('torchvision');"
        "print([name for name in ('torch', 'numpy', 'diffusers', 'transformers', 'gradio') if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_frozen_and_load(package):
    """Changing this list is a line in CHANGELOG.md."""
    module = importlib.import_module(package)
    assert module.__all__ == PUBLIC[package]
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(
        AttributeError,
        match=r"no attribute 'Pipeline'; it offers ImageEditPipeline, InterleavedPipeline, Patch, SVDQuantConfig",
    ):
        mm.Pipeline  # noqa: B018


def test_root_folders_are_no_packages():
    """A regular package `tokenizers` in the working directory would shadow Hugging Face's."""
    for name in ("tokenizers", "pipelines", "kernels", "ui"):
        assert (ROOT / name).is_dir()
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.wheel
def test_the_wheel_holds_everything_and_runs(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"mm/py.typed", "mm/tokenizers/__init__.py", "mm/tokenizers/autoencoder.py", "mm/weights/README.md"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mm", "mm_gen"}

    python = _venv_that_sees_our_packages(tmp_path / "venv")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    code = (
        "import mm, transformers, diffusers, peft, open_clip, mm.tokenizers, mm.core.paths as paths;"
        "from mm.tokenizers import Autoencoder;"
        "print(mm.__file__, paths.weights_dir(), *mm.tokenizers.__path__, sep='\\n')"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(tmp_path / "venv") for line in done.stdout.splitlines()), done.stdout
    subprocess.run([python.parent / "mm", "doctor"], cwd=tmp_path, check=True)


def _venv_that_sees_our_packages(folder: Path) -> Path:
    """A fresh environment beside this one: a .pth line shows it our site-packages, but not our editable mm."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "neighbours.pth").write_text("\n".join(ours) + "\n")
    return folder / "bin" / "python"
