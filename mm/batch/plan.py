"""From rows to pictures: the request of each, its settings, and what the models can do, without loading weights.

Design choices
- A picture depends on its settings alone. Hashes of the weights, of adapters and of source pictures are among them:
  another file under the same name is drawn anew.
- Seeds belong to pictures: a row's own seed + k, or a hash of (run seed, custom_id, k). So no batch size, order or
  restart changes a picture, and adding rows to a file changes none of the others.
- Files and folders that a row names lie under one root, the job file's folder unless another is given. A model that a
  row names is embedded or such a folder; only the run's own model may be a hub name.
- Source pictures are opened when a row is checked and again when it is drawn, so that few of them are held at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm.batch.checks import check_options
from mm.batch.jobs import Row
from mm.batch.store import Picture
from mm.core.adapter_files import adapter_file
from mm.core.checks import MAX_SEED
from mm.core.errors import UserError
from mm.core.files import open_regular
from mm.core.paths import embedded_models, expanded, resolve_model
from mm.core.pictures import read_picture
from mm.engine.arguments import call_key
from mm.engine.capabilities import Capabilities
from mm.engine.outline import capabilities_at
from mm.engine.prompts import expand
from mm.engine.requests import Draw
from mm.engine.settings import scheduler_named, settings_of

_KEPT = 16  # pictures that are held open
Adapters = tuple[tuple[Path, float], ...]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model by its files: its folder, the hash of its weights, and what it can do. A single file has no folder, and
    nothing is known of a hub name, whose files may not be here."""

    folder: Path | None
    weights: str | None
    can: Capabilities | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """A picture to draw: what it is asked for, by which model, and with which adapters on it."""

    picture: Picture
    draft: Draw
    plan: Plan
    image: Path | None
    mask: Path | None
    strength: float | None
    model: str
    adapters: Adapters

    @property
    def key(self) -> tuple[Any, ...]:
        """What pictures of one call have in common."""
        return (*call_key(self.draft), self.image, self.mask, self.strength)

    def request(self) -> Draw:
        """The request with the pictures that it starts from."""
        if self.image is None:
            return self.draft
        given = {"image": self.plan.opened(self.image), "strength": self.strength}
        return replace(self.draft, **given, mask=None if self.mask is None else self.plan.opened(self.mask))


@dataclass(kw_only=True)
class Plan:
    """Makes requests of rows.

    Args:
        model: of rows that name none.
        seed: of the run.
        root: the folder under which files lie that rows name.
        bits: of the run's weights; None for those that are there.
        adapters: of the run, before those of a row.
    """

    model: str
    seed: int
    root: Path
    bits: int | None = None
    adapters: Adapters = ()
    _known: dict[str, Known] = field(default_factory=dict)
    _hashes: dict[Path, str] = field(default_factory=dict)
    _pictures: dict[Path, Any] = field(default_factory=dict)

    def pictures(self, row: Row) -> Iterator[Planned]:
        """A row's pictures.

        Raises:
            UserError: for files that are not there or lie elsewhere, and for what the model cannot do.
        """
        body = row.body
        model = self._model(body.model)
        known = self.about(model)
        can = known.can
        adapters = self.adapters + tuple(self._adapter(text) for text in body.lora)
        request, more = self._request(row, can), self._extras(body, adapters, known.weights)
        if can is not None:
            can.check(request)
        if known.folder is not None:
            check_options(request, known.folder)
        shown = can or Capabilities(model=model, tasks=("draw",))
        for index in range(body.n):
            seed = picture_seed(row, index, self.seed)
            worded = replace(request, prompt=expand(request.prompt, seed))
            settings = settings_of(worded, shown, model, seed, None) | more | {"task": row.task}
            if can is not None and settings.get("guidance") is not None:
                settings["guidance"] = float(settings["guidance"])
            picture = Picture(line=row.line, custom_id=row.custom_id, index=index, settings=settings)
            draft = replace(worded, seed=seed, count=1, image=None, mask=None, strength=None)
            yield Planned(
                picture=picture, draft=draft, plan=self, model=model, adapters=adapters, strength=body.strength,
                image=self._file(body.image), mask=self._file(body.mask),
            )  # fmt: skip

    def _request(self, row: Row, can: Capabilities | None) -> Draw:
        body = row.body
        scheduler = body.scheduler
        if scheduler is not None and can is not None:
            scheduler = scheduler_named(scheduler, can) or scheduler  # the check names those that there are
        return Draw(
            prompt=body.prompt, negative=body.negative, steps=body.steps, mode=body.mode, guidance=body.guidance,
            size=body.size, scheduler=scheduler, strength=body.strength, options=body.options,
            fast=body.fast, best_of=body.best_of, strict=body.strict, apart=body.apart, refine=body.refine,
            image=self.opened(self._file(body.image)), mask=self.opened(self._file(body.mask)),
        )  # fmt: skip

    def _extras(self, body: Any, adapters: Adapters, weights: str | None) -> dict[str, Any]:
        """Settings beside the request's own."""
        more: dict[str, Any] = {"model_hash": weights}
        if body.size is not None:
            more |= {"width": body.size[0], "height": body.size[1]}
        for name in ("image", "mask"):
            if (given := getattr(body, name)) is not None:
                more |= {name: given, f"{name}_hash": self._hash(self.inside(given, name))}
        if self.bits is not None:
            more["bits"] = self.bits
        if adapters:
            more["adapters"] = [{"file": str(p), "scale": scale, "hash": self._hash(p)} for p, scale in adapters]
        return more

    def inside(self, given: str, what: str) -> Path:
        """A file or folder that a row names. Raises UserError where it leads out of the root or is not there."""
        path = (self.root / given).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise UserError(f"{what} {given!r} leads out of {self.root}; move it there, or give --root")
        if not path.exists():
            raise UserError(f"there is no {what} {given!r} in {self.root}")
        return path

    def _model(self, given: str | None) -> str:
        if given is None or given == self.model:
            return self.model
        return given if given in embedded_models() else str(self.inside(given, "model"))

    def about(self, model: str) -> Known:
        """What is known of a model by its files."""
        if model not in self._known:
            found = None if expanded(model).is_file() else resolve_model(model)
            folder = found if isinstance(found, Path) else None
            can = None if folder is None else capabilities_at(folder, model)
            self._known[model] = Known(folder=folder, weights=model_hash(model), can=can)
        return self._known[model]

    def _adapter(self, text: str) -> tuple[Path, float]:
        from mm.engine.attaching import parsed

        given, scale = parsed(text)
        file = adapter_file(self.inside(str(given), "lora"))
        return self.inside(str(file), "lora"), scale  # a link in a folder may lead out of the root

    def _file(self, given: str | None) -> Path | None:
        return None if given is None else self.inside(given, "picture")

    def opened(self, path: Path | None) -> Any:
        """The picture in a file; of those asked for last, the same object."""
        if path is None:
            return None
        if path not in self._pictures:
            if len(self._pictures) >= _KEPT:  # rows with the same source stand together
                self._pictures.pop(next(iter(self._pictures)))
            self._pictures[path] = read_picture(path)
        return self._pictures[path]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            with open_regular(path) as file:
                self._hashes[path] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[path]


def picture_seed(row: Row, index: int, run_seed: int) -> int:
    """The seed of picture `index` of a row."""
    if row.body.seed is not None:
        return row.body.seed + index
    # the id comes last and whole numbers hold no colon, so that no two triples read the same
    digest = hashlib.sha256(f"{run_seed}:{index}:{row.custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


def model_hash(model: str) -> str | None:
    """A hash of a model's configs and weights; None for a hub name, whose files may not be here."""
    if expanded(model).is_file():
        with expanded(model).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    folder = resolve_model(model)
    if not isinstance(folder, Path):
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
