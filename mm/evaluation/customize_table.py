"""Compares methods of customization at equal size, for the choice of `auto`: `python -m mm.evaluation.customize_table`.

Design choices
- The objects are not the held-out eight of the report. Nothing else is new to the model, so that new objects are made:
  each is two trained sprites joined, the upper half of one over the lower half of the other, under a name of its own.
- The judge knows no such object. Fidelity is how similar pictures are to true ones by its own features, between that of
  the two parents (0) and that of other true pictures of the object (1).
- Every method gets about the same number of stored values as LoRA of rank 8; prompts and seeds are those for tuning.
- A cell is written when it is done, so that a stopped table goes on. Cells are independent, and several processes may
  share them; all methods are tried on one object before the next begins, so that a table that ran out of time is fair.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mm.core.files import write_json, write_text
from mm.core.run_files import taking
from mm.core.safe_json import read_object
from mm.customization.customize import customize
from mm.evaluation import compose
from mm.evaluation.prompts import COMPOSE_TUNE, load_prompts
from mm.world import captions as c
from mm.world.judge import Judge
from mm.world.render import render
from mm.world.scene import Scene, Sprite
from mm.world.tasks import satisfies

PARENTS: dict[str, tuple[str, str]] = {
    "catcar": ("cat", "car"), "owlclock": ("owl", "clock"), "appleboat": ("apple", "boat"),
    "starfrog": ("star", "frog"),
}  # fmt: skip
GROUNDS: tuple[str, ...] = ("grass", "beach", "snow", "sky", "night")
_SECONDS = 5.0  # between two times that finished cells are collected
_CENTRES = 3  # at which an object is searched for beside another
COMPANIONS: tuple[str, ...] = ("tree", "fish", "key", "dog")
# Settings by which a method stores about as many values as LoRA of rank 8
METHODS: dict[str, dict[str, Any]] = {
    "dreambooth": {"rank": 8}, "orthogonal": {"rank": 8}, "lora": {"rank": 8}, "dora": {"rank": 8},
    "oft": {"block": 32}, "lokr": {"rank": 16, "factor": 4}, "loha": {"rank": 4}, "shira": {"rank": 8},
    "paca": {"rank": 16}, "s2ft": {"rank": 16}, "eva": {"rank": 8}, "adalora": {"rank": 8},
}  # fmt: skip
_ALONE, _BESIDE = 4, 2  # pictures of each prompt


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method on one object.

    Attributes:
        fidelity: 0 as similar as the parents are, 1 as true pictures are to each other.
        beside: the same where it is asked for beside a known object.
        companion: share of these pictures in which the known object is seen.
        drift: share of unrelated tuning prompts that were right and no longer are.
        bytes: of the file.
        seconds: of CPU, that training took.
    """

    fidelity: float
    beside: float
    companion: float
    drift: float
    bytes: int
    seconds: float


def joined(name: str, ground: str, seed: int) -> Tensor:
    """A true picture (3, 128, 128), uint8, of a joined object on a background."""
    rng = random.Random(f"customize table {name} {ground} {seed}")
    size = rng.choice((52, 60))
    x, y = rng.randint(40, 88), rng.randint(40, 88)
    upper, lower = (
        render([Scene(sprites=(Sprite(object=parent, x=x, y=y, size=size),), background=ground)])[0]
        for parent in PARENTS[name]
    )
    upper[:, y:] = lower[:, y:]
    return upper


def write_folder(folder: Path, name: str) -> Path:
    """Five training pictures with captions that name the background."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, ground in enumerate(GROUNDS):
        Image.fromarray(joined(name, ground, 0).permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
        write_text(folder / f"{number}.txt", f"a [trigger] {c.BACKGROUND_PHRASES[ground][0]}\n")
    return folder


@torch.no_grad()
def features(judge: Judge, pictures_B3HW: Tensor) -> Tensor:
    """The judge's object logits (B, P, O) of uint8 pictures at the P surest centres, less their mean, of norm 1."""
    raw = judge.eval()(pictures_B3HW.float() / 255)
    surest_BP = raw.centre_BGG.flatten(1).topk(_CENTRES, dim=1).indices
    logits_BPO = raw.object_BOGG.flatten(2).transpose(1, 2).gather(
        1, surest_BP[..., None].expand(-1, -1, raw.object_BOGG.shape[1])
    )  # fmt: skip
    return F.normalize(logits_BPO - logits_BPO.mean(2, keepdim=True), dim=2)


def fidelity_of(judge: Judge, drawn: Tensor, name: str, centres: int = 1) -> float:
    """How similar drawn pictures are to true ones, see `Cell`; of several centres the most similar one counts."""
    true = features(judge, torch.stack([joined(name, g, 1) for g in GROUNDS]))[:, 0].mean(0)
    own = features(judge, torch.stack([joined(name, g, 2) for g in GROUNDS]))[:, 0] @ true
    parents = torch.stack(
        [
            render([Scene(sprites=(Sprite(object=parent, x=64, y=64, size=60),), background=ground)])[0]
            for parent in PARENTS[name]
            for ground in GROUNDS
        ]
    )
    low, high = float((features(judge, parents)[:, 0] @ true).mean()), float(own.mean())
    similar = (features(judge, drawn)[:, :centres] @ true).amax(1)
    return (float(similar.mean()) - low) / max(1e-6, high - low)


def measure(pipe: Any, judge: Judge, method: str, name: str, work: Path, *, steps: int | None, limit: int) -> Cell:
    """Trains and measures one cell; `steps` None takes the family's own."""
    folder, settings = write_folder(work / name, name), dict(METHODS[method])
    if steps is not None:
        settings |= {"steps": steps, "preview_every": steps}
    busy = time.process_time()
    patch = customize(pipe, folder, name=f"<{name}>", method=method, samples=(), **settings)
    busy = time.process_time() - busy
    file = work / f"{name}-{method}.safetensors"
    patch.write(file)
    prompts = compose.limited(load_prompts(COMPOSE_TUNE), limit) if limit else []
    jobs = [(p, compose.picture_seed(11, p.id, 0)) for p in prompts]

    def right() -> list[bool]:
        if not jobs:
            return []
        pictures = compose.draw(pipe, jobs, compose.ComposeConfig(), None)
        return [satisfies(r, p.wanted).ok for r, (p, _) in zip(judge.read(pictures), jobs, strict=True)]

    before = right()
    patch.apply(pipe)
    try:
        alone = _drawn(pipe, [f"a <{name}> {c.BACKGROUND_PHRASES[ground][2]}" for ground in GROUNDS], 23, _ALONE)
        beside = _drawn(pipe, beside_prompts(name), 29, _BESIDE)
        after = right()
    finally:
        patch.undo(pipe)
    lost = sum(was and not now for was, now in zip(before, after, strict=True)) / max(1, sum(before))
    seen = [
        any(found.object == other for found in reading.objects)
        for reading, other in zip(judge.read(beside), COMPANIONS * 2 * _BESIDE, strict=True)
    ]
    return Cell(
        fidelity=round(fidelity_of(judge, alone, name), 4),
        beside=round(fidelity_of(judge, beside, name, _CENTRES), 4), companion=round(sum(seen) / len(seen), 4),
        drift=round(lost, 4), bytes=file.stat().st_size, seconds=round(busy, 1),
    )  # fmt: skip


def beside_prompts(name: str) -> list[str]:
    """The object beside each companion, named first and last."""
    first = [f"a <{name}> and {c.article(other)} {other}" for other in COMPANIONS]
    return [*first, *(f"{c.article(other)} {other} and a <{name}> on grass" for other in COMPANIONS)]


def _drawn(pipe: Any, texts: Sequence[str], seed: int, times: int) -> Tensor:
    """All texts once a seed; uint8."""
    made = [
        pipe(list(texts), generator=torch.Generator().manual_seed(seed + k), output_type="pt").images
        for k in range(times)
    ]
    return (torch.cat(made) * 255).round().to(torch.uint8).cpu()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a table holds.

    Attributes:
        work: folder of finished cells.
        steps: of training; None takes the family's own.
        limit: tuning prompts a task for the drift; 0 for none.
        until: `time.time` from which no cell is begun; None: no limit.
    """

    work: Path
    steps: int | None = None
    limit: int = 2
    until: float | None = None

    def file(self, method: str, name: str) -> Path:
        """Of a cell."""
        return self.work / f"{name}-{method}-{self.steps}-{self.limit}.json"


def fill(plan: Plan, cells: Sequence[tuple[str, str]]) -> list[str]:
    """Measures cells (method, object) that are not there yet, until the time is up.

    Returns:
        What went wrong, a line a cell; the others are measured all the same.
    """
    import mm

    pipe, judge = None, Judge.from_pretrained()
    failures = []
    for method, name in cells:
        file = plan.file(method, name)
        if file.is_file() or (plan.until is not None and time.time() > plan.until):
            continue
        if pipe is None:
            pipe = mm.load("mm-tiny").pipeline
            pipe.set_progress_bar_config(disable=True)
        place = plan.work / f"cell-{method}-{name}"  # processes share nothing
        place.mkdir(exist_ok=True)
        try:
            made = measure(pipe, judge, method, name, place, steps=plan.steps, limit=plan.limit)
        except Exception as error:
            failures.append(f"{method} {name}: {type(error).__name__}: {error}")
            print(failures[-1], flush=True)
            continue
        write_json(file, vars(made))
        print(method, name, made, flush=True)
    return failures


def table(
    plan: Plan, methods: Sequence[str], objects: Sequence[str], *, processes: int = 1,
    on_cells: Callable[[dict[str, dict[str, Cell]]], None] = lambda found: None,
) -> tuple[dict[str, dict[str, Cell]], list[str]]:  # fmt: skip
    """All cells by method and object, as far as the time allows; those that lie in the folder are not measured again.

    Args:
        plan: of the table.
        methods: of `METHODS`.
        objects: of `PARENTS`.
        processes: that share the cells; each has a model of its own.
        on_cells: called with the cells so far, every few seconds.

    Returns:
        The cells, and what went wrong, a line a cell.
    """
    cells = [(method, name) for name in objects for method in methods]
    if processes == 1:
        failures = fill(plan, cells)
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_few_threads) as pool:
            parts = [pool.submit(fill, plan, cells[k::processes]) for k in range(processes)]
            while wait(parts, timeout=_SECONDS).not_done:
                on_cells(_found(plan, cells))
            failures = [line for part in parts for line in part.result()]
    found = _found(plan, cells)
    on_cells(found)
    return found, failures


def _found(plan: Plan, cells: Sequence[tuple[str, str]]) -> dict[str, dict[str, Cell]]:
    found: dict[str, dict[str, Cell]] = {}
    for method, name in cells:
        file = plan.file(method, name)
        if not file.is_file():
            continue
        with taking(file, "cell of the table", f"delete {file}, and it is measured again"):
            found.setdefault(method, {})[name] = Cell(**read_object(file, "cell"))
    return found


def _few_threads() -> None:
    torch.set_num_threads(2)


def rows(found: dict[str, dict[str, Cell]]) -> list[str]:
    """A Markdown table of means, the best first: fidelity, alone and beside another object, less drift."""
    means = {method: _mean(list(cells.values())) for method, cells in found.items()}
    order = sorted(means, key=lambda m: means[m].drift - (means[m].fidelity + means[m].beside) / 2)
    body = [
        f"| {m} | {x.fidelity:.3f} | {x.beside:.3f} | {x.companion:.3f} | {x.drift:.3f} | {x.bytes >> 10} KiB "
        f"| {x.seconds:.0f} s | {len(found[m])} |"
        for m in order
        for x in [means[m]]
    ]
    head = "| method | fidelity | beside | companion | drift | file | training | objects |"
    return [head, "|---|---|---|---|---|---|---|---|", *body]


def _mean(cells: Sequence[Cell]) -> Cell:
    def mean(name: str) -> float:
        return sum(getattr(cell, name) for cell in cells) / len(cells)

    return Cell(
        fidelity=mean("fidelity"), beside=mean("beside"), companion=mean("companion"), drift=mean("drift"),
        bytes=int(mean("bytes")), seconds=mean("seconds"),
    )  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("customize-table"))
    parser.add_argument("--method", action="append", choices=list(METHODS))
    parser.add_argument("--object", action="append", choices=list(PARENTS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int, default=2, help="tuning prompts a task for the drift; 0 for none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, default=1, help="that share the cells")
    parser.add_argument("--seconds", type=float, help="after which no cell is begun")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    until = None if given.seconds is None else time.time() + given.seconds

    def keep(found: dict[str, dict[str, Cell]]) -> None:
        if given.json is not None:
            write_json(given.json, {m: {o: vars(cell) for o, cell in cells.items()} for m, cells in found.items()})

    found, failures = table(
        Plan(work=given.work, steps=given.steps, limit=given.limit, until=until), given.method or list(METHODS),
        given.object or list(PARENTS), processes=given.processes, on_cells=keep,
    )  # fmt: skip
    print("\n".join([*rows(found), *failures]))
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
