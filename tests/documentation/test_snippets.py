"""Every Python block and every command of README.md and of the pages under docs/ works.

A page is one process in a folder of its own, without a network: its blocks and commands run in the order of the page.
Python blocks always run. A command that cannot run in a test has an entry in `NOT_RUN`, which says why and how it is
checked instead.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from packaging.requirements import Requirement
from pages import LANGUAGES, ROOT, Block, Command, blocks_of, commands_of, outside_blocks, pages

RUNNER = Path(__file__).parent / "run_page.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# command: (how it is checked, why it does not run here)
NOT_RUN = {
    r"pip install": ("requirements", "needs a network"),
    r"pytest": ("selection", "runs these tests"),
    r"python \.ci/lint_imports\.py": ("path", "a stage of .ci/run"),
    r"python benchmarks/results_page\.py": ("path", "takes reports of runs of hours; its only arguments are paths"),
    r"python (benchmarks|examples)/": ("script", "takes minutes"),
    r"python -m mm\.": ("script", "trains or measures for hours"),
    r"torchrun --nproc_per_node N -m mm train": ("torchrun", "trains for hours on several devices"),
    r"mm (generate|edit|batch) .*--bits 4": (
        "parse",
        "searches for minutes; tests/cli/test_quantize_cli.py runs it",
    ),
    r"mm (train|ui|eval)\b": ("parse", "trains, serves or measures until it is stopped, or for minutes"),
}
# appended to make a command small, with everything else as the page has it
SMALLER = {
    r"mm customize": ("--steps", "2", "--batch-size", "1"),
    r"mm quantize": ("--data-free", "--pictures", "0", "--compose", "0"),
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def how(command: Command) -> str:
    line = " ".join(command.arguments)
    for pattern, (check, _) in NOT_RUN.items():
        if re.match(pattern, line):
            return check
    return "run"


def step_of(page: str, command: Command) -> dict[str, Any] | None:
    """What run_page.py does for a command; None where `test_other_commands` checks it."""
    check, words = how(command), list(command.arguments)
    step: dict[str, Any] = {"page": page, "line": command.line, "stdin": ""}
    if check == "script":
        return step | {
            "kind": "script",
            "arguments": words[1:] if words[1] == "-m" else [str(ROOT / words[1]), *words[2:]],
        }
    if check == "torchrun":
        return step | {"kind": "parse", "arguments": words[words.index("-m") + 2 :]}
    if check not in ("run", "parse"):
        return None
    assert words[0] == "mm", f"{page}:{command.line}: {words[0]} neither runs here nor has an entry in NOT_RUN"
    for pattern, more in SMALLER.items():
        if re.match(pattern, " ".join(words)):
            words += more
    if words[1] == "chat":  # the comment behind it says what the user types
        step["stdin"] = "\n".join(command.comment.split(" / ")) + "\n"
    return step | {"kind": "mm" if check == "run" else "parse", "arguments": words[1:]}


def steps_of(page: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any] | None] = []
    for block in blocks_of(text_of(page)):
        if block.language == "python":
            steps.append({"kind": "python", "page": page, "line": block.line, "text": block.text})
        if block.language == "bash":
            steps += [step_of(page, command) for command in commands_of(block)]
    return [step for step in steps if step]


RUNNING = [page for page in pages() if steps_of(page)]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """A folder with `files` (what pages read) and `mm-tiny.safetensors` (a LoRA for README.md); HF_HOME is filled."""
    from stand_ins import fill_hub, write_files, write_mm_tiny_lora

    folder = tmp_path_factory.mktemp("documentation")
    fill_hub(forks.home)
    write_files(folder / "files")
    write_mm_tiny_lora(folder / "mm-tiny.safetensors")
    return folder


@pytest.mark.parametrize("page", RUNNING)
def test_page(page: str, world: Path, tmp_path: Path, forks: Forks) -> None:
    work = tmp_path / "work"
    shutil.copytree(world / "files", work)
    if page == "README.md":
        shutil.copy(world / "mm-tiny.safetensors", work / "style.safetensors")
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps(steps_of(page)), encoding="utf-8")
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = forks.run(RUNNER, steps, cwd=work, env=env)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_list_of_commands_that_do_not_run_holds_no_more_than_needed() -> None:
    lines = [
        " ".join(command.arguments)
        for page in pages()
        for block in blocks_of(text_of(page))
        if block.language == "bash"
        for command in commands_of(block)
    ]
    unused = [pattern for pattern in (*NOT_RUN, *SMALLER) if not any(re.match(pattern, line) for line in lines)]
    assert not unused


def other_commands() -> list[tuple[str, Command]]:
    blocks = [(page, block) for page in pages() for block in blocks_of(text_of(page)) if block.language == "bash"]
    found = [(page, command) for page, block in blocks for command in commands_of(block)]
    return [(page, command) for page, command in found if step_of(page, command) is None]


@pytest.mark.parametrize(
    ("page", "command"), other_commands(), ids=lambda value: value if isinstance(value, str) else f"line {value.line}"
)
def test_other_commands(page: str, command: Command) -> None:
    """Commands that cannot run here name what exists: requirements, extras, markers, paths."""
    check, words = how(command), list(command.arguments)
    if check == "requirements":
        wanted = [word for word in words[2:] if not word.startswith("-")]
        assert wanted, command
        for word in wanted:
            name = word if not word.startswith(".") else PROJECT["project"]["name"] + word[1:]
            requirement = Requirement(name)
            if requirement.name == PROJECT["project"]["name"]:
                assert requirement.extras <= set(PROJECT["project"]["optional-dependencies"]), command
    if check == "selection":
        known = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
        if "-m" in words:
            assert words[words.index("-m") + 1] in known, command
        for word in words[1:]:
            assert "/" not in word or (ROOT / word).exists(), command
    if check == "path":
        assert (ROOT / words[1]).exists(), command


@pytest.mark.parametrize("page", pages())
def test_blocks_name_their_language_and_commands_lie_in_bash_blocks(page: str) -> None:
    """A block without a language, or a command that is only indented, would escape the tests above."""
    text = text_of(page)
    unknown = [block.line for block in blocks_of(text) if block.language not in LANGUAGES]
    assert not unknown, f"{page}: blocks in lines {unknown} name none of {LANGUAGES}"
    loose = [line for line in outside_blocks(text) if re.match(r"(    |\t)(mm|python|pip|pytest|torchrun) ", line)]
    assert not loose, f"{page}: commands outside bash blocks: {loose}"


def test_commands_are_split_as_a_shell_does() -> None:
    block = Block(language="bash", line=3, text='A=1 mm generate "a && b" -n 2 && mm ui\nmm chat  # hello / bye\n')
    assert [(c.line, c.arguments, c.comment) for c in commands_of(block)] == [
        (3, ("mm", "generate", "a && b", "-n", "2"), ""), (3, ("mm", "ui"), ""), (4, ("mm", "chat"), "hello / bye"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "python", "text": "x = missing\n"}, 'page.md", line 7'),
        ({"kind": "python", "text": "import warnings\nwarnings.warn('an old name', FutureWarning)\n"}, "an old name"),
        ({"kind": "mm", "arguments": ["generate", "x", "--model", "no-such"]}, "no model 'no-such'"),
        ({"kind": "parse", "arguments": ["train", "mm-tiny", "--no-such"]}, "--no-such"),
        ({"kind": "script", "arguments": ["-m", "mm.training.tokenizer_stage", "--no-such"]}, "--out"),
        ({"kind": "python", "text": "import socket\nsocket.create_connection(('127.0.0.1', 9))\n"}, "network"),
    ],
)
def test_a_step_that_fails_fails_its_page(tmp_path: Path, step: dict[str, Any], message: str, forks: Forks) -> None:
    file = tmp_path / "steps.json"
    file.write_text(json.dumps([{"page": "page.md", "line": 7, "stdin": ""} | step]), encoding="utf-8")
    done = forks.run(RUNNER, file)
    assert done.returncode != 0
    assert message in done.stderr
