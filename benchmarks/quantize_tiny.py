"""Time of a calibrated quantization over that without data, on tiny pipelines of real classes.

    python benchmarks/quantize_tiny.py --family stable-diffusion-xl --family sana-sprint

Both are whole calls of `mm.quantize`, alternated in one run; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mm
from mm.families import family_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


def seconds(family: str, *, data_free: bool) -> float:
    """One call, with calibration on eight prompts of the family at its smallest size."""
    from tiny_pipelines import tiny_pipeline_of

    pipe: Any = tiny_pipeline_of(family)
    found = family_of(pipe)
    assert found is not None
    prompts = None if data_free else found.calibration_prompts(8, 0)
    started = time.perf_counter()
    mm.quantize(pipe, mm.SVDQuantConfig(data_free=data_free, size=32), calibration=prompts, progress=False)
    return time.perf_counter() - started


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", help="of tests/tiny_pipelines.py")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    for family in given.family or ("stable-diffusion-xl", "sana-sprint"):
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(given.rounds):
            for data_free in (True, False):
                times[data_free].append(seconds(family, data_free=data_free))
        free, searched = (statistics.median(times[kind]) for kind in (True, False))
        print(f"{family}: {searched:.1f} s calibrated, {free:.1f} s without data, ratio {searched / free:.1f}")


if __name__ == "__main__":
    main()
