"""The certificate of an erasure: what was measured of a model with a patch, and of the same model without it.

Design choices
- Rates follow UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846): UA, the share of pictures of the target's prompts
  without the target; IRA, the share of other concepts that are still drawn; CRA, the share of another domain (the style
  of an object, the object of a style) that is still drawn. Each has n and a Wilson interval, and the base's rate.
- A picture that the judge cannot read counts as a failure everywhere and is reported as a class of its own.
- The same prompts and seeds are drawn with and without the patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm.core.statistics import share
from mm.erasure.measure import Labels
from mm.erasure.probes import Probe


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was measured; `to_dict` is what a patch's report keeps.

    Attributes:
        targets: that were erased.
        rates: by name ("UA", "IRA", "CRA", "wording", "lookalike", "invalid"), with score, n, low and high.
        base: the same rates of the model without the patch; "UA" is then the share of prompts that the model does not
            fulfil by itself.
        instead: labels on pictures of the target's prompts, by how often.
        composition: mean change of the composition score, with n and interval; None where it was not measured.
        quantized: rates and base rates by the name of the quantization.
        attacks: results by the name of the attack.
        seconds: that making the patch took, and that the measurement took.
        settings: of the measurement.
        pictures: some before and after, for a grid; not kept in files.
    """

    targets: tuple[str, ...]
    rates: Mapping[str, Any]
    base: Mapping[str, Any]
    instead: Mapping[str, int]
    composition: Mapping[str, Any] | None = None
    quantized: Mapping[str, Any] = field(default_factory=dict)
    attacks: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[tuple[str, Image.Image, Image.Image], ...] = field(default=(), repr=False)

    @property
    def overall(self) -> float:
        """The harmonic mean of UA, IRA and CRA."""
        return harmonic([self.rates[name]["score"] for name in ("UA", "IRA", "CRA")])

    @property
    def relative(self) -> float:
        """The harmonic mean of UA and of IRA and CRA as shares of the base's."""
        kept = [over(self.rates[name], self.base[name]) for name in ("IRA", "CRA")]
        return harmonic([self.rates["UA"]["score"], *kept])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pictures."""
        names = ("rates", "base", "instead", "composition", "quantized", "attacks", "seconds", "settings")
        made = {name: _plain(getattr(self, name)) for name in names}
        return {"targets": list(self.targets), "overall": round(self.overall, 4)} | made

    def card(self) -> str:
        """A table for a terminal."""
        rows = [f"certificate of an erasure: {', '.join(self.targets)}"]
        for name, rate in self.rates.items():
            if rate["n"]:
                before = self.base[name]["score"]
                interval = f"[{rate['low']:.3f}, {rate['high']:.3f}]"
                rows.append(f"{name:12} {rate['score']:.3f}  {interval}  n {rate['n']:<4}  base {before:.3f}")
        seen = ", ".join(f"{label} {count}" for label, count in list(self.instead.items())[:5])
        rows.append(f"drawn instead: {seen or 'nothing that the judge names'}")
        if self.composition is not None:
            c = self.composition
            rows.append(f"composition  {c['change']:+.3f}  [{c['low']:+.3f}, {c['high']:+.3f}]  n {c['n']}")
        for name, found in self.quantized.items():
            moved = ", ".join(f"{k} {found['rates'][k]['score']:.3f}" for k in ("UA", "IRA"))
            if "base" in found:
                moved += f" (base IRA {found['base']['IRA']['score']:.3f})"
            if "truncated" in found:
                moved += f"; truncated to rank {found['truncated']['rank']}, {found['truncated']['lost']:.1%} lost"
            if "baked" in found:
                moved += f"; baked before: UA {found['baked']['UA']['score']:.3f}"
            rows.append(f"{name}: {moved}")
        for name, found in self.attacks.items():
            with_it, without = found["success"], found["without"]
            rows.append(
                f"attack {name}: {with_it['score']:.3f} [{with_it['low']:.3f}, {with_it['high']:.3f}] n {with_it['n']}"
                f", without it {without['score']:.3f}"
            )
        made, took = self.seconds.get("make"), self.seconds.get("measure")
        rows.append(f"seconds: {made if made is not None else 'not known'} to make, {took} to measure")
        return "\n".join(rows)


def harmonic(values: Sequence[float | None]) -> float:
    """The harmonic mean; 0 where a value is 0 or None."""
    given = [float(value or 0.0) for value in values]
    return len(given) / sum(1 / value for value in given) if all(given) else 0.0


def over(rate: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """A rate as a share of the base's, at most 1; 0 where neither was measured."""
    return min(1.0, (rate["score"] or 0.0) / base["score"]) if base["score"] else 0.0


def _plain(value: Any) -> Any:
    return {k: _plain(x) for k, x in value.items()} if isinstance(value, Mapping) else value


def rates_of(probes: Sequence[Probe], labels: Sequence[Labels]) -> dict[str, Any]:
    """All rates from what the pictures of the probes show."""
    rows = list(zip(probes, labels, strict=True))

    def of(role: str, asked: Callable[[Probe, frozenset[str]], bool]) -> dict[str, Any]:
        return share([seen is not None and asked(p, seen) for p, seen in rows if p.role == role])

    cross = [seen is not None and p.cross in seen for p, seen in rows if p.role == "retained" and p.cross]
    return {
        "UA": of("target", lambda p, seen: p.concept not in seen),
        "IRA": of("retained", lambda p, seen: p.concept in seen),
        "CRA": share(cross),
        "wording": of("wording", lambda p, seen: p.concept not in seen),
        "lookalike": of("lookalike", lambda p, seen: p.concept in seen),
        "target cross": share([s is not None and p.cross in s for p, s in rows if p.role == "target" and p.cross]),
        "invalid": share([seen is None for _, seen in rows]),
    }
