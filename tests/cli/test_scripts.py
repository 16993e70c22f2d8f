"""`--help` of every script prints help and writes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
FOLDERS = ("mm", "pipelines", "tokenizers", "kernels", "ui", "benchmarks", "examples")
SCRIPTS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__main__.py" and MAIN.search(path.read_text(encoding="utf-8"))
)


def test_there_are_scripts():
    assert len(SCRIPTS) > 10


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_and_writes_nothing(script, tmp_path):
    before = state()
    name = ["-m", script[:-3].replace("/", ".")] if script.startswith("mm/") else [str(ROOT / script)]
    done = subprocess.run([sys.executable, *name, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout.lower(), "no argument parser"
    assert not list(tmp_path.iterdir())
    assert state() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_parses_its_arguments(script):
    """The quick half of the test above: a script that reads no arguments would start to work."""
    text = (ROOT / script).read_text(encoding="utf-8")
    assert re.search(r"\bparse_args\(|\btyper\b|\barguments\(\)", text), f"{script} takes --help for work to do"


def state() -> dict[str, float]:
    """When each tracked file was written last."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: (ROOT / name).stat().st_mtime for name in listed.splitlines() if (ROOT / name).is_file()}
