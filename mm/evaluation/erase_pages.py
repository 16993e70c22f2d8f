"""Tables in Markdown of the cells that `mm.evaluation.erase_cells` measures, put between marks in a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.core.files import write_text
from mm.core.statistics import wilson
from mm.erasure.certificate import harmonic, over
from mm.evaluation.erase_cells import FAST, PRESET

Reports = Mapping[str, Mapping[str, Any]]
RATES = {"UA": "UA", "IRA": "IRA", "CRA": "CRA", "wording": "wording", "lookalike": "look-alikes"}
MARK = "<!-- {} of erasures: {} -->"


def pooled(rates: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One rate of several: hits and numbers added up, with the Wilson interval."""
    found = [rate for rate in rates if rate["n"]]
    n = sum(rate["n"] for rate in found)
    hits = sum(round(rate["score"] * rate["n"]) for rate in found)
    low, high = wilson(hits, n) if n else (0.0, 1.0)
    return {"score": hits / n if n else None, "n": n, "low": low, "high": high}


def cells_of(reports: Reports, *parts: str) -> list[Mapping[str, Any]]:
    """Reports whose names begin with these parts."""
    return [report for name, report in reports.items() if name.split("/")[: len(parts)] == list(parts)]


def certificates(reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The certificates of all concepts in reports."""
    return [concept for report in reports for concept in report["concepts"].values()]


def heading(*names: str) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]


def results(reports: Reports) -> str:
    """Erasures alone, together, stacked and in codes mode."""
    rows = {
        f"concepts alone, {method}": cells_of(reports, "alone", method) for method in (FAST, PRESET)
    } | {
        "twenty objects in one patch": cells_of(reports, "together"),
        "ten patches stacked": cells_of(reports, "stacked"),
        "concepts alone in codes mode": cells_of(reports, "codes"),
    }  # fmt: skip
    lines = [
        "| what | UA | IRA (base) | CRA (base) | wording | look-alikes (base) | composition | relative H |",
        "|---" * 8 + "|",
    ]
    for title, found in rows.items():
        if found:
            lines.append(f"| {title} | " + " | ".join(_result(certificates(found))) + " |")
    return "\n".join(lines)


def _result(concepts: Sequence[Mapping[str, Any]]) -> list[str]:
    now, base = ({k: pooled(c[which][k] for c in concepts) for k in RATES} for which in ("rates", "base"))
    cells = [_rate(now["UA"])]
    cells += [_against(now[k], base[k]) for k in ("IRA", "CRA")]
    cells += [_rate(now["wording"]), _against(now["lookalike"], base["lookalike"])]
    changes = [c["composition"] for c in concepts if c["composition"]]
    n = sum(c["n"] for c in changes)
    cells.append(f"{sum(c['change'] * c['n'] for c in changes) / n:+.3f} (n {n})" if n else "")
    kept = [over(now[k], base[k]) for k in ("IRA", "CRA") if base[k]["n"]]
    return [*cells, f"{harmonic([now['UA']['score'], *kept]):.3f}"]


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['score']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] (n {rate['n']})" if rate["n"] else ""


def _against(rate: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return f"{rate['score']:.3f} ({base['score']:.3f}; n {rate['n']})" if rate["n"] else ""


def undone(reports: Reports) -> str:
    """What each patch of a stack leaves when it alone is taken off."""
    lines = [
        "| patch taken off | its concept is drawn again (base) | all tensors equal the stack without it |",
        "|---|---|---|",
    ]
    for report in cells_of(reports, "stacked"):
        for name, found in report.get("undone", {}).items():
            equal = "yes" if found["equal"] else "no"
            lines.append(f"| {name} | {_against(found['shown'], found['base'])} | {equal} |")
    return "\n".join(lines)


def attacks(reports: Reports) -> str:
    """Success of every attack on the default and on the robust preset."""
    found = {m: certificates(cells_of(reports, "attacks", m)) for m in (FAST, PRESET)}
    names = list(dict.fromkeys(name for concepts in found.values() for c in concepts for name in c["attacks"]))
    lines = heading("attack", FAST, PRESET, "without the attack")
    for name in names:
        hits = {m: [c["attacks"][name] for c in found[m] if name in c["attacks"]] for m in found}
        both = [_rate(pooled(x["success"] for x in hits[m])) for m in found]
        plain = " / ".join(f"{pooled(x['without'] for x in hits[m])['score'] or 0:.3f}" for m in found if hits[m])
        lines.append(f"| {name} | {both[0]} | {both[1]} | {plain} |")
    never = cells_of(reports, "never")
    for name in ("relearn-5", "relearn-20"):
        if floor := pooled(r[name]["success"] for r in never):
            lines += [f"| {name} of objects that the model never saw | {_rate(floor)} | | |"] if floor["n"] else []
    return "\n".join(lines)


def quantized(reports: Reports) -> str:
    """Rates after quantization, and with the patch rounded."""
    lines = [
        "| model | base UA | base IRA | patch applied after: UA | IRA | baked before: UA | IRA |",
        "|---" * 7 + "|",
    ]
    concepts = certificates(cells_of(reports, "quantized"))
    if concepts:
        first = concepts[0]
        lines.append("| 16 bits | " + " | ".join(_two(first["base"]) + _two(first["rates"])) + " | | |")
    for concept in concepts:
        for name, found in concept["quantized"].items():
            sides = [_two(found[key]) if key in found else ["", ""] for key in ("base", "rates", "baked")]
            lines.append(f"| {name} | " + " | ".join(cell for side in sides for cell in side) + " |")
    return "\n".join(lines)


def _two(rates: Mapping[str, Any]) -> list[str]:
    return [f"{rates[k]['score']:.3f} (n {rates[k]['n']})" for k in ("UA", "IRA")]


def methods(reports: Reports) -> str:
    """All methods on all columns; methods are the columns so that the table fits a page."""
    names = list(dict.fromkeys(name.split("/")[1] for name in reports if name.startswith("methods/")))
    rows = {name: _method(certificates(cells_of(reports, "methods", name))) for name in names}
    columns = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    lines = heading("", *rows)
    lines += [f"| {c} | " + " | ".join(cells.get(c, "") for cells in rows.values()) + " |" for c in columns]
    return "\n".join(lines)


def _method(concepts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    cells = {title: _short(pooled(c["rates"][name] for c in concepts)) for name, title in RATES.items()}
    made = [c["seconds"]["make"] for c in concepts if c["seconds"]["make"] is not None]
    cells["concepts"] = str(len(concepts))
    cells["seconds"] = f"{sum(made) / len(made):.0f}" if made else ""
    for name in dict.fromkeys(q for c in concepts for q in c["quantized"]):
        rates = [c["quantized"][name]["rates"] for c in concepts if name in c["quantized"]]
        cells[f"{name} UA / IRA"] = " / ".join(_short(pooled(r[k] for r in rates)) for k in ("UA", "IRA"))
        lost = [
            c["quantized"][name]["truncated"]["lost"] for c in concepts if "truncated" in c["quantized"].get(name, {})
        ]
        cells["lost by truncating"] = f"{max(lost):.0%}" if lost else cells.get("lost by truncating", "")
    for name in dict.fromkeys(a for c in concepts for a in c["attacks"]):
        hits = pooled(c["attacks"][name]["success"] for c in concepts if name in c["attacks"])
        cells[f"attack: {name}"] = _short(hits)
    return cells


def _short(rate: Mapping[str, Any]) -> str:
    return "" if rate["score"] is None else f"{rate['score']:.2f}"


def variants(reports: Reports) -> str:
    """The robust preset's variants on tuning prompts."""
    names = list(dict.fromkeys(name.split("/")[1] for name in reports if name.startswith("tuning/")))
    rows = {name: _method(certificates(cells_of(reports, "tuning", name))) for name in names}
    columns = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    lines = heading("", *columns)
    lines += [f"| {name} | " + " | ".join(cells.get(c, "") for c in columns) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Reports], str]] = {
    "results": results, "stack": undone, "attacks": attacks, "quantization": quantized, "methods": methods,
    "variants": variants,
}  # fmt: skip


def write_into(
    page: Path, reports: Reports, tables: Mapping[str, Callable[[Reports], str]] = TABLES, mark: str = MARK
) -> None:
    """Puts each table that has rows between its marks in a page; tables whose marks the page lacks are left out."""
    text = page.read_text()
    for name, table in tables.items():
        start, end = mark.format(name, "begin"), mark.format(name, "end")
        before, found, rest = text.partition(start)
        made = table(reports)
        if found and end in rest and made.count("\n") > 1:
            text = f"{before}{start}\n{made}\n{end}{rest.partition(end)[2]}"
    write_text(page, text)
