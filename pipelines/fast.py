"""Settings of less work a picture for our models, and the steps that they stand for.

Design choices
- The defaults are the mix that was measured on tuning prompts (`benchmarks/fast.py`, docs/fast.md). Single settings can
  be given; they replace those of the mix.
- What is left out is planned by step, not by the picture, unless `threshold` is given: pictures then stay the same at
  any batch size. With a threshold each picture is drawn alone.
- In codes mode a picture is drawn in few steps, and the model reads what it drew (`mm.pipelines.best_of`): only where
  something is missing is it drawn again. What cannot be checked is drawn once, in more steps.
- Features are shared where DDT's dynamic programming (`mm.fast.refresh`) says so, on the similarity of features that
  was measured once. Up to the first step without guidance, errors count as often as the guidance scale multiplies them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mm.core.checks import number, whole
from mm.core.errors import UserError
from mm.families.mm_tiny import GUIDANCE, STEPS
from mm.fast.guidance import AdaptiveGuidance, checked
from mm.fast.refresh import refresh_steps

# Noise levels of 12 steps, and the mean cosine of the trunk's features between them: 30 tuning prompts, mm-tiny.
LEVELS = (1.0, 0.9525, 0.9002, 0.8425, 0.7783, 0.7066, 0.626, 0.5347, 0.4304, 0.31, 0.1697, 0.004)
SIMILARITY = (
    (1.000, 0.994, 0.971, 0.915, 0.855, 0.815, 0.796, 0.784, 0.780, 0.775, 0.774, 0.761),
    (0.994, 1.000, 0.980, 0.925, 0.866, 0.826, 0.806, 0.794, 0.789, 0.784, 0.783, 0.771),
    (0.971, 0.980, 1.000, 0.973, 0.922, 0.884, 0.865, 0.852, 0.847, 0.842, 0.840, 0.829),
    (0.915, 0.925, 0.973, 1.000, 0.976, 0.944, 0.926, 0.915, 0.909, 0.904, 0.902, 0.892),
    (0.855, 0.866, 0.922, 0.976, 1.000, 0.983, 0.969, 0.959, 0.953, 0.948, 0.945, 0.935),
    (0.815, 0.826, 0.884, 0.944, 0.983, 1.000, 0.992, 0.986, 0.980, 0.975, 0.972, 0.963),
    (0.796, 0.806, 0.865, 0.926, 0.969, 0.992, 1.000, 0.997, 0.993, 0.990, 0.987, 0.976),
    (0.784, 0.794, 0.852, 0.915, 0.959, 0.986, 0.997, 1.000, 0.998, 0.996, 0.993, 0.982),
    (0.780, 0.789, 0.847, 0.909, 0.953, 0.980, 0.993, 0.998, 1.000, 0.999, 0.997, 0.987),
    (0.775, 0.784, 0.842, 0.904, 0.948, 0.975, 0.990, 0.996, 0.999, 1.000, 0.999, 0.990),
    (0.774, 0.783, 0.840, 0.902, 0.945, 0.972, 0.987, 0.993, 0.997, 0.999, 1.000, 0.992),
    (0.761, 0.771, 0.829, 0.892, 0.935, 0.963, 0.976, 0.982, 0.987, 0.990, 0.992, 1.000),
)


def _share(name: str, value: object, low: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= 1:
        raise UserError(f"fast: {name} is {value!r}; give a number from {low:g} to 1")


def _truth(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"fast: {name} is {value!r}; give true or false")


@dataclass(frozen=True, kw_only=True)
class FastFlow:
    """Less work in flow mode.

    Args:
        steps: Sampling steps where a call gives none.
        spaced: Whether the last step starts at 1 / steps of the noise (before the scheduler's shift), and not near
            zero, where it changes nothing. A call with sigmas of its own keeps them, as do schedulers that take none.
        guided: Share of the steps, from the first on, that compute the unconditional prediction.
        features: Share of the steps that compute the trunk's features; the others decode shared ones. Steps are chosen
            by `plan`.
        threshold: Guidance ends earlier once the cosine of the two predictions exceeds this (`AdaptiveGuidance`).
        linear: Every second unconditional prediction of the guided steps is estimated by regression.
    """

    steps: int = 8
    spaced: bool = True
    guided: float = 0.6
    features: float = 0.75
    threshold: float | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        whole("fast: steps", self.steps, 1, 1000)
        _truth("spaced", self.spaced)
        _share("guided", self.guided)
        _share("features", self.features)
        AdaptiveGuidance(threshold=2.0 if self.threshold is None else self.threshold, linear=self.linear)

    @property
    def adaptive(self) -> AdaptiveGuidance | None:
        """How guidance depends on the picture; None where it does not."""
        if self.threshold is None and not self.linear:
            return None
        return AdaptiveGuidance(threshold=2.0 if self.threshold is None else self.threshold, linear=self.linear)


@dataclass(frozen=True, kw_only=True)
class FastCodes:
    """How codes mode samples; the defaults are the measured mix of less work, `FULL_CODES` draws without `fast`.

    Args:
        steps: Sampling steps where a call gives none; the last of them revise.
        revising: Share of the steps that revise, below 1.
        revised: Share of a picture's tokens that one revision draws again.
        spread: Whether the tokens of one step lie apart (`mm.pipelines.sampling`); else they are random ones.
        power: A share s of the steps that fill the picture draws s^power of its tokens; None: 1 - cos(pi/2 s).
        confidence: A token is sure where the mean log-probability of its codes exceeds this; sure tokens are not
            revised. None: none is sure.
        neighbours: Whether sure tokens beside known ones are drawn with the step's own (as in LocalLeap).
        guided_from: The known share of a picture from which the unconditional prediction is computed.
        guided_until: The known share up to which it is.
        full_every: Every so many steps all tokens pass the trunk; the steps between are local (ReCAP). 1: all steps.
        tries: The most times that a picture is drawn, while the model does not see in it what was asked for. 1: once,
            and nothing is checked.
        unchecked_steps: Sampling steps of pictures that cannot be checked, unless `tries` is 1. They take the other
            settings of `CAREFUL_CODES`.
    """

    steps: int = 9
    revising: float = 0.34
    revised: float = 0.5
    spread: bool = True
    power: float | None = 3.0
    confidence: float | None = None
    neighbours: bool = False
    guided_from: float = 0.05
    guided_until: float = 0.45
    full_every: int = 1
    tries: int = 3
    unchecked_steps: int = 26

    def __post_init__(self) -> None:
        whole("fast: steps", self.steps, 1, 1000)
        whole("fast: full_every", self.full_every, 1, 1000)
        whole("fast: tries", self.tries, 1, 64)
        whole("fast: unchecked_steps", self.unchecked_steps, 1, 1000)
        for name in ("revising", "revised", "guided_from", "guided_until"):
            _share(name, getattr(self, name))
        if self.revising == 1:
            raise UserError("fast: revising is 1, so that no step would fill the picture; give less")
        if self.power is not None:
            number("fast: power", self.power, 1, 10)
        _truth("neighbours", self.neighbours)
        _truth("spread", self.spread)
        value = self.confidence
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value <= 0):
            raise UserError(f"fast: confidence is {value!r}; give a log-probability, 0 or below")
        if self.guided_from > self.guided_until:
            raise UserError(
                f"fast: guided_from is {self.guided_from} and guided_until {self.guided_until}, so that no step would "
                "be guided; give a smaller guided_from, or a guidance of 1"
            )
        if self.full_every > 1 and (self.guided_from, self.guided_until) != (0, 1):
            raise UserError(
                f"fast: full_every is {self.full_every}, and local steps need guidance in all steps; also give "
                "guided_from 0 and guided_until 1"
            )

    def revisions(self, steps: int) -> int:
        """How many of `steps` revise a picture that is already full."""
        return math.floor(steps * self.revising)

    def of_one(self, *, checked: bool) -> FastCodes:
        """The settings by which a picture that is checked, or is not, is drawn once."""
        if self.tries == 1 or checked:
            return replace(self, tries=1)
        return replace(CAREFUL_CODES, steps=self.unchecked_steps)


@dataclass(frozen=True, kw_only=True)
class Tries:
    """How the tries of a picture are drawn.

    Args:
        most: Tries of a picture.
        less: Settings of less work; None does all of it.
        own: Sampling steps that the call gives for every try; None: those of the settings.
    """

    most: int
    less: FastFlow | FastCodes | None = None
    own: int | None = None

    def steps(self, default: int, *, checked: bool) -> int:
        """Sampling steps of one try of a picture that is checked, or is not; `default` without settings."""
        less = self.settings(checked=checked)
        return self.own if self.own is not None else default if less is None else less.steps

    def settings(self, *, checked: bool) -> FastFlow | FastCodes | None:
        """Of one try of a picture that is checked, or is not."""
        return self.less.of_one(checked=checked) if isinstance(self.less, FastCodes) else self.less


def tries_of(best_of: int, less: FastFlow | FastCodes | None, steps: int | None, *, checks: bool) -> Tries:
    """The tries of a call: `best_of` of them where that is above 1, else those of `less`.

    Args:
        best_of: Of the call.
        less: Settings of less work.
        steps: Of the call. Those of `less` are no steps of the call's own: the engine names them, too.
        checks: Whether the model can compare a picture with its prompt; else `less` draws once.
    """
    most = less.tries if best_of == 1 and isinstance(less, FastCodes) and checks else best_of
    return Tries(most=most, less=less, own=None if less is not None and steps == less.steps else steps)


# A revision takes a quarter of the tokens, with guidance in all steps. Without `fast` codes mode takes `FULL_CODES`.
FULL_CODES = FastCodes(
    steps=STEPS["codes"],
    revising=0.375,
    revised=0.25,
    power=None,
    spread=False,
    guided_from=0.0,
    guided_until=1.0,
    tries=1,
)
# PNG files name all settings that there were. What those of before these hold was drawn once, in random order.
_NEWER: dict[str, Any] = {"power": None, "spread": False, "tries": 1, "unchecked_steps": FastCodes.unchecked_steps}
CAREFUL_CODES = replace(FULL_CODES, steps=26, confidence=-0.4, neighbours=True)


def fast_settings(mode: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a mode by name, those of the measured mix where they are not given.

    Raises:
        UserError: The mode has no such setting, or it has no such value.
    """
    return asdict(settings_for(mode or "flow", given))


def settings_for(mode: str, given: bool | Mapping[str, Any]) -> FastFlow | FastCodes:
    """The settings of a mode: the measured mix, with those that a mapping names in their place."""
    named = {} if isinstance(given, bool) else given
    if mode != "codes":
        return checked(FastFlow, named)
    older = {field.name for field in fields(FastCodes)} - _NEWER.keys()
    return checked(FastCodes, named if older - named.keys() else _NEWER | dict(named))


def decides_by_picture(settings: FastFlow | FastCodes | None) -> bool:
    """Whether a threshold that the last bits of a picture can cross decides what is computed."""
    return isinstance(settings, FastFlow) and settings.adaptive is not None


@dataclass(frozen=True, kw_only=True)
class FlowPlan:
    """What each step of a run computes.

    Args:
        guided: So many steps, from the first on, compute every guidance branch.
        refreshed: The steps that compute features.
        adaptive: Whether guidance also depends on the picture.
    """

    guided: int
    refreshed: frozenset[int]
    adaptive: AdaptiveGuidance | None = None


def flow_plan(settings: FastFlow, sigmas: Sequence[float]) -> FlowPlan:
    """The plan of a run with these noise levels."""
    guided = math.ceil(settings.guided * len(sigmas) - 1e-9)
    count = max(1, math.ceil(settings.features * len(sigmas) - 1e-9))
    table = [[similarity_at(a, b) for b in sigmas] for a in sigmas]
    weights = [GUIDANCE if step <= guided else 1.0 for step in range(len(sigmas))]
    return FlowPlan(
        guided=guided, refreshed=frozenset(refresh_steps(table, count, weights)), adaptive=settings.adaptive
    )


def similarity_at(first: float, second: float) -> float:
    """The mean cosine of features at two noise levels: `SIMILARITY`, linear between its levels; 1 for equal levels."""
    if first == second:
        return 1.0
    rows = [(row, share) for row, share in _neighbours(first) if share]
    columns = [(column, share) for column, share in _neighbours(second) if share]
    return sum(a * b * SIMILARITY[row][column] for row, a in rows for column, b in columns)


def _neighbours(level: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """The levels of the table around one, with the share of each."""
    level = min(max(level, LEVELS[-1]), LEVELS[0])
    lower = next(i for i in range(1, len(LEVELS)) if LEVELS[i] <= level)
    share = (level - LEVELS[lower]) / (LEVELS[lower - 1] - LEVELS[lower])
    return (lower - 1, share), (lower, 1 - share)
