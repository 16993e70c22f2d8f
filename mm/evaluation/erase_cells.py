"""The measurements of docs/erasure.md as cells, each of which is made by itself and kept in a file of its own.

Design choices
- A cell takes some seconds on a GPU, so that many processes share the work: each claims the next free cell of a folder
  by creating a file that must not exist yet.
- Cells are in the order of what matters most. A process begins no cell that would not end in time, by the cell's
  estimate, which is corrected by how long earlier cells took.
- Attacks on one concept are several cells with one patch: the cell that makes it keeps it in the folder.
- Models compute in float32, so that a GPU's figures are those of a CPU; pictures of quantized models share calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.adapters.patch import Patch
from mm.core.errors import UserError
from mm.core.files import write_json
from mm.core.run_files import read_result
from mm.engine.batching import shared_calls
from mm.erasure.concepts import Concept
from mm.erasure.erase import DEFAULT, erase
from mm.erasure.measure import Labels, Measurer
from mm.erasure.methods.registry import METHODS
from mm.evaluation.erase import BATCH, OBJECTS, STYLES, TWENTY, EraseConfig, evaluate_erase, loaded
from mm.evaluation.erase_attacks import Relearning
from mm.world import vocabulary as v
from mm.world.concept_edits import with_name
from mm.world.concept_labels import label_judge
from mm.world.concept_probes import world_probes
from mm.world.judge import Judge

FAST, PRESET = DEFAULT, "robust"
QUICK = (
    "wording", "paraphrase", "noise", "embedding", "inversion", "inverted-latents", "editing", "source", "history",
)  # fmt: skip
SEARCHES = ("prompt-search", "genetic")
TRAINED = ("relearn-5", "relearn-20", "user-lora", "benign-500")
PARTS = (("quick", QUICK, 12, 30.0), ("trained", TRAINED, 16, 30.0), ("searches", SEARCHES, 6, 30.0))
ATTACKED = ("wolf", "car", "apple", "neon", "owl", "guitar", "watercolor", "cat")  # by every attack
COMPARED = ("wolf", "car", "neon")  # by every method
FIVE = ("wolf", "fox", "owl", "car", "tree")
QUANTIZED = ("w4a8", "w4a8-r16", "w4a4", "w4a4-r16", "nf4", "int4")
LEARNED = v.HELD_OUT_OBJECTS[:4]
_PAUSE = 0.5  # seconds between two checks of what other processes are making


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Args:
        name: "table/method/concept/part".
        config: of the measurement; None for relearning of objects that the model never saw.
        seconds: estimated, on a GPU that several processes share.
    """

    name: str
    config: EraseConfig | None
    seconds: float

    @property
    def file(self) -> str:
        """The name of the cell's file."""
        return self.name.replace("/", "--").replace(" ", "-") + ".json"


def plan(size: float = 1.0, seed: int = 0) -> list[Cell]:
    """All cells; `size` scales the numbers of prompts, 1 for those that are reported."""
    return list(_cells(lambda n: max(1, round(n * size)), seed))


def _cells(n: Callable[[int], int], seed: int) -> Iterator[Cell]:
    def cell(name: str, seconds: float, *targets: str, each: int, **more: Any) -> Cell:
        config = EraseConfig(targets=targets, each=n(each), seed=seed, batch_size=BATCH, **more)
        return Cell(name=name, config=config, seconds=seconds)

    def attacked(method: str) -> Iterator[Cell]:
        for part, attacks, most, seconds in PARTS:
            for concept in ATTACKED:
                name = f"attacks/{method}/{concept}/{part}"
                yield cell(name, seconds, concept, each=most, method=method, attacks=attacks, attacked=n(most))

    every = (*OBJECTS, *STYLES)
    # quantizing takes longest and must begin first
    for q in QUANTIZED[:4]:
        yield cell(f"quantized/{q}", 150, *FIVE, each=100, how="together", quantize=(q,))
    yield from attacked(PRESET)
    for concept in every:
        for method in (FAST, PRESET):
            yield cell(f"alone/{method}/{concept}", 10, concept, each=36, method=method, composition=n(16))
    yield cell("together", 25, *TWENTY, each=120, how="together", composition=n(48))
    yield cell("stacked", 30, *OBJECTS, each=12, how="stacked")
    for q in QUANTIZED[4:]:
        yield cell(f"quantized/{q}", 20, *FIVE, each=100, how="together", quantize=(q,))
    yield cell("quantized/patch", 10, *FIVE, each=100, how="together", patch_bits=(8, 4))
    for concept in every:
        yield cell(f"codes/{concept}", 20, concept, each=36, mode="codes")
    yield from attacked(FAST)
    for name in LEARNED:
        yield Cell(name=f"never/{name}", config=None, seconds=10)
    for concept in COMPARED:
        for method in METHODS:
            yield cell(
                f"methods/{method}/{concept}", 25, concept, each=24, method=method, attacks=QUICK, attacked=n(6),
                quantize=("int4",), baked=False,
            )  # fmt: skip


# Settings of the robust preset that were compared on tuning prompts, by name; "" is the preset as it is.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "text only": {"picture_steps": 0},
    "text only, 8 rounds": {"picture_steps": 0, "rounds": 8},
    "picture only": {"rounds": 0},
    "8 rounds": {"rounds": 8},
    "400 steps": {"picture_steps": 400, "pool": 100},
    "400 steps, low rate": {"picture_steps": 400, "pool": 100, "picture_rate": 1e-3},
    "400 steps, preserve 1": {"picture_steps": 400, "pool": 100, "picture_preserve": 1.0},
    "400 steps, preserve 4": {"picture_steps": 400, "pool": 100, "picture_preserve": 4.0},
    "400 steps, rank 48": {"picture_steps": 400, "pool": 100, "picture_rank": 48},
    "400 steps, batch 8": {"picture_steps": 400, "pool": 100, "batch": 8},
}
TUNED_ON = ("tiger", "bus")  # none of those that are reported for the preset's attacks
TUNING_ATTACKS = ("embedding", "inversion", "editing", "history", "genetic", "noise", "inverted-latents", "relearn-20")


def tuning(size: float = 1.0, seed: int = 0) -> list[Cell]:
    """Cells of the robust preset's variants, on tuning prompts of other concepts than those that are reported."""
    each = max(1, round(12 * size))
    return [
        Cell(
            name=f"tuning/{variant or 'preset'}/{concept}", seconds=40,
            config=EraseConfig(
                targets=(concept,), method=PRESET, options=options, each=each, attacked=each, split="tune", seed=seed,
                attacks=TUNING_ATTACKS, batch_size=BATCH,
            ),
        )
        for concept in TUNED_ON for variant, options in VARIANTS.items()
    ]  # fmt: skip


class Worker:
    """Makes cells of a folder until its time is over.

    Args:
        folder: for the cells' files.
        model: name or folder of the model.
        seconds: after which no cell begins.
        progress: called with a text.
    """

    def __init__(
        self, folder: Path, model: str = "mm-tiny", seconds: float = 1e9, progress: Callable[[str], None] = print
    ) -> None:
        self.folder, self.model, self.seconds, self.progress = folder, model, seconds, progress
        self.started, self.took, self.expected = time.monotonic(), 0.0, 0.0
        self.parts: tuple[Any, Judge] | None = None
        self.kept: dict[str, dict[str, Labels]] = {}

    def run(self, cells: Sequence[Cell]) -> int:
        """Makes the cells that no other process makes; returns how many.

        Cells whose patch another process is making come later, so that no patch is made twice.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        left, made = list(cells), 0
        while left := [cell for cell in left if self._in_time(cell) and not _taken(self.folder / cell.file)]:
            cell = next((c for c in left if not self._waits(c)), None)
            if cell is None:
                time.sleep(_PAUSE)
                continue
            left.remove(cell)
            if claimed(self.folder / cell.file):
                self.one(cell)
                made += 1
        return made

    def _in_time(self, cell: Cell) -> bool:
        slower = self.took / self.expected if self.expected else 1.0
        return slower * cell.seconds <= self.seconds - (time.monotonic() - self.started)

    def _waits(self, cell: Cell) -> bool:
        """Whether another process is making the cell's patch."""
        file = self._patch_file(cell.config)
        return file is not None and not file.is_file() and file.with_suffix(".claim").exists()

    def one(self, cell: Cell) -> None:
        """Makes one cell and writes its file; a failure is written as well, and the next cell follows."""
        self.parts = self.parts or loaded(self.model)
        started = time.monotonic()
        try:
            with shared_calls():
                found = self._measured(*self.parts, cell)
        except (UserError, RuntimeError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        took = time.monotonic() - started
        self.took, self.expected = self.took + took, self.expected + cell.seconds
        write_json(self.folder / cell.file, found | {"cell": cell.name, "took": round(took, 1)})
        self.progress(f"{cell.name}: {found.get('error', 'done')} ({took:.1f} s)")

    def _measured(self, pipe: Any, judge: Judge, cell: Cell) -> dict[str, Any]:
        if cell.config is None:
            return never_seen(pipe, judge, cell.name.rpartition("/")[2])
        config = cell.config
        patch = None if config.how == "stacked" else self._patch(pipe, config)
        kept = self.kept.setdefault(config.mode, {})
        return evaluate_erase(pipe, judge, config, patch=patch, kept=kept, settings={"model": self.model})

    def _patch_file(self, config: EraseConfig | None) -> Path | None:
        """Where the patch of a cell is kept; None for a cell whose patch no other cell uses."""
        if config is None or config.options or config.how == "stacked":
            return None
        name = f"{config.method} {' '.join(config.targets)}".replace(" ", "-")[:80]
        return self.folder / f"{name}.safetensors"

    def _patch(self, pipe: Any, config: EraseConfig) -> Patch:
        """The patch of a method for targets: from the folder, or made and kept there."""
        file = self._patch_file(config)
        if file is None:
            return erase(pipe, config.targets, method=config.method, **config.options)
        while not file.is_file():
            if not claimed(file):  # another process began it a moment ago
                time.sleep(_PAUSE)
                continue
            try:
                erase(pipe, config.targets, method=config.method).save(file)
            except BaseException:
                file.with_suffix(".claim").unlink()
                raise
        return Patch.load(file)


def _taken(file: Path) -> bool:
    return file.with_suffix(".claim").exists()


def claimed(file: Path) -> bool:
    """Whether this process is the first that wants to write a file: its claim lies beside it."""
    try:
        file.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return not file.is_file()


def finished(folder: Path) -> dict[str, Any]:
    """The reports of a folder's finished cells by name."""
    files = sorted(folder.glob("*.json"))
    found = [read_result(file, "cell of the table", f"delete {file}, and it is measured again") for file in files]
    return {report["cell"]: report for report in found if "cell" in report and "error" not in report}


def never_seen(pipe: Any, judge: Judge, name: str, most: int = 16) -> dict[str, Any]:
    """What relearning's LoRA teaches the unchanged model of an object that it never saw: the floor of the attack."""
    probes = [
        replace(p, prompt=with_name(p.prompt, "wolf", name), concept=name)
        for p in world_probes([Concept(name="wolf")], (), each=most)
        if p.role == "target"
    ]
    measurer = Measurer(pipe=pipe, judge=label_judge(judge), batch_size=BATCH)
    empty = Patch(entries={}, name="nothing")
    return {f"relearn-{pictures}": Relearning(pictures, most=most).run(measurer, empty, probes) for pictures in (5, 20)}
