"""Writing files: where a path cannot be a file, the message names the path that was given, and nothing is left."""

from __future__ import annotations

import pytest

from mm.core.errors import UserError
from mm.core.files import write_bytes, write_json


def test_a_path_that_cannot_be_a_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="folder is a folder; give a file name"):
        write_json(tmp_path / "folder", {})
    for place in ("file/x.json", "file/deeper/x.json"):
        with pytest.raises(UserError, match=f"file is no folder, so .*{place} cannot be written"):
            write_json(tmp_path / place, {})
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())


def test_what_the_system_refuses_names_the_file_and_not_the_hidden_one(tmp_path):
    with pytest.raises(OSError) as caught:
        write_bytes(tmp_path / ("x" * 250), b"")  # fits a name; with the hidden one's ending it does not
    assert caught.value.filename == str(tmp_path / ("x" * 250))
