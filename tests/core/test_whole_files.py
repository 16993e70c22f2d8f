"""Writing files: where a path cannot be a file, the message names the path that was given, and nothing is left."""

from __future__ import annotations

import pytest

from mm.core.errors import UserError
from mm.core.files import write_bytes, write_files, write_json


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


def test_files_that_belong_together_are_written_all_or_none(tmp_path):
    """The second file cannot be written (its hidden name is too long, as a full disk refuses it): the first stays."""
    one, other = tmp_path / "a.json", tmp_path / ("x" * 250)
    one.write_text("before")
    with pytest.raises(OSError) as caught:
        write_files({one: b"after", other: b"new"})
    assert caught.value.filename == str(other)
    assert one.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder is a folder"):
        write_files({one: b"after", tmp_path / "folder": b""})
    assert one.read_text() == "before"
    write_files({one: b"after", tmp_path / "deeper" / "b": b"new"})
    assert one.read_text() == "after" and (tmp_path / "deeper" / "b").read_text() == "new"
