"""The `mm` command as such: the table, laziness, errors. What commands do is tested beside them."""

from __future__ import annotations

import json
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

import mm
import mm.cli
from mm.core.errors import UserError


def test_help_is_quick_and_lists_the_commands(python):
    """It imports nothing that takes long."""
    code = (
        "import runpy, sys\nsys.argv = ['mm', '--help']\ntry: runpy.run_module('mm', run_name='__main__')\n"
        "finally: print([m for m in ('torch', 'numpy', 'diffusers', 'transformers', 'gradio') if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f" {name} " in done.stdout for name in mm.cli.COMMANDS)


def test_commands_are_frozen():
    """Changing this list is a line in CHANGELOG.md."""
    assert list(mm.cli.COMMANDS) == [
        "generate",
        "describe",
        "edit",
        "chat",
        "eval",
        "erase",
        "customize",
        "merge",
        "words",
        "provenance",
        "quantize",
        "train",
        "ui",
        "batch",
        "doctor",
    ]


@pytest.mark.parametrize("name", mm.cli.COMMANDS)
def test_every_command_helps_with_an_example(name):
    done = CliRunner().invoke(mm.cli.app, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Example" in done.output


def test_version():
    assert CliRunner().invoke(mm.cli.app, ["--version"]).stdout == f"mm {mm.__version__}\n"


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (UserError("steps is 0;\nask for at least 1"), "mm: steps is 0; ask for at least 1\n", 1),
        (
            FileNotFoundError(2, "No such file or directory", "jobs.jsonl"),
            "mm: jobs.jsonl: No such file or directory\n",
            1,
        ),
        (OSError("hub: not found"), "mm: hub: not found\n", 1),
        (typer.BadParameter("no such mode"), "mm: Invalid value: no such mode; see mm doctor --help\n", 2),
        (typer.Exit(2), "", 2),
    ],
)
def test_errors_become_one_line(monkeypatch, error, line, code):
    done = _run_a_command_that(monkeypatch, error)
    assert (done.stderr, done.exit_code) == (line, code)


def test_a_bug_keeps_its_traceback(monkeypatch):
    assert isinstance(_run_a_command_that(monkeypatch, KeyError("bug")).exception, KeyError)


def _run_a_command_that(monkeypatch, error: Exception):
    fake = types.ModuleType("fake_command")
    fake.app = typer.Typer(add_completion=False)

    @fake.app.command()
    def doctor() -> None:
        raise error

    monkeypatch.setitem(sys.modules, "fake_command", fake)
    monkeypatch.setitem(mm.cli.COMMANDS, "doctor", ("fake_command", ""))
    return CliRunner().invoke(mm.cli.app, ["doctor"])


def test_a_misspelt_command_is_named(python):
    done = python("-m", "mm", "generat")
    assert done.returncode == 2
    assert done.stderr == "mm: No such command 'generat'. Did you mean 'generate'?; see mm --help\n"


def test_doctor_tells_the_truth_and_writes_it(tmp_path):
    import torch

    done = CliRunner().invoke(mm.cli.app, ["doctor", "--json", str(tmp_path / "sub" / "doctor.json")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "sub" / "doctor.json").read_text())
    assert report["device"]["default"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    from mm.kernels import backends

    assert report["kernels"] == {name: state == "ready" for name, state in backends().items()}
    assert report["kernels"]["reference"]
    assert torch.__version__ in done.stdout
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["doctor.json"]
