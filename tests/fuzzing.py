"""Mutated inputs for every reader of files from outside: what is damaged is refused with a UserError, or read whole.

Each reader has valid files made here, and a check that runs it on a mutated one. A mutation is one to three
changes, by structure where the file has one: header and settings as JSON (other types, sizes, keys, nesting), types and
shapes of tensors, values that are not finite, names; and bytes: flipped, cut off, doubled, overwritten.

A case fails where anything but a UserError comes out, a message has more than one line, it takes more than 10 seconds,
it asks for more than 1 GiB beyond what the process had, or a refused file has changed the model.

    python tests/fuzzing.py --count 10000 --json fuzz.json [--reader patch]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_readers import MAKERS, Case

READERS = ("patch", "lora", "nunchaku", "folder", "png")
SECONDS = 10
MEMORY = 1 << 30


class _TooSlowError(BaseException):
    pass


@dataclass
class Result:
    """What a run gave. faults: by kind, with how often and an example."""

    reader: str
    cases: int = 0
    refused: int = 0
    read: int = 0
    slowest: float = 0.0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)


def run(reader: str, seed: int, start: int, count: int) -> Result:
    """Runs cases `start` to `start + count` in this process, under its limits of time and memory."""
    import torch

    from mm.core.errors import UserError

    torch.set_num_threads(1)
    result = Result(reader=reader)
    faults: Counter[str] = Counter()
    examples: dict[str, str] = {}
    signal.signal(signal.SIGPROF, _ring)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        case = MAKERS[reader](Path(folder))
        _limit_memory()
        sink = quiet.enter_context(open("/dev/null", "w"))
        quiet.enter_context(contextlib.redirect_stderr(sink))
        quiet.enter_context(contextlib.redirect_stdout(sink))
        for k in range(start, start + count):
            case.mutate(random.Random(f"{reader} {seed} {k}"))
            fault, began = "", time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU: a busy machine is no fault
                case.read()
                result.read += 1
            except UserError as error:
                result.refused += 1
                fault = _of_refusal(error, case)
            except _TooSlowError:
                fault = f"more than {SECONDS} seconds"
            except BaseException as error:  # panics of Rust are no Exceptions
                fault = _named(error)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            result.cases += 1
            result.slowest = max(result.slowest, time.process_time() - began)
            if fault:
                faults[fault] += 1
                examples.setdefault(fault, f"case {k}")
    result.faults = {name: (number, examples[name]) for name, number in faults.items()}
    return result


def _ring(*_: object) -> None:
    raise _TooSlowError


def _limit_memory() -> None:
    """At most 1 GiB of addresses beyond those of now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _of_refusal(error: BaseException, case: Case) -> str:
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause) or "not enough memory" in str(cause):
            return "refused only when the memory was used up"
        if isinstance(cause, _TooSlowError):
            return f"more than {SECONDS} seconds"
        cause = cause.__cause__
    if "\n" in text or not text.isprintable() or len(text) > 1500:
        return f"a message that is not one line: {ascii(text)[:150]}"
    return "" if case.unchanged() else f"refused and changed: {text[:120]}"


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mm/" in f.filename or "/pipelines/" in f.filename or "/tests/" in f.filename]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1:] if ours else []) + frames[-1:]]
    return f"{type(error).__name__}: {ascii(str(error))[:110]} at {' <- '.join(reversed(places))}"


def main(arguments: list[str] | None = None) -> int:
    """Runs every reader in processes of their own; 0 where there was no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases a reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--part", type=int, default=1000, help="cases a process")
    options = parser.parse_args(arguments)
    totals = []
    for reader in options.reader or READERS:
        total = Result(reader=reader)
        for start in range(0, options.count, options.part):
            _add(total, in_process(reader, options.seed, start, min(options.part, options.count - start)))
            bad, counts = sum(n for n, _ in total.faults.values()), f"{total.refused} refused, {total.read} read"
            print(f"{reader}: {total.cases} cases, {counts}, {bad} faults, slowest {total.slowest:.1f} s", flush=True)
        for name, (number, example) in total.faults.items():
            print(f"  {number} x {name} ({example})")
        totals.append(vars(total))
    if options.json:
        from mm.core.files import write_json

        write_json(options.json, {"seed": options.seed, "readers": totals})
    return 1 if any(total["faults"] for total in totals) else 0


def in_process(reader: str, seed: int, start: int, count: int) -> Result:
    """A process may die, or hang where no signal reaches it: both are faults."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm", "diffusers.pipelines.pipeline_utils", "transformers", "peft"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(theirs, reader, seed, start, count), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(600 + count * SECONDS / 4):
            found = ours.recv()
            return found if isinstance(found, Result) else Result(reader, count, faults={found: (1, f"from {start}")})
        return Result(reader, count, faults={"a process that hung": (1, f"cases from {start}")})
    except EOFError:
        return Result(reader, count, faults={"a process that died": (1, f"cases from {start}")})
    finally:
        process.kill()
        process.join()


def _worker(pipe: Any, reader: str, seed: int, start: int, count: int) -> None:
    try:
        pipe.send(run(reader, seed, start, count))
    except BaseException:
        pipe.send(f"the run itself failed: {traceback.format_exc()[-1500:]}")


def _add(total: Result, part: Result) -> None:
    total.cases, total.refused, total.read = (
        total.cases + part.cases,
        total.refused + part.refused,
        total.read + part.read,
    )
    total.slowest = max(total.slowest, part.slowest)
    for name, (number, example) in part.faults.items():
        total.faults[name] = (total.faults.get(name, (0, ""))[0] + number, total.faults.get(name, (0, example))[1])


if __name__ == "__main__":
    sys.exit(main())
