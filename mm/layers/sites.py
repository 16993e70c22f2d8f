"""Sites: what each linear layer of a model is for. Quantization, erasure and customization read this.

Design choices
- A family's table is a tuple of rules over module paths, and the first rule that matches a path decides. The tables
  are in `mm.families`; here is the mechanism.
- Layers that read the same input form a group (q, k, v; the two halves of a gate): one smoothing, one rounding of x.
  Members whose widths differ cannot read the same input, so a group is split by width, whatever a rule says.
  `mm.layers.tracing` splits groups by what a call of the model reads.
- `precision` follows the field's practice: attention and feed-forward go low, modulation (adaLN) gets low weights with
  16-bit inputs, embeddings, projections at the ends and time stay as they are; PixArt and SANA also keep the keys and
  values of cross-attention (SVDQuant, arXiv 2411.05007).
- `bits` names weights that need more than 4 bits, whatever was asked.
- `after` names an activation right before the layer whose outputs have a small lower bound, so that they can be shifted
  and rounded without a sign. Gated products have no such bound.
- A layer that its owner calls through `torch.nn.functional` (the output projection of `nn.MultiheadAttention`) cannot
  be replaced by another module and is always kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mm.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Precision = Literal["low", "weight_only", "keep"]
Reads = Literal["text", "picture", "both", "time"]
After = Literal["gelu", "silu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One linear layer. `group`: who shares its input. `parent`: the module, holding the whole group, at whose output
    errors are scored; empty = at the layers' own outputs.
    """

    path: str
    role: str
    reads: Reads = "picture"
    precision: Precision = "low"
    group: str
    parent: str
    after: After | None = None
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Paths that match `pattern` as a whole; {1}, {2} in the other fields stand for its groups.

    An empty `group` is the path: the layer shares its input with no other.
    """

    pattern: str
    role: str
    reads: Reads = "picture"
    precision: Precision = "low"
    group: str = ""
    parent: str = ""
    after: After | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"the pattern {self.pattern!r} of a rule is no regular expression ({error})") from error
        for template in (self.role, self.group, self.parent):
            numbers = [int(number) for number in re.findall(r"\{(\d)\}", template)]
            if any(number > groups for number in numbers):
                raise UserError(f"{template!r} names a group that the pattern {self.pattern!r} does not have")


def match_sites(root: nn.Module, rules: Iterable[Rule], fallback: Iterable[Rule] = ()) -> list[Site]:
    """Every linear layer of a model as a site.

    Args:
        root: the model.
        rules: the family's table; the first rule that matches a path decides.
        fallback: rules for the paths that no rule of the family matches.

    Returns:
        Sites in the model's order. A path that neither table matches is left out.
    """
    from mm.layers.surgery import linears

    compiled = [(re.compile(rule.pattern), rule) for rule in (*rules, *fallback)]
    sites: list[Site] = []
    widths: dict[str, int] = {}
    for path, layer in linears(root):
        site = _site(path, compiled)
        if site is None:
            continue
        if type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            site = replace(site, precision="keep", group=path, parent="")
        sites.append(site)
        widths[path] = layer.in_features
    return split_groups(sites, widths)


def split_groups(sites: Sequence[Site], keys: dict[str, object] | dict[str, int]) -> list[Site]:
    """Splits groups whose members differ in `keys` (a value a path; a path without one stands alone).

    Members of the first value keep the group's name; the others' groups are named after their first member.
    """
    names: dict[tuple[str, object], str] = {}
    taken: set[str] = set()
    out = []
    for site in sites:
        key = (site.group, keys.get(site.path, site.path))
        if key not in names:
            names[key] = site.path if site.group in taken else site.group
            taken.add(site.group)
        out.append(replace(site, group=names[key]))
    return out


def _fill(template: str, match: re.Match[str]) -> str:
    return re.sub(r"\{(\d)\}", lambda m: match.group(int(m[1])), template)


def _site(path: str, rules: Sequence[tuple[re.Pattern[str], Rule]]) -> Site | None:
    for pattern, rule in rules:
        match = pattern.fullmatch(path)
        if match:
            return Site(
                path=path,
                role=_fill(rule.role, match),
                reads=rule.reads,
                precision=rule.precision,
                group=_fill(rule.group, match) or path,
                parent=_fill(rule.parent, match),
                after=rule.after,
                bits=rule.bits,
            )
    return None
