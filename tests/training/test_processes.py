"""Several processes that train one model: they end at the same step, and the first writes alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each process has a clock of its own speed, and is asked to stop or not: what real machines do by chance.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from mm.training import trainer as module
from mm.training.trainer import Trainer, TrainerConfig

out, ending, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])

class Clock:
    monotonic = staticmethod(lambda: time.monotonic() * (1 + 4 * rank))

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(8, 1)
    def forward(self, batch):
        return {"square": (self.line(batch) - batch.sum(-1, keepdim=True)).square().mean()}

def batches(step, process):
    if ending == "signal" and process == 1 and step == 20:
        os.kill(os.getpid(), signal.SIGTERM)
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(2 * step + process))

module.time = Clock
torch.manual_seed(rank)
config = TrainerConfig(minutes=0.05 if ending == "clock" else 10, batch_size=4, decay_share=1.0, warmup=2)
trainer = Trainer(Line(), out / "run", config)
evaluated = []
trainer.run(batches, lambda t: evaluated.append(t.step))
weights = [float(x) for p in trainer.bare.parameters() for x in p.flatten()]
found = {"step": trainer.step, "seconds": trainer.seconds, "evaluated": evaluated, "weights": weights}
(out / f"{rank}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("ending", ["clock", "signal"])
def test_processes_with_different_clocks_and_signals_end_together(tmp_path: Path, ending: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "script.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, str(tmp_path), ending], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["step"] == second["step"] > (0 if ending == "clock" else 20)
    assert first["seconds"] == second["seconds"]  # the learning rate depends on them
    assert first["weights"] == second["weights"]
    assert first["evaluated"] == [first["step"]]
    assert second["evaluated"] == []
