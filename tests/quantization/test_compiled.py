"""Models that torch.compile has compiled: quantized and erased as plain ones are."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import arguments_of, tiny_pipeline_of

import mm
from mm.core.errors import UserError
from mm.families import family_of, find_sites
from mm.families.registry import is_denoiser
from mm.layers.eager import eagerly

CONFIG = mm.SVDQuantConfig(rank=8, steps=2, size=32, rows=64, calls=1, iterations=1)


def _drawn(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**arguments_of("flux"), "generator": generator, "output_type": "np"}).images[0]


def _wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def _in_place(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


@pytest.mark.filterwarnings("error:mm.families has no rules")
@pytest.mark.parametrize("compiled", [_wrapped, _in_place])
def test_calibration_sees_the_layers_of_a_graph_and_the_folder_loads(compiled: Any, tmp_path: Path) -> None:
    plain, pipe = tiny_pipeline_of("flux"), tiny_pipeline_of("flux")
    compiled(pipe)
    _drawn(pipe)  # a graph without hooks
    for one in (plain, pipe):
        mm.quantize(one, CONFIG, calibration=["a wolf", "a cat"], progress=False)
    want = _drawn(plain)
    np.testing.assert_array_equal(_drawn(pipe), want)
    pipe.save_pretrained(tmp_path)
    np.testing.assert_array_equal(_drawn(diffusers.FluxPipeline.from_pretrained(tmp_path)), want)


def test_erasure_reads_layers_of_a_graph() -> None:
    plain, pipe = tiny_pipeline_of("stable-diffusion"), tiny_pipeline_of("stable-diffusion")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe(**arguments_of("stable-diffusion"))
    want, found = (mm.erase(one, "wolf") for one in (plain, pipe))
    assert want.entries.keys() == found.entries.keys()
    for path, entry in want.entries.items():
        for name, tensor in entry.tensors.items():
            torch.testing.assert_close(found.entries[path].tensors[name], tensor)


def test_a_compiled_module_has_the_family_of_what_it_wraps() -> None:
    model = tiny_pipeline_of("flux").transformer
    wrapped = torch.compile(model, backend="eager")
    assert family_of(wrapped) is family_of(model) is not None
    assert is_denoiser(wrapped)
    assert find_sites(wrapped) == find_sites(model)


def test_parts_that_are_wrapped_one_by_one_are_refused_before_anything_is_changed() -> None:
    pipe = tiny_pipeline_of("flux")
    blocks = pipe.transformer.transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    with pytest.raises(UserError, match=r"transformer_blocks\.0.*compile_repeated_blocks"):
        mm.quantize(pipe, mm.SVDQuantConfig(data_free=True), progress=False)


def test_graphs_are_used_again_when_the_last_has_left() -> None:
    import torch._dynamo

    assert "torch._dynamo" in sys.modules
    calls = []

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            return graph(*args)

        return run

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    x = torch.ones(2)
    compiled(x)
    assert len(calls) == 1
    first, second = threading.Event(), threading.Event()

    def other() -> None:
        with eagerly():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with eagerly():
        thread.start()
        first.wait(10)
        compiled(x)
    compiled(x)  # the other is inside
    assert len(calls) == 1
    second.set()
    thread.join()
    compiled(x)
    assert len(calls) == 2
