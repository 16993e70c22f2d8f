"""Writes docs/results.md from the JSON reports of one session, so that no figure there is typed by hand.

    python benchmarks/results_page.py runs/ docs/results.md

`runs/` holds compose-flow.json, compose-codes.json (`mm eval compose`), reconstruct.json, understand.json,
understand-wide.json (`--wide`), edit.json, chat.json (the commands of those names), those of compose, edit and
chat with `-best` (`--best-of`), ett.json and encoders.json (`mm.training.studies`), generate.json, linear.json and
quantized.json (`benchmarks/`). Where one is missing, the page keeps what it said: the section of an earlier report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm.core.files import write_text


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A report, or None where it was not made."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _title(settings: dict[str, Any]) -> str:
    """What a title says of pictures that were drawn again."""
    return f", best of {settings['best_of']}" if settings.get("best_of", 1) > 1 else ""


def _option(settings: dict[str, Any]) -> str:
    """The option of a command by which pictures were drawn again."""
    return f" --best-of {settings['best_of']}" if settings.get("best_of", 1) > 1 else ""


def compose_section(report: dict[str, Any]) -> str:
    """One compose run."""
    s = report["settings"]
    command = f"mm eval compose --mode {s['mode']} --seed {s['seed']} --guidance {s['guidance']} --steps {s['steps']}"
    command += f" --pictures {s['pictures']}" + (f" --limit {s['limit']}" if s["limit"] else "") + _option(s)
    rows = []
    for task, row in report["tasks"].items():
        top = report["ceiling_tasks"][task]
        interval = f"{row['low']:.3f} - {row['high']:.3f}"
        rows.append(
            [
                task,
                f"{row['score']:.3f}",
                interval,
                str(row["n"]),
                f"{top['renders']:.3f}",
                f"{top['reconstructed']:.3f}",
            ]
        )
    tops = [f"{report['ceiling']:.3f}", f"{report['ceiling_reconstructed']:.3f}"]
    rows.append(["**overall**", f"**{report['overall']:.3f}**", "", str(report["n"]), *tops])
    for name in ("style", "background", "invalid"):
        row = report[name]
        if row["n"] == 0:  # no prompt names one
            continue
        rows.append([name, f"{row['score']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}", str(row["n"]), "", ""])
    head = ["task", "score", "95 % interval", "n", "ceiling: renders", "reconstructed"]
    return f"## Compose, {s['mode']} mode{_title(s)}\n\n`{command}`\n\n{table(head, rows)}"


def reconstruct_section(report: dict[str, Any]) -> str:
    """The tokenizers."""
    styles = list(next(iter(report["tasks"].values()))["styles"])
    rows = [
        [
            name,
            f"{r['bits']:.0f}",
            f"{r['ssim']:.3f}",
            f"{r['score']:.2f}",
            *(f"{r['styles'][s]['score']:.2f}" for s in styles),
        ]
        for name, r in report["tasks"].items()
    ]
    count = report["settings"]["pictures_per_style"]
    note = (
        f"PSNR in dB on held-out renders, {count} a style: `mm eval reconstruct --limit {count} --extra COMPARISONS`."
    )
    return f"## Tokenizers\n\n{note}\n\n{table(['tokenizer', 'bits', 'SSIM', 'mean', *styles], rows)}"


def generate_section(report: dict[str, Any]) -> str:
    """Seconds a picture."""
    rows = [[name, f"{value:.3f}"] for name, value in report.items() if isinstance(value, float)]
    shares = ", ".join(f"{name} {value:.0%}" for name, value in report["shares"].items())
    text = f"`python benchmarks/generate.py`, {report['threads']} threads, seconds (median):"
    body = table(["what", "seconds"], rows)
    return f"## Speed on two CPU cores\n\n{text}\n\n{body}\n\nShares of a default picture: {shares}."


def understand_section(report: dict[str, Any]) -> str:
    """Reading."""
    s = report["settings"]
    rows = [
        [k, f"{t['score']:.3f}", f"{t['low']:.3f} - {t['high']:.3f}", str(t["n"])] for k, t in report["tasks"].items()
    ]
    rows.append(["**overall**", f"**{report['overall']:.3f}**", "", str(report["n"])])
    said, true = report["captions"], report["ceiling_captions"]
    text = (
        f"Descriptions: precision {said['precision']:.3f} (ceiling {true['precision']:.3f}), "
        f"recall {said['recall']:.3f} ({true['recall']:.3f}). "
        f"Share of yes among existence questions: {report['yes_share']:.2f} of .50."
    )
    command = f"`mm eval understand --limit {s['limit']} --seed {s['seed']}`"
    return f"## Reading\n\n{command}\n\n{table(['kind', 'accuracy', '95 % interval', 'n'], rows)}\n\n{text}"


def wide_section(report: dict[str, Any]) -> str:
    """Reading, in other wordings."""
    s, every = report["settings"], report["all questions"]
    rows = [
        [k, f"{t['score']:.3f}", f"{t['low']:.3f} - {t['high']:.3f}", str(t["n"])] for k, t in report["tasks"].items()
    ]
    interval = f"{every['low']:.3f} - {every['high']:.3f}"
    rows.append(["all questions", f"{every['score']:.3f}", interval, str(report["n"])])
    rows.append(["**mean of the kinds**", f"**{report['overall']:.3f}**", "", ""])
    text = f"`mm eval understand --wide --limit {s['limit']} --seed {s['seed']} --each {s['each']}`: "
    text += f"{report['wordings']} held-out wordings (`{s['wordings']}`) about held-out scenes."
    return f"## Reading, in other wordings\n\n{text}\n\n{table(['kind', 'right', '95 % interval', 'n'], rows)}"


def edit_section(report: dict[str, Any]) -> str:
    """Editing."""
    s = report["settings"]
    rows = [
        [k, f"{t['score']:.3f}", f"{t['success']:.3f}", f"{t['low']:.3f} - {t['high']:.3f}", f"{t['preservation']:.3f}",
         str(t["n"]), f"{report['ceiling_tasks'][k]:.3f}"]
        for k, t in report["tasks"].items()
    ]  # fmt: skip
    rows.append(
        ["**overall**", f"**{report['overall']:.3f}**", "", "", "", str(report["n"]), f"{report['ceiling']:.3f}"]
    )
    head = ["kind", "sqrt(success x preservation)", "success", "95 % interval", "preservation", "n", "ceiling"]
    command = f"mm eval edit --limit {s['limit']} --guidance {s['guidance']} --image-guidance {s['image_guidance']}"
    return f"## Editing{_title(s)}\n\n`{command}{_option(s)}`\n\n{table(head, rows)}"


def chat_section(report: dict[str, Any]) -> str:
    """Conversations."""
    s = report["settings"]
    rows = [
        [k, f"{t['score']:.3f}", f"{t['low']:.3f} - {t['high']:.3f}", str(t["n"])]
        for k, t in (report["tasks"] | {"conversations without a fault": report["faultless"]}).items()
    ]
    text = f"`mm eval chat --seed {s['seed']}{_option(s)}`: {report['faultless']['n']} scripts, {report['n']} turns; "
    text += f"one who draws the renderer's truth gets {report['ceiling']:.3f} of all turns right by the judge."
    return f"## Conversations{_title(s)}\n\n{text}\n\n{table(['turns', 'right', '95 % interval', 'n'], rows)}"


def _share_cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['score']:.3f} ({row['low']:.3f} - {row['high']:.3f})"


def _change_cell(change: list[float] | None) -> str:
    return "" if change is None else f"{100 * change[0]:+.1f} [{100 * change[1]:+.1f}, {100 * change[2]:+.1f}]"


def ett_section(report: dict[str, Any]) -> str:
    """End-to-end tuning of the tokenizer."""
    s = report["settings"]
    rows = [
        [name, _share_cell(arm["understanding"]), _change_cell(arm.get("change")), f"{arm['reconstruction']:.2f}",
         _share_cell(arm.get("drawing")), _change_cell(arm.get("drawing_change")), str(arm["seconds"])]
        for name, arm in report["arms"].items()
    ]  # fmt: skip
    head = ["arm", "questions right", "against frozen, points", "PSNR through the bridge, dB", "drawn right"]
    head += ["against frozen, points", "seconds"]
    world = "" if s.get("small") else " --whole-world"
    text = f"`python -m mm.training.studies.ett --out runs/ett --samples {s['samples']} --drawn {s['drawn']}{world}`: "
    text += f"{report['n']} questions on held-out scenes through the generation tokenizer's codes, width {s['width']}, "
    text += f"batches of {s['batch_size']}, paired, 95 % intervals from resampling scenes."
    names = list(next(iter(report["arms"].values()))["kinds"])
    kinds = [[name, *(f"{arm['kinds'][kind]:.3f}" for kind in names)] for name, arm in report["arms"].items()]
    tables = f"{table(head, rows)}\n\n{table(['arm', *names], kinds)}"
    return f"## Tuning the tokenizer end to end (ETT)\n\n{text}\n\n{tables}"


def encoders_section(report: dict[str, Any]) -> str:
    """One encoder or two."""
    s = report["settings"]
    rows = [
        [name, _share_cell(arm["understanding"]), _change_cell(arm.get("change")), _share_cell(arm["drawing"]),
         _change_cell(arm.get("drawing_change")), str(arm["seconds"])]
        for name, arm in report["arms"].items()
    ]  # fmt: skip
    head = ["arm", "questions right", "against shared, points", "drawn right", "against shared, points", "seconds"]
    text = f"`python -m mm.training.studies.encoders --out runs/encoders --samples {s['samples']}`: "
    text += f"{report['n']} questions, batches of {s['batch_size']}, paired, "
    text += "95 % intervals from resampling scenes and prompts."
    return f"## One encoder or two\n\n{text}\n\n{table(head, rows)}"


def linear_section(report: dict[str, Any]) -> str:
    """Linear layers against peers: times as fast as torch's bf16."""
    names = [n for n in report["rows"][0]["speedup"] if n != "torch bf16"]
    rows = []
    for row in report["rows"]:
        cells = [f"{row['outputs']} x {row['inputs']}", str(row["tokens"]), f"{row['milliseconds']['torch bf16']:.3g}"]
        cells += [f"{row['speedup'][n]:.2f}" if n in row["speedup"] else "" for n in names]
        adds = [row.get(key) for key in ("fused_adds", "fused_adds_among_peers", "unfused_adds")]
        rows.append([*cells, *("" if share is None else f"{share:.0%}" for share in adds)])
    head = ["outputs x inputs", "tokens", "torch bf16, ms", *names, "branch adds", "among peers", "unfused adds"]
    absent = "".join(f"\n\nNot here: {n} ({why})." for n, why in report["absent"].items())
    text = "`python benchmarks/linear.py`: times as fast as torch's bf16 in the same run, two threads, rank 32. "
    text += "What the branch adds is timed before any peer's layers are there, and again among them."
    return f"## 4-bit linear layers on two CPU cores\n\n{text}\n\n{table(head, rows)}{absent}"


def quantized_section(report: dict[str, Any]) -> str:
    """What 4 bits cost."""
    rows = []
    for name, row in report["rows"].items():
        if "absent" in row:
            rows.append([name, "", row["absent"], ""])
            continue
        change = f"{row['change']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        rows.append([name, f"{row['bits']:.2f}", f"{row['psnr']:.2f}", change])
    head = ["method", "bits a weight", "PSNR to 16 bits, dB", "compose, points (95 %)"]
    text = f"`python benchmarks/quantized_generate.py`, {report['pictures']} pictures of tuning prompts."
    text = f"## mm-tiny in 4 bits\n\n{text}\n\n{table(head, rows)}"
    if judged := report["judged"]:
        change = f"{judged['change']:+.1f} points [{judged['low']:+.1f}, {judged['high']:+.1f}]"
        text += f"\n\nThe default on {judged['pictures']} pictures of all tuning prompts:"
        text += f" compose {judged['before']:.1f} -> {judged['after']:.1f}, {change}, resampled by prompt."
    loras = [[name, *(f"{value:.2f}" for value in row.values())] for name, row in report["loras"].items()]
    if loras:
        kinds = [f"{kind}, dB" for kind in next(iter(report["loras"].values()))]
        text += f"\n\nPSNR to the 16-bit model with a LoRA:\n\n{table(['LoRA', *kinds], loras)}"
    return text


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds the reports")
    parser.add_argument("target", type=Path, help="the page")
    given = parser.parse_args()
    folder, target = given.folder, given.target
    parts = [
        "# Results of weights/mm-tiny",
        "Written by `benchmarks/results_page.py` from reports; see docs/evaluation.md.",
    ]
    kept = {part.split("\n")[0]: part for part in _sections(target)}
    for name, (title, make) in MAKERS.items():
        report = read(folder, name)
        if report is not None:
            parts.append(make(report))
        elif title in kept:
            parts.append(kept[title])
    write_text(target, "\n\n".join(parts) + "\n")


def _sections(page: Path) -> list[str]:
    """The sections of a page that was written before."""
    text = page.read_text() if page.is_file() else ""
    return ["## " + part.strip() for part in text.split("\n## ")[1:]]


MAKERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "compose-flow": ("## Compose, flow mode", compose_section),
    "compose-codes": ("## Compose, codes mode", compose_section),
    "compose-flow-best": ("## Compose, flow mode, best of 8", compose_section),
    "compose-codes-best": ("## Compose, codes mode, best of 8", compose_section),
    "reconstruct": ("## Tokenizers", reconstruct_section),
    "understand": ("## Reading", understand_section),
    "understand-wide": ("## Reading, in other wordings", wide_section),
    "edit": ("## Editing", edit_section),
    "edit-best": ("## Editing, best of 4", edit_section),
    "chat": ("## Conversations", chat_section),
    "chat-best": ("## Conversations, best of 4", chat_section),
    "ett": ("## Tuning the tokenizer end to end (ETT)", ett_section),
    "encoders": ("## One encoder or two", encoders_section),
    "generate": ("## Speed on two CPU cores", generate_section),
    "quantized": ("## mm-tiny in 4 bits", quantized_section),
    "linear": ("## 4-bit linear layers on two CPU cores", linear_section),
}


if __name__ == "__main__":
    main()
