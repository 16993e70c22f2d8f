"""The fingerprint stage: it writes a file beside the model's parts, reports on that file, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from mm.core.paths import weights_dir
from mm.provenance.fingerprint import Fingerprint
from mm.provenance.report import FINGERPRINT
from mm.provenance.training import STATE
from mm.training.run import read_config, run_stages


def test_a_stage_writes_a_fingerprint_and_goes_on(tmp_path: Path) -> None:
    section = read_config("mm-tiny")["fingerprint"]
    section |= {"data": {"scenes": 6, "held_out": 4}}
    section["stage"] |= {"bits": 8, "eye": 4}
    section["trainer"] |= {"steps": 2, "batch_size": 4, "save_every": 1, "log_every": 1}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"fingerprint": section, "state": str(tmp_path / "state")}))
    weights = weights_dir() / "mm-tiny"
    run_stages(str(config), stages=["fingerprint"], init_from=weights)
    file = tmp_path / "state" / "model" / FINGERPRINT
    made = Fingerprint.load(file)
    assert made.config.bits == 8 and set(made.shapes) == {"decoder.3", "decoder.7", "decoder.11"}
    report = json.loads((tmp_path / "state" / "fingerprint" / "report.json").read_text())
    assert set(report["read"]) == {"none", "jpeg 80", "half", "crop a tenth"} and report["n"] == 4
    first = load_file(file)
    assert (tmp_path / "state" / "fingerprint" / STATE).is_file()
    run_stages(str(config), stages=["fingerprint"], init_from=weights)  # nothing is left to do
    again = load_file(file)
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)
