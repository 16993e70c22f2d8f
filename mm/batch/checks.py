"""What a run would refuse of a row, by its model's configs and tokenizer: no weights are opened.

Design choices
- Options go into the call of the pipeline that the row's task takes, so that their names are known by that class.
- Words are read by the model's own tokenizer, with the words that the row's adapters add to it. That takes a moment a
  picture, so that it is done in dry runs alone; a real run does it with the model.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.safe_json import read_object
from mm.engine.calls import check_arguments
from mm.engine.capabilities import task_of
from mm.engine.facts import FAMILY_TASKS, call_parameters_of, class_of
from mm.engine.prompts import weighted
from mm.engine.requests import Draw
from mm.families.folders import family_at

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from mm.batch.plan import Adapters, Planned


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


class PromptCheck:
    """Checks the prompts of pictures that would be drawn."""

    def __init__(self) -> None:
        self._tokenizers: dict[tuple[Path, Adapters], PreTrainedTokenizerFast] = {}

    def __call__(self, one: Planned) -> None:
        """Raises UserError for weights that no prompt may have, and for words that the model refuses.

        Args:
            one: the picture.
        """
        for text in (one.draft.prompt, one.draft.negative):
            weighted(text or "")
        known = one.plan.about(one.model)
        if known.folder is None or known.can is None or not known.can.strict:
            return
        if not one.draft.strict and one.draft.prompt.strip():  # then nothing is refused
            return
        warn_of_words(one, self._tokenizer(known.folder, one.adapters))

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
