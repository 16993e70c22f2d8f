"""A tiny model for batch jobs, as a folder and as an engine that counts."""

from __future__ import annotations

import pytest
from batch_rows import Counting
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def _pipe(folder):
    return Counting(folder)


@pytest.fixture
def counting(_pipe):
    _pipe.drawn = _pipe.loads = _pipe.calls = 0
    return _pipe
