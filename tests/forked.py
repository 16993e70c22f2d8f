"""Python commands that start in a moment: forks of a process that has imported the large libraries once.

Most of a short command's time is the import of torch, diffusers and transformers: some 8 seconds of CPU. A fork is a
process of its own all the same, with its arguments, environment, folder, standard streams and exit code. Nothing of
mm is imported beforehand but what makes torchvision importable. What a test shows about imports, or about the first
milliseconds of a process, needs a fresh interpreter (`conftest.run_python`).

    python forked.py      # the server: a JSON line in, the child's number and then its exit code out
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., subprocess.CompletedProcess[str]]


class Forks:
    """Runs `python ARGUMENTS`, one after another.

    Args:
        home: HF_HOME of all commands, since libraries read it when they are imported.
    """

    def __init__(self, home: Path) -> None:
        environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("HF_HUB_CACHE", None)
        self.home = home
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def run(
        self, *arguments: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, given: str = "",
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Runs a command to its end.

        Args:
            arguments: as the interpreter takes them: `-m MODULE ...`, `-c CODE` or `FILE ...`.
            cwd: its working directory.
            env: variables on top of this process's own.
            given: its standard input.
            timeout: seconds after which it is killed.
        """
        words = [str(argument) for argument in arguments]
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("in", "out", "err")]
            streams[0].write_text(given)
            job = {"arguments": words, "cwd": str(cwd), "streams": [str(file) for file in streams]}
            job["env"] = dict(os.environ) | {"HF_HOME": str(self.home), "PYTHONPATH": str(ROOT)} | dict(env or {})
            code = self._ask(job, timeout)
            out, err = (file.read_text() for file in streams[1:])
        return subprocess.CompletedProcess(words, code, out, err)

    def _ask(self, job: dict[str, Any], timeout: float) -> int:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        late = not select.select([self._server.stdout], [], [], timeout)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        code = int(self._server.stdout.readline())
        if late:
            raise subprocess.TimeoutExpired(job["arguments"], timeout)
        return code

    def close(self) -> None:
        """Ends the server. An empty line says so, since another fork of this process may hold its input open."""
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write("\n")
        self._server.stdin.close()
        try:
            self._server.wait(60)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._server.stdout.close()


def _serve() -> list[str]:
    """Forks a child for each line; returns in the child alone, which has its streams, folder and environment then."""
    for line in iter(sys.stdin.readline, ""):
        if not line.strip():
            break
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT)
            for number, (name, mode) in enumerate(zip(job["streams"], modes, strict=True)):
                os.dup2(os.open(name, mode), number)
            sys.stdin = open(0, closefd=False)
            os.environ.clear()
            os.environ.update(job["env"])
            os.chdir(job["cwd"])
            return list(job["arguments"])
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def _libraries() -> None:
    import mm  # noqa: F401 - before the others, see docs/quickstart.md

    # isort: split
    import diffusers
    import peft  # noqa: F401
    import transformers

    for name in ("DiffusionPipeline", "FlowMatchEulerDiscreteScheduler", "StableDiffusionPipeline", "FluxPipeline"):
        getattr(diffusers, name)
    for name in ("PreTrainedModel", "PreTrainedTokenizerFast", "CLIPTextModel", "T5EncoderModel"):
        getattr(transformers, name)


def _work(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    first, *rest = arguments
    sys.path[0] = "" if first.startswith("-") else str(Path(first).parent)
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(first, run_name="__main__")


def _exit_code(arguments: list[str]) -> int:
    try:
        _work(arguments)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _libraries()
    code = _exit_code(_serve())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the modules down would take seconds
