"""A warm picture, or `mm quantize`, beside busy processes, by how OpenMP's threads wait; "mm" is what the commands do.

Each setting runs in a process of its own, since the variables are read when torch loads. Settings take turns within
each round, so that a change of the machine meets all of them. Reported are medians, and ratios to the idle median of
the default policy, all of the same run.

    python benchmarks/busy.py --rounds 3 --json busy.json
    python benchmarks/busy.py --quantize --rounds 1 --busy 0 2 --json quantize-busy.json

With --quantize, the seconds are those of a whole `mm quantize MODEL --compose 0`; settings other than "mm" are left out
unless --without says which.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.core.threads import BLOCK_TIME

_DRAW = """
import sys
if sys.argv[3] == "mm":  # as the commands do
    from mm.core.busy_cores import watch_cores
    from mm.core.threads import bound_spinning
    bound_spinning() and watch_cores()
import time, torch, mm
pipe = mm.TextToImagePipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
seconds = []
for k in range(int(sys.argv[2]) + 1):
    started = time.perf_counter()
    pipe("two red cats on grass", generator=torch.Generator().manual_seed(k))
    seconds.append(time.perf_counter() - started)
print(*seconds[1:])
"""
_BUSY = "while True: sum(range(10000))"


def settings(counts: list[int]) -> dict[str, dict[str, str]]:
    """Environment variables by the setting's name."""
    made: dict[str, dict[str, str]] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "mm": {}}
    return made | {f"spin {n}": {"GOMP_SPINCOUNT": str(n), "KMP_BLOCKTIME": BLOCK_TIME} for n in counts}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that want a core each."""
    started = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def draw(model: str, pictures: int, name: str, variables: dict[str, str], limit: float) -> list[float]:
    """Seconds of warm pictures in a setting; infinity for one that took longer than the limit altogether."""
    command = [sys.executable, "-c", _DRAW, model, str(pictures), name]
    done = run(command, cleaned_environment() | variables, limit)
    return [float("inf")] if done is None else [float(word) for word in done.split()[-pictures:]]


def quantize(model: str, name: str, variables: dict[str, str], limit: float) -> list[float]:
    """Seconds of one `mm quantize`; infinity for one that took longer than the limit."""
    if name == "default":  # of GNU's OpenMP; where no variable is there, the command sets its own
        variables = {"GOMP_SPINCOUNT": "300000"}
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "small")
        command = [sys.executable, "-m", "mm", "quantize", model, "-o", out, "--compose", "0"]
        started = time.perf_counter()
        done = run(command, cleaned_environment() | variables, limit)
        return [float("inf") if done is None else time.perf_counter() - started]


def cleaned_environment() -> dict[str, str]:
    """This process's environment without what says how threads wait."""
    return {k: x for k, x in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}


def run(command: list[str], environment: dict[str, str], limit: float) -> str | None:
    """What a command prints; None for one that took longer than the limit."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each setting and each number of busy processes."""
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):
        for processes in options.busy:
            with busy(processes):
                for name, variables in settings(options.spin).items():
                    if name in options.without:
                        continue
                    if options.quantize:
                        seconds = quantize(options.model, name, variables, options.limit)
                    else:
                        seconds = draw(options.model, options.pictures, name, variables, options.limit)
                    found.setdefault((name, processes), []).extend(seconds)
                    print(f"{name:>14} beside {processes}: {statistics.median(seconds):.2f} s", file=sys.stderr)
    first = "default" if ("default", 0) in found else next(iter(found))[0]
    idle = statistics.median(found.get((first, 0), [float("nan")]))
    return [
        {"setting": name, "busy": processes, "seconds": statistics.median(each), "worst": max(each),
         "to_idle": statistics.median(each) / idle, "n": len(each)}
        for (name, processes), each in found.items()
    ]  # fmt: skip


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mm-tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=3, help="warm pictures of each run")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 1, 2], help="numbers of busy processes")
    parser.add_argument("--spin", type=int, nargs="*", default=[1000, 10_000, 100_000], help="GOMP_SPINCOUNT to try")
    parser.add_argument("--without", nargs="*", help="settings to leave out, such as default")
    parser.add_argument("--quantize", action="store_true", help="time `mm quantize MODEL --compose 0`, not pictures")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a run is given up")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.without is None:
        options.without = [name for name in settings(options.spin) if options.quantize and name != "mm"]
    rows = measure(options)
    print(f"{'setting':>14} {'busy':>5} {'seconds':>8} {'worst':>8} {'to idle':>8}")
    for row in rows:
        print(f"{row['setting']:>14} {row['busy']:>5} {row['seconds']:8.2f} {row['worst']:8.2f} {row['to_idle']:8.2f}")
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {"json": None}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
