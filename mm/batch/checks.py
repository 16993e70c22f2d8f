"""What a run would refuse of a row, by its model's configs and tokenizer: no weights are opened.

Design choices
- Options go into the call of the pipeline that the row's task takes, so that their names are known by that class.
- Words are read by the model's own tokenizer, with the words that the row's adapters add to it, and subjects that are
  drawn apart by what their files call them. That takes a moment a picture, so that it is done in dry runs alone; a real
  run does it with the model.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mm.core.safe_json import read_object
from mm.engine.apart import stand_ins_of
from mm.engine.calls import check_arguments
from mm.engine.capabilities import task_of
from mm.engine.facts import FAMILY_TASKS, call_parameters_of, class_of
from mm.engine.outline import scheduler_at
from mm.engine.prompts import weighted
from mm.engine.requests import Draw
from mm.engine.views import view_of
from mm.families.family import resolve
from mm.families.folders import family_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mm.batch.plan import Adapters, Planned
    from mm.customization.objectives.protocol import Objective


def check_options(request: Draw, folder: Path) -> None:
    """Raises UserError for options that the pipeline of a request does not take.

    Args:
        request: of a row.
        folder: of its model.
    """
    kind = _pipeline_class(folder, task_of(request)) if request.options else None
    if kind is None:
        return
    takes = {name: value for name, value in call_parameters_of(kind).items() if name != "self"}
    check_arguments(kind, takes, request.options)


@cache
def _pipeline_class(folder: Path, task: str) -> Any:
    """The class that does a task of a model folder, as the engine finds it; None where this diffusers has none."""
    family = family_at(folder)
    named = "" if family is None else family.pipelines.get(FAMILY_TASKS[task], "")
    if named:
        return class_of(named)
    return class_of(str(read_object(folder / "model_index.json").get("_class_name", "")))


@cache
def _objective(folder: Path, scheduler: str | None) -> Objective | None:
    """The objective of a model folder with another scheduler, or its own; None where its family has none.

    It is without modules, so that noise levels and known things are all that it can say.
    """
    family = family_at(folder)
    if family is None or family.objective is None:
        return None
    pipe = view_of(SimpleNamespace(scheduler=scheduler_at(folder)), scheduler)
    made: Objective = resolve(family.objective)(pipe, 0)
    return made


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """An adapter by its file: its name on the model, its subject's word, its scale."""

    name: str
    word: str
    scale: float


class PromptCheck:
    """Checks the prompts of pictures that would be drawn."""

    def __init__(self) -> None:
        self._subjects: dict[Path, tuple[str, str]] = {}
        self._tokenizers: dict[tuple[Path, Adapters], PreTrainedTokenizerFast] = {}

    def __call__(self, one: Planned) -> None:
        """Raises UserError for weights that no prompt may have, and for words that the model refuses.

        Args:
            one: the picture.
        """
        for text in (one.draft.prompt, one.draft.negative):
            weighted(text or "")
        if one.draft.apart is not False:
            self._check_apart(one)
        known = one.plan.about(one.model)
        if known.folder is None or known.can is None or not known.can.strict:
            return
        if not one.draft.strict and one.draft.prompt.strip():  # then nothing is refused
            return
        warn_of_words(one, self._tokenizer(known.folder, one.adapters))

    def _check_apart(self, one: Planned) -> None:
        """Raises UserError where the words of adapters are not such that their subjects can be drawn apart."""
        from mm.customization.apart import check_apart, words_of
        from mm.customization.apart_base import Subjects

        patches = self._patches(one.adapters)
        asked = Subjects(
            prompt=one.draft.prompt, words=tuple(words_of(patches)), seed=one.draft.seed or 0,
            stand_ins=stand_ins_of(one.draft),
        )  # fmt: skip
        folder = one.plan.about(one.model).folder
        objective = None if folder is None else _objective(folder, one.draft.scheduler)
        if objective is not None:
            check_apart(objective, asked, patches)

    def _patches(self, adapters: Adapters) -> list[_Subject]:
        """The adapters of a picture, as they would be named on the model."""
        from mm.adapters.formats.reader import subject_of_file
        from mm.engine.attaching import free_name

        found: list[_Subject] = []
        for file, scale in adapters:
            if file not in self._subjects:
                self._subjects[file] = subject_of_file(file)
            name, word = self._subjects[file]
            found.append(_Subject(name=free_name([one.name for one in found], name), word=word, scale=scale))
        return found

    def _tokenizer(self, folder: Path, adapters: Adapters) -> PreTrainedTokenizerFast:
        """The tokenizer of a model with the words of adapters in it."""
        key = (folder, adapters)
        if key not in self._tokenizers:
            if adapters:
                from mm.adapters.formats.reader import words_of_file

                made = copy.deepcopy(self._tokenizer(folder, ()))
                made.add_tokens([word for file, _ in adapters for word in words_of_file(file)])
            else:
                from transformers import PreTrainedTokenizerFast

                made = PreTrainedTokenizerFast.from_pretrained(folder / "text_tokenizer")
            self._tokenizers[key] = made
        return self._tokenizers[key]


def warn_of_words(one: Planned, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What a model with a vocabulary of its own says of one prompt, apart from its batch: unknown words, each once.

    Raises:
        UserError: for a prompt that it refuses.
    """
    from mm.pipelines.prompt_encoding import check_prompts

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prompts([one.draft.prompt], tokenizer, strict=one.draft.strict)
    return [str(warning.message) for warning in caught]
