"""The table of claims in docs/customization.md, from the cells that `mm.evaluation.customize_cells` measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from mm.core.statistics import paired_change, share
from mm.evaluation.customize_cells import APART, MERGING
from mm.evaluation.erase_pages import cells_of, heading

Reports = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str, str, str]
MARK = "<!-- {} of customizations: {} -->"


def verdicts(reports: Reports, key: str, *parts: str) -> list[bool]:
    """The verdicts under a key of all cells whose names begin with these parts."""
    return [bool(x) for report in cells_of(reports, *parts) for x in report.get(key, ())]


def rate(found: Sequence[bool]) -> str:
    """A share with its Wilson interval and n."""
    made = share(found)
    return f"{made['score']:.3f} [{made['low']:.3f}, {made['high']:.3f}] (n {made['n']})"


def count_of(number: int, what: str) -> str:
    """A number of things: "1 subject", "2 subjects"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def over(one: Sequence[bool], other: Sequence[bool]) -> str:
    """The first share as a part of the second."""
    base = sum(other) / len(other)
    return f"{sum(one) / len(one) / base:.3f}" if base else "-"


def apart(one: Sequence[bool], other: Sequence[bool]) -> str:
    """The difference of two shares in points."""
    return f"{100 * (sum(one) / len(one) - sum(other) / len(other)):+.1f} points"


def _alone(reports: Reports) -> Iterator[Row]:
    for method in ("dreambooth", "orthogonal"):
        found, done = (verdicts(reports, key, "alone", method) for key in ("seen", "follows"))
        if found:
            cells = cells_of(reports, "alone", method)
            spent = [report["training"]["cpu_seconds"] for report in cells if report.get("training")]
            busy = f"{sum(spent) / len(spent):.0f} s of CPU each" if spent and all(spent) else ""
            title = f"{count_of(len(cells), 'subject')} alone, `{method}`: seen"
            yield title, rate(found), f"prompts followed {rate(done)}" if done else "", busy


def _unrelated(reports: Reports) -> Iterator[Row]:
    base, found = verdicts(reports, "right", "compose", "base"), verdicts(reports, "right", "compose", "dreambooth")
    if base and found and len(found) % len(base) == 0:
        before, prompts = base * (len(found) // len(base)), [k % len(base) for k in range(len(found))]
        mean, low, high = (100 * x for x in paired_change(before, found, prompts))
        count = count_of(len(cells_of(reports, "compose", "dreambooth")), "adapter")
        change = f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}], paired; -2.0 or more"
        yield f"compose prompts without the subject, {count}: right", rate(found), f"base {rate(base)}", change


def _merged(reports: Reports) -> Iterator[Row]:
    for count, method, how in product(("eight", "four"), ("orthogonal", "dreambooth"), MERGING):
        for report in cells_of(reports, "merged", method, count, how):
            single = [x for name in report["subjects"] for x in verdicts(reports, "seen", "alone", method, name)]
            if len(single) == len(report["seen"]):
                aim = "; >= .95" if method == "orthogonal" else ""
                yield (
                    f"{count} `{method}` adapters merged by `{how}`",
                    rate(report["seen"]),
                    f"one by one {rate(single)}",
                    f"{over(report['seen'], single)} of it{aim}",
                )


def _pairs(reports: Reports) -> Iterator[Row]:
    base = verdicts(reports, "both", "pairs", "base")
    for count, method, how in product(("eight", "four"), ("orthogonal", "dreambooth"), (APART, *MERGING)):
        found = verdicts(reports, "both", "pairs", method, count, how)
        if found and base:
            made = "drawn apart" if how == APART else f"merged by `{how}`"
            title = f"two learned subjects in one picture, `{method}`, {made}, pairs of {count}"
            yield title, rate(found), f"two known objects {rate(base)}", f"{over(found, base)} of it; >= .90"


def _beside(reports: Reports) -> Iterator[Row]:
    base = verdicts(reports, "both", "beside", "base")
    for method in ("dreambooth", "orthogonal"):
        found = verdicts(reports, "both", "beside", method)
        if found and base:
            title = f"a learned subject beside a known object, `{method}`"
            yield title, rate(found), f"two known objects {rate(base)}", f"{over(found, base)} of it"


def _four(reports: Reports) -> Iterator[Row]:
    for kind, title, wanted in (
        ("applied", "16-bit adapter on the 4-bit model", "within 2 points"),
        ("trained", "trained on the 4-bit model", "within 1 point"),
    ):
        names = [name.split("/")[2] for name in reports if name.startswith(f"four/{kind}/")]
        own = verdicts(reports, "seen", "four", kind)
        plain = [x for name in names for x in verdicts(reports, "seen", "alone", "dreambooth", name)]
        if own and len(own) == len(plain):
            yield (
                f"{title}, {count_of(len(names), 'subject')}",
                rate(own),
                f"at 16 bits {rate(plain)}",
                (f"{apart(own, plain)}; {wanted}"),
            )
    for report in cells_of(reports, "four", "trained")[:1]:
        small, large = report["bytes"], report["bytes_sixteen"]
        yield (
            "weights that its steps read",
            f"{small / 2**20:.1f} MiB",
            f"at 16 bits {large / 2**20:.1f} MiB",
            (f"{small / large:.2f} of it; <= .4"),
        )


def _grounds(reports: Reports) -> Iterator[Row]:
    keys = {"free": "where none is asked for", "other": "where another is asked for"}
    for key, title in keys.items():
        plain, own = (verdicts(reports, key, "ground", m) for m in ("textual-inversion", "detex"))
        if plain and own:
            yield (
                f"`detex`: the pictures' one background, {title}",
                rate(own),
                (f"`textual-inversion` {rate(plain)}"),
                f"{over(own, plain)} of it; <= .5",
            )
    plain, own = (verdicts(reports, "seen", "ground", m) for m in ("textual-inversion", "detex"))
    if plain and own:
        yield "`detex`: the subject in these pictures", rate(own), f"`textual-inversion` {rate(plain)}", ""


def _classes(reports: Reports) -> Iterator[Row]:
    base = verdicts(reports, "composed", "class", "base")
    for method in ("class-diffusion", "dreambooth"):
        found = verdicts(reports, "composed", "class", method)
        if base and found:
            title = f"`{method}` under NAME NOUN: background, style or companion as asked"
            wanted = ">= .98" if method != "dreambooth" else "beside it"
            yield title, rate(found), f"base {rate(base)}", f"{over(found, base)} of it; {wanted}"


def _erased(reports: Reports) -> Iterator[Row]:
    alone = verdicts(reports, "back", "erased", "alone")
    titles = {
        "unrelated": "an erased concept under an unrelated adapter", "on": "under an adapter trained on it",
        "on, guarded": "under an adapter trained on it with `--guard`",
    }  # fmt: skip
    drift = {
        name.partition("/")[2]: float(report["guard_drift"])
        for name, report in reports.items() if name.startswith("erased/on")
    }  # fmt: skip
    for part, title in titles.items():
        found = verdicts(reports, "back", "erased", part)
        if not found or not alone:
            continue
        more = "stays erased"
        if part != "unrelated":
            learned = verdicts(reports, "learned", "erased", part)
            more = f"drift {drift[part]:.3f}; under its own name {rate(learned)}"
        yield f"{title}: seen", rate(found), f"without the adapter {rate(alone)}", more
    if len(drift) == 2:
        kept = drift["on, guarded"] / drift["on"]
        yield "drift of its prompts with the guard", f"{kept:.2f} of that without", "", "<= .5"


def _styles(reports: Reports) -> Iterator[Row]:
    for method in ("dreambooth", "stydeco"):
        own, ceiling = (verdicts(reports, key, "style", method) for key in ("style", "style_ceiling"))
        seen, most = (verdicts(reports, key, "style", method) for key in ("object", "object_ceiling"))
        if own:
            count = len(cells_of(reports, "style", method))
            yield (
                f"{count_of(count, 'unseen style')}, `{method}`: style",
                rate(own),
                f"true pictures {rate(ceiling)}",
                (f"{over(own, ceiling)} of the ceiling"),
            )
            yield (
                f"{count_of(count, 'unseen style')}, `{method}`: object",
                rate(seen),
                f"true pictures {rate(most)}",
                (f"{over(seen, most)} of the ceiling"),
            )


ROWS: tuple[Callable[[Reports], Iterator[Row]], ...] = (
    _alone, _beside, _unrelated, _merged, _pairs, _four, _grounds, _classes, _erased, _styles,
)  # fmt: skip


def claims(reports: Reports) -> str:
    """The table of what has been measured so far."""
    lines = heading("what", "measured", "beside", "against what is wanted")
    lines += ["| " + " | ".join(row) + " |" for make in ROWS for row in make(reports)]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Reports], str]] = {"claims": claims}
