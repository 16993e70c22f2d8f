"""Five patches of four kinds on a tiny text encoder, and the ways a model can be run."""

from __future__ import annotations

import copy
from itertools import combinations

import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from tiny_public import TEXT
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import mm
from mm.adapters.patch import Entry, Patch
from mm.layers.linear import BranchedLinear

IDS = torch.tensor([[3, 7, 1, 4, 19]])
Q, K, V = (f"encoder.layers.0.self_attn.{n}_proj" for n in "qkv")
WIDTH, INNER = 64, 128  # layers of fewer inputs would grow at 4 bits, and so stay as they are
FC1, WORDS = "encoder.layers.0.mlp.fc1", "embeddings.token_embedding"


def text_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = TEXT | {"hidden_size": WIDTH, "intermediate_size": INNER}
    return CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=8)).eval().requires_grad_(False)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).last_hidden_state.clone()


def lowrank(outputs: int, inputs: int, rank: int, g: torch.Generator, scale: float = 1.0) -> Entry:
    tensors = {"down": torch.randn(rank, inputs, generator=g), "up": torch.randn(outputs, rank, generator=g) / 4}
    return Entry(kind="lowrank", tensors=tensors, scale=scale)


def rotation(size: int, g: torch.Generator) -> Entry:
    """Turns two directions of the outputs, so that R - I has rank 2."""
    basis = torch.linalg.qr(torch.randn(size, 2, generator=g))[0]
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    return Entry(kind="rotation", tensors={"rotation": torch.eye(size) + basis @ (turn - torch.eye(2)) @ basis.T})


def five() -> list[Patch]:
    """Two LoRAs, rows, a dense change (of a bias too) and a rotation; all but the rows meet on one layer."""
    g = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    rows = {"ids": torch.tensor([3, 19]), "rows": noise(2, WIDTH)}
    return [
        Patch(name="style", entries={Q: lowrank(WIDTH, WIDTH, 3, g, 0.7), FC1: lowrank(INNER, WIDTH, 2, g)}),
        Patch(
            name="no-wolf",
            method="dense",
            entries={
                Q: Entry(kind="dense", tensors={"delta": noise(WIDTH, WIDTH) / 8}),
                f"{Q}.bias": Entry(kind="bias", tensors={"delta": noise(WIDTH)}),
            },
        ),
        Patch(name="mug", method="rows", entries={WORDS: Entry(kind="rows", tensors=rows)}),
        Patch(name="turn", method="hirm", entries={Q: rotation(WIDTH, g), V: rotation(WIDTH, g)}),
        Patch(name="ink", entries={Q: lowrank(WIDTH, WIDTH, 66, g), K: lowrank(WIDTH, WIDTH, 1, g)}),
    ]


def outputs_of_subsets(model: nn.Module, patches: list[Patch]) -> dict[frozenset[str], Tensor]:
    """What the model gives with each subset of the patches, each on a copy that never had another one."""
    out = {}
    for count in range(len(patches) + 1):
        for chosen in combinations(patches, count):
            twin = copy.deepcopy(model)
            for patch in chosen:
                patch.apply(twin)
            out[frozenset(p.name for p in chosen)] = run(twin)
    return out


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def four_bits() -> tuple[nn.Module, list]:
    model = text_encoder()
    mm.quantize(model, mm.SVDQuantConfig(rank=4, data_free=True, keep=("k_proj", "v_proj")), progress=False)
    assert all(isinstance(model.get_submodule(path), BranchedLinear) for path in (Q, FC1))
    return model, [patch.truncated(4, model) if patch.method in ("dense", "hirm") else patch for patch in five()]


def dense(name: str = "dense", seed: int = 0, path: str = Q) -> Patch:
    delta = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Patch(name=name, method="dense", entries={path: Entry(kind="dense", tensors={"delta": delta})})


def state_of(model: nn.Module) -> list:
    """All that a call must not change: classes, tensors by name, branches, attributes."""
    tensors = {n: t.clone() for n, t in model.state_dict().items() if not t.is_meta}
    return [
        [type(m).__name__ for m in model.modules()],
        [sorted(m.__dict__) for m in model.modules()],
        [[b.name for b in getattr(m, "branches", ())] for m in model.modules()],
        tensors,
    ]


def unchanged(model: nn.Module, before: list) -> bool:
    now = state_of(model)
    return now[:3] == before[:3] and all(torch.equal(t, now[3][n]) for n, t in before[3].items())


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    model.compile(backend="eager")
    return model


def layers_compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    block = model.encoder.layers[0]
    block.self_attn.q_proj = torch.compile(block.self_attn.q_proj, backend="eager")
    model.encoder.layers[0] = torch.compile(block, backend="eager")
    return model


def model_offload(model: nn.Module) -> nn.Module:
    return cpu_offload_with_hook(model, "cpu")[0]


def sequential_offload(model: nn.Module) -> nn.Module:
    return cpu_offload(model, "cpu", offload_buffers=False)


def sequential_offload_with_buffers(model: nn.Module) -> nn.Module:
    return cpu_offload(model, "cpu", offload_buffers=True)


def group_offload_leaves(model: nn.Module) -> nn.Module:
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    return model


def group_offload_blocks(model: nn.Module) -> nn.Module:
    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    return model


COMPILED = (compiled, compiled_in_place, layers_compiled)
OFFLOADED = (
    model_offload, sequential_offload, sequential_offload_with_buffers, group_offload_leaves, group_offload_blocks,
)  # fmt: skip
