"""Names of models, and files that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mm.core.files
import mm.core.paths
from mm.core.errors import UserError
from mm.core.paths import embedded_models, resolve_model


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """An embedded model `mm-tiny` with one component, and the working directory beside it."""
    model = tmp_path / "weights" / "mm-tiny"
    (model / "trunk").mkdir(parents=True)
    index = {"_class_name": "X", "trunk": ["mm.models.trunk", "Trunk"], "bridge": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    monkeypatch.setattr(mm.core.paths, "weights_dir", lambda: tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return model


def test_weights_lie_in_the_checkout():
    assert mm.core.paths.weights_dir() == Path(mm.__file__).resolve().parents[1] / "weights"


def test_weights_stay_small_and_safe():
    """They travel in every clone and wheel; a pickle can run code."""
    found = [path for path in mm.core.paths.weights_dir().rglob("*") if path.is_file()]
    sizes = {path.name: path.stat().st_size / 2**20 for path in found}
    assert sum(path.stat().st_size for path in found) <= 44 * 2**20, sizes
    assert all(size <= 16 for size in sizes.values()), sizes
    assert not [path for path in found if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz"}]


def test_an_embedded_name_a_folder_and_a_hub_name(weights):
    assert resolve_model("mm-tiny") == weights
    assert resolve_model("weights/mm-tiny") == Path("weights/mm-tiny")
    assert resolve_model(weights) == weights
    assert resolve_model("black-forest-labs/FLUX.1-dev") == "black-forest-labs/FLUX.1-dev"
    assert embedded_models() == ["mm-tiny"]


@pytest.mark.parametrize(
    "name",
    ["mm-tinny", "", "~nobody-of-this-name/x", "./nowhere", "/nowhere/at/all", "owner/name/more", "https://x.y/z"],
)
def test_what_is_no_model_says_what_there_is(weights, name):
    with pytest.raises(UserError, match=r"embedded are mm-tiny"):
        resolve_model(name)


def test_broken_folders_are_told_at_once(weights):
    with pytest.raises(UserError, match=r"holds no model_index\.json"):
        resolve_model(weights / "trunk")
    with pytest.raises(UserError, match=r"is a file"):
        resolve_model(weights / "model_index.json")
    (weights / "trunk").rmdir()
    with pytest.raises(UserError, match=r"lacks the folders trunk"):
        resolve_model("mm-tiny")
    for broken in ("{", "[]", "\xff"):
        (weights / "model_index.json").write_text(broken, encoding="latin-1")
        with pytest.raises(UserError, match=r"cannot be read"):
            resolve_model("mm-tiny")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "new" / "result.json"
    mm.core.files.write_json(target, {"overall": 0.9})
    with pytest.raises(ValueError, match="JSON"):
        mm.core.files.write_json(target, float("nan"))
    assert json.loads(target.read_text()) == {"overall": 0.9}
    target.chmod(0o400)
    mm.core.files.write_text(target, "again\n")
    assert target.read_text() == "again\n"
    assert list(target.parent.iterdir()) == [target]
