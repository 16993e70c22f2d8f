"""Device and compute type: chosen in one place, by what the machine computes in; and how threads wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from mm.core import devices, threads
from mm.core.devices import Choice

NO_BF16 = {"avx2": True, "avx512_bf16": False, "amx_bf16": False, "architecture": "x86_64"}
BF16 = NO_BF16 | {"avx512_bf16": True}


@pytest.fixture
def cpu(monkeypatch):
    """Makes torch say what a CPU can do."""

    def say(found: dict, capability: str, **environment: str) -> Choice:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return devices.choose()

    return say


def test_a_cpu_computes_in_bfloat16_only_where_it_has_instructions_for_it(cpu):
    assert cpu(BF16, "AVX512").dtype == torch.bfloat16
    old = cpu(NO_BF16, "AVX2")
    assert old.dtype == torch.float32
    assert "no bfloat16 arithmetic" in old.reason
    capped = cpu(BF16, "AVX2")
    assert capped.dtype == torch.float32
    assert "AVX2" in capped.reason
    held = cpu(BF16, "AVX512", ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI")
    assert held.dtype == torch.float32
    assert "AVX512_CORE_VNNI" in held.reason
    assert cpu(BF16, "AVX512", ONEDNN_MAX_CPU_ISA="AVX512_CORE_AMX").dtype == torch.bfloat16
    assert cpu({"bf16": True, "architecture": "aarch64"}, "DEFAULT").dtype == torch.bfloat16


def test_the_caps_of_torch_are_obeyed_in_a_process_of_its_own():
    code = "from mm.core.devices import choose; c = choose(); print(c.device, c.dtype)"
    capped = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=capped, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() in (["cpu", "torch.float32"], ["mps", "torch.float16"]), done.stderr


@pytest.mark.parametrize(
    ("stored", "device", "best", "wanted"),
    [
        (torch.bfloat16, "cpu", torch.float32, torch.float32),
        (torch.bfloat16, "cpu", torch.bfloat16, torch.bfloat16),
        (torch.float16, "cpu", torch.bfloat16, torch.float32),  # bfloat16 would drop three of its bits
        (torch.float16, "cuda", torch.bfloat16, torch.float16),
        (torch.bfloat16, "cuda", torch.float16, torch.float32),
        (torch.float32, "cpu", torch.bfloat16, torch.float32),
        (None, "cpu", torch.bfloat16, torch.float32),
    ],
)
def test_nothing_of_the_weights_is_lost_in_the_compute_type(stored, device, best, wanted):
    choice = Choice(device=device, dtype=best, reason="")
    assert devices.compute_type(stored, choice) == wanted


def test_placing_widens_what_would_be_slow_and_leaves_the_rest():
    slow = Choice(device="cpu", dtype=torch.float32, reason="")
    assert devices.place(nn.Linear(3, 3).bfloat16(), slow).weight.dtype == torch.float32
    fast = Choice(device="cpu", dtype=torch.bfloat16, reason="")
    assert devices.place(nn.Linear(3, 3).bfloat16(), fast).weight.dtype == torch.bfloat16
    mixed = nn.Sequential(nn.Linear(30, 30).bfloat16(), nn.LayerNorm(3))
    assert devices.main_type(mixed) == torch.bfloat16
    assert devices.main_type(nn.Identity()) is None


def test_spinning_is_bounded_unless_the_user_has_said_how_to_wait():
    fresh: dict[str, str] = {}
    assert threads.bound_spinning(fresh)
    assert fresh == {"GOMP_SPINCOUNT": str(threads.SPIN_COUNT), "KMP_BLOCKTIME": threads.BLOCK_TIME}
    assert "set by mm" in threads.policy(fresh)
    for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "5"), ("KMP_BLOCKTIME", "200")):
        own = {name: value}
        assert not threads.bound_spinning(own)
        assert own == {name: value}
        assert f"{name}={value}" in threads.policy(own)
    assert "spin while they wait" in threads.policy({})


def test_the_command_bounds_spinning_before_torch_and_an_import_does_not(tmp_path):
    bare = {k: x for k, x in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    code = "import os, mm; assert 'GOMP_SPINCOUNT' not in os.environ"
    subprocess.run([sys.executable, "-c", code], check=True, env=bare, timeout=300)
    file = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "mm", "doctor", "--json", str(file)]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "set by mm" in done.stdout
    facts = json.loads(file.read_text())
    assert facts["device"]["computes_in"] in ("bfloat16", "float32", "float16")
    assert facts["device"]["why"] in done.stdout
    assert facts["threads"]["cores"] >= 1
