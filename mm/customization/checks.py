"""What is checked before a run of `mm.customize` starts: the call, the name, settings, memory and space on the disk."""

from __future__ import annotations

import re
import shutil
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.adapters.tokens import TokenTable, own_row, tokenizer_of
from mm.core.checks import check_kind, check_path, check_text, number, whole
from mm.core.checks import shown as shown_value
from mm.core.errors import UserError, shown
from mm.core.files import check_folder
from mm.core.nouns import counted
from mm.customization.captions import pattern_of
from mm.customization.config import MAX_SETTING, TrainingConfig
from mm.customization.data import KINDS, Example
from mm.customization.estimate import Estimate
from mm.customization.folders import is_read
from mm.customization.methods.protocol import sites_of
from mm.customization.objectives.protocol import Objective
from mm.customization.pieces import branched_width
from mm.customization.sliders import SliderPrompts
from mm.layers.surgery import roots_of

GUARD_FORMS = ("{}", "a {}", "a photo of a {}", "a {} on grass", "a small {}", "two {}")
_LOWEST = {"rank": 1, "factor": -1, "block": 2, "alpha": 1e-6}  # of methods' numbers, where that is not 0
_SIGNS = re.compile(r"[()\[\]{}|\\]|__(?=.+__)|[+-]+(?=$|[\s,.;])")  # that `mm.engine.prompts` does not read as text
_ENLARGED = 4  # times that a picture may be enlarged without a warning
_STATE_BYTES = 16  # of a trained value: as it is, the best one, and two moments of the optimizer
_STATES = 2  # a state is written whole before it takes the place of the last one


def check_call(
    kind: str, folder: str | Path | None, name: str, prompts: SliderPrompts | None,
    regularization: str | Path | None = None, *, work: str | Path | None = None, samples: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Raises UserError where what is given does not suit the kind; nothing is loaded for it."""
    check_text("name", name)
    for what, place in (("folder", folder), ("regularization", regularization), ("work", work)):
        if place is not None:
            check_path(what, place)
    if prompts is not None:
        check_kind("prompts", prompts, SliderPrompts, "mm.SliderPrompts(positive=..., negative=...)")
    if work is not None:
        check_folder(work)
        _check_work(Path(work), folder, regularization)
    if any(not sample.strip() for sample in samples or ()):
        raise UserError("a sample prompt is empty; say what is drawn at each preview, or leave it out")
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; there are {', '.join(KINDS)}")
    if regularization is not None and kind in ("edit", "slider"):
        raise UserError(f"regularization pictures keep a subject's class, and the kind is {kind!r}; leave them out")
    if kind == "slider":
        if prompts is None:
            raise UserError("a slider is made of two prompts; give positive and negative, such as 'a small cat'")
        return
    if prompts is not None:
        raise UserError(f"two prompts make a slider, and the kind is {kind!r}; give kind='slider'")
    if folder is None:
        raise UserError(f"the kind {kind} is learned from pictures; give a folder with a few")
    if regularization is not None and Path(folder).resolve() == Path(regularization).resolve():
        raise UserError(
            f"regularization is {regularization}, the folder of what is learned, and its pictures would be learned as "
            "others of the class, too; give a folder of other pictures"
        )
    if not name:
        raise UserError(f"the name is ''; give a word for the {kind}, for example '<mug>'")


def _check_work(work: Path, folder: str | Path | None, regularization: str | Path | None) -> None:
    """Raises UserError where the plots and samples of a run would be read as pictures when it goes on."""
    for place in (folder, regularization):
        if place is not None and is_read(Path(place), work):
            raise UserError(
                f"{work} is a folder of pictures that are learned, and the run's own would be among them; give another "
                "folder for its state (--work)"
            )


def check_name(name: str, objective: Objective) -> None:
    """Raises UserError where a name cannot stand for a new subject; warns where it is a common word already."""
    if not name.strip() or name != name.strip() or not name.isprintable():
        raise UserError(f"the name is {shown(name)}; give a word, for example '<mug>'")
    _check_word("name", name, "<mug>")
    if objective.open_vocabulary:
        for table in objective.tables:
            if own_row(objective.pipe, table, name) is not None or _one_piece(objective.pipe, table, name):
                warnings.warn(
                    f"{shown(name)} is a word that the model knows already, and learning changes what it means; "
                    f"a name such as '<{name}>' leaves it alone",
                    stacklevel=3,
                )
                return
        return
    if not re.fullmatch(r"<[a-z0-9_]+>", name):
        known = any(own_row(objective.pipe, table, name) is not None for table in objective.tables)
        what = "a word of the model already" if known else "no new word"
        raise UserError(
            f"the name {shown(name)} is {what}; give one of a-z, 0-9 and _ in angle brackets, such as '<mug>'"
        )
    for table in objective.tables:
        if own_row(objective.pipe, table, name) is not None:
            raise UserError(f"the name {shown(name)} is a word of the model already; choose another one")


def check_noun(noun: str) -> None:
    """Raises UserError where a class cannot stand in captions and prompts; "" is none."""
    if noun:
        if not noun.strip() or noun != noun.strip() or not noun.isprintable():
            raise UserError(f"noun is {shown(noun)}; give a class that the model knows, for example 'mug'")
        _check_word("noun", noun, "mug")


def _check_word(what: str, word: str, such_as: str) -> None:
    if not any(letter.isalnum() or unicodedata.category(letter) == "So" for letter in word):
        raise UserError(f"the {what} {shown(word)} has no letter or digit; give a word, for example {such_as!r}")
    if sign := _SIGNS.search(word):
        raise UserError(
            f"the {what} {shown(word)} holds {sign[0]!r}, which prompts read as a weight, an alternative or a "
            "wildcard; leave it out"
        )


def check_words(
    objective: Objective, kind: str, name: str, *, noun: str, guard: Sequence[str], samples: Sequence[str],
    prompts: SliderPrompts | None, preserved: Sequence[str],
) -> None:  # fmt: skip
    """Checks words against a closed vocabulary; a model that reads any word in pieces knows all.

    Args:
        objective: of the model.
        kind: of what is learned.
        name: of it, which is a word of the model by then.
        noun: the subject's class.
        guard: concepts that stay.
        samples: prompts that are drawn.
        prompts: of a slider.
        preserved: prompts that stay.

    Raises:
        UserError: with the first word that the model does not know, and the nearest that it knows.
    """
    of_slider = [] if prompts is None else [text for triple in prompts.triples() for text in triple]
    trained = {"noun": [noun], "guard": guard, "the slider's prompt": of_slider, "preserved": preserved}
    for what, texts in trained.items():
        for text in texts:
            if problems := objective.unknown(text, name):
                raise UserError(f"{what} is {shown(text)}: {problems[0]}; give another word")
    for sample in samples:
        if problems := objective.undrawn(sample, name, edit=kind == "edit"):
            raise UserError(f"the sample prompt {shown(sample)} is not understood: {problems[0]}")


def warn_of_captions(objective: Objective, name: str, captions: Sequence[str]) -> None:
    """Warns once of words in captions that a closed vocabulary lacks: all of them are read as one unknown word."""
    lost = list(dict.fromkeys(line for caption in captions for line in objective.unknown(caption, name)))
    if lost:
        more = f" ({counted(len(lost) - 1, 'more word')} like it)" if lost[1:] else ""
        warnings.warn(f"captions: {lost[0]}{more}; it stands for nothing in training", stacklevel=3)


def check_names_read(objective: Objective, name: str, captions: Sequence[str]) -> None:
    """Raises UserError where every text encoder cuts a caption off before the name in it."""
    for caption in dict.fromkeys(captions):
        found = pattern_of(name).search(caption)
        if found is not None and (most := _cut_at(objective, caption[: found.end()])):
            raise UserError(
                f"the caption {shown(caption)} names {shown(name)} behind the {most} tokens that the model reads; "
                "shorten it, or put the name in front"
            )


def warn_of_long(objective: Objective, captions: Sequence[str]) -> None:
    """Warns once of captions that are longer than what every text encoder reads."""
    long = {caption: most for caption in dict.fromkeys(captions) if (most := _cut_at(objective, caption))}
    if long:
        first, most = next(iter(long.items()))
        more = f" (and {counted(len(long) - 1, 'more', 'more')})" if len(long) > 1 else ""
        warnings.warn(
            f"the caption {shown(first)}{more} is longer than the {most} tokens that the model reads; what is behind "
            "them is not learned",
            stacklevel=3,
        )


def _cut_at(objective: Objective, text: str) -> int:
    """After how many tokens every text encoder cuts a text off; 0 where one reads all of it."""
    tokenizers = [tokenizer_of(objective.pipe, table) for table in objective.tables]
    if len(text) < min((one.model_max_length for one in tokenizers), default=0) - 2:  # each token has a letter at least
        return 0
    if not all(len(one(text, verbose=False).input_ids) > one.model_max_length for one in tokenizers):
        return 0
    return max((one.model_max_length for one in tokenizers), default=0)


def warn_of_small(examples: Sequence[Example], side: int) -> None:
    """Warns once of pictures that are enlarged so much that little is to be seen."""
    small = [example for example in examples if min(example.picture.size) < side / _ENLARGED]
    if small:
        width, height = small[0].picture.size
        more = f" (and {counted(len(small) - 1, 'more', 'more')})" if small[1:] else ""
        warnings.warn(
            f"{small[0].path}{more} is {width} x {height} pixels, and the middle square is learned at {side} x {side}; "
            "give larger pictures",
            stacklevel=3,
        )


def check_rank(objective: Objective, settings: Mapping[str, Any]) -> None:
    """Raises UserError for a rank above the inputs of every layer that is trained."""
    for name in ("rank", "text_rank"):
        rank = settings.get(name)
        if not rank:
            continue
        sites = sites_of(objective, "text" if name == "text_rank" else settings.get("layers", "all"))
        roots = roots_of(objective.pipe)
        most = max(branched_width(roots, site.path) for site in sites)
        if rank > most:
            raise UserError(f"{name} is {rank}, and no layer that is trained has more than {most} inputs; give less")


def _one_piece(pipe: Any, table: TokenTable, name: str) -> bool:
    known = tokenizer_of(pipe, table).get_vocab()
    return any(form in known for form in (f"{name}</w>", f"\u2581{name}", f"\u0120{name}"))


def guarded_prompts(concepts: Sequence[str]) -> list[str]:
    """Prompts that ask for the guarded concepts. Raises UserError for an empty one."""
    if any(not concept.strip() for concept in concepts):
        raise UserError("a guarded concept is empty; give words such as 'wolf'")
    return [form.format(concept.strip()) for concept in concepts for form in GUARD_FORMS]


def settings_of(method: str, defaults: Any, given: dict[str, Any]) -> tuple[TrainingConfig, dict[str, Any]]:
    """The run's settings and the method's own; a method may have its own values for a run."""
    own = {key: value for key, value in defaults.items() if key not in TrainingConfig.__dataclass_fields__}
    fields = {key: value for key, value in defaults.items() if key in TrainingConfig.__dataclass_fields__}
    for key, value in given.items():
        if key in TrainingConfig.__dataclass_fields__:
            fields[key] = value
        elif key in own:
            _check_own(key, value, own[key])
            own[key] = value
        else:
            known = ", ".join((*own, *TrainingConfig.__dataclass_fields__))
            raise UserError(f"{method} has no setting {key!r}; it has {known}")
    return TrainingConfig(**fields), own


def _check_own(name: str, value: object, usual: object) -> None:
    """Raises UserError for a method's setting that is not of the kind of its usual value."""
    if usual is None and value is None:
        return
    if isinstance(usual, str):
        if not isinstance(value, str):
            raise UserError(f"{name} is {shown_value(value)}; give a text such as {usual!r}")
    elif isinstance(usual, int) or name == "slot":
        whole(name, value, int(_LOWEST.get(name, 0)), MAX_SETTING)
    else:
        number(name, value, _LOWEST.get(name, 0), MAX_SETTING)


def check_resources(found: Estimate, work: Path | None) -> None:
    """Warns where a run needs more memory than is free; raises UserError where its state does not fit on the disk."""
    if found.free is not None and found.memory > 0.9 * found.free:
        warnings.warn(
            f"the run needs about {found.memory >> 20} MiB and {found.free >> 20} MiB are free; checkpointing=True, a "
            "smaller batch_size or size, or a 4-bit model, needs less",
            stacklevel=3,
        )
    if work is None:
        return
    there = next(place for place in (work, *work.absolute().parents) if place.exists())
    needed, free = _STATES * _STATE_BYTES * found.trained, shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            f"the run's state needs up to {needed / 2**20:.1f} MiB in {work}, where {free / 2**20:.1f} MiB are free; "
            "free some space, or give another folder as work (--work)"
        )
