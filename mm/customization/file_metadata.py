"""What a LoRA file says of itself: the metadata that other programs sort, show and load files by.

Design choices
- Names as the field has them: `modelspec.*` (Stability AI's ModelSpec 1.0.1), `ss_*` and `sshs_model_hash` (kohya's
  scripts) and `lora_adapter_metadata` (diffusers: peft's settings by component).
- Ranks and kinds are read off the tensors that are written: a layout may join layers, and their ranks with them.
- A1111's web UI shows a file for the models of its `ss_base_model_version`, and takes files without it for Stable
  Diffusion 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mm.adapters.formats.writer import settings_of_peft
from mm.adapters.patch import Patch
from mm.core.safe_tensors import parts

ARCHITECTURES = {  # of ModelSpec, by family
    "stable-diffusion": "stable-diffusion-v1",
    "stable-diffusion-xl": "stable-diffusion-xl-v1-base",
    "stable-diffusion-3": "stable-diffusion-3-medium",
    "flux": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
}
_VERSIONS = {  # of kohya's scripts, by family
    "stable-diffusion": "sd_v1",
    "stable-diffusion-xl": "sdxl_base_v1-0",
    "flux": "flux1",
    "flux-schnell": "flux1",
    "lumina-2": "lumina2",
}
_SECOND = "stable-diffusion-v2-"
_WIDTH_OF_SECOND = 1024  # of the text that Stable Diffusion 2 reads
_RANKED = (".lora_A.weight", ".lora_down.weight", ".hada_w1_b", ".lokr_w2_b")  # as many rows as the rank
_NETWORKS = {  # end of a key: the network of LyCORIS that has it
    ".hada_w1_b": {"algo": "loha"}, ".lokr_w1": {"algo": "lokr"}, ".oft_blocks": {"algo": "diag-oft"},
    ".dora_scale": {"algo": "lora", "dora_wd": "True"}, ".lora_magnitude_vector": {"algo": "lora", "dora_wd": "True"},
    ".diff": {"algo": "full"},
}  # fmt: skip
_PLAIN = (".lora_A.weight", ".lora_down.weight")


def lora_metadata(
    patch: Patch, family: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a LoRA file but for its hashes.

    Args:
        patch: what is written; its settings and report are those of `mm.customize` or `mm.merge`.
        family: of the model; "" where it is not known.
        tensors: of the file.
        settings: of peft by component, for diffusers; empty for none.
    """
    s = patch.settings
    names = [str(s["name"])] if s.get("name") else [str(name) for name in s.get("names", ())]
    second = family == "stable-diffusion" and _text_width(patch) == _WIDTH_OF_SECOND
    architecture = ARCHITECTURES.get(family, family)
    if second:
        architecture = _SECOND + ("768-v" if s.get("size") == 768 else "512")
    written = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": patch.name,
        "modelspec.trigger_phrase": ", ".join(names),
        "modelspec.resolution": f"{s['size']}x{s['size']}" if s.get("size") else "",
        "ss_base_model_version": "sd_v2" if second else _VERSIONS.get(family, ""),
        "ss_v2": str(second) if family == "stable-diffusion" else "",
        "ss_steps": str(patch.report.get("steps", "")),
        "ss_seed": str(s.get("seed", "")),
        "ss_learning_rate": str(s.get("learning_rate", "")),
        "ss_num_train_images": str(patch.report.get("pictures", "")),
        "ss_tag_frequency": json.dumps({name: {} for name in names}) if names else "",
        "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True) if settings else "",
        "mm_base": patch.base,
        "format": "pt",
    } | _network(tensors)
    return {key: value for key, value in written.items() if value}  # of a merged adapter, some say nothing


def settings_by_part(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """peft's settings of a file in diffusers' layout, each with its component before it."""
    shares: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, _, below = key.partition(".")
        shares.setdefault(component, {})[below] = tensor
    return {
        f"{component}.{key}": value for component, own in shares.items() for key, value in settings_of_peft(own).items()
    }


def hashes_of(data: bytes) -> dict[str, str]:
    """The hash of a safetensors file's tensors, by the names of kohya's scripts and of ModelSpec."""
    _, values = parts(data)
    found = hashlib.sha256(values).hexdigest()
    return {"sshs_model_hash": found, "modelspec.hash_sha256": f"0x{found}"}


def family_of_architecture(said: str) -> str:
    """The family that a file's `modelspec.architecture` stands for."""
    said = said.removesuffix("/lora")
    if said.startswith(_SECOND):
        return "stable-diffusion"
    return next((name for name, kind in ARCHITECTURES.items() if said == kind), said)


def _network(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Which network of kohya's scripts or LyCORIS the tensors are, and its size, where there is such a network."""
    ranks = [len(tensor) for key, tensor in tensors.items() if key.endswith(_RANKED)]
    alphas = [float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")]
    arguments = next(_arguments(tensors), None)
    plain = any(key.endswith(_PLAIN) for key in tensors)
    module = "lycoris.kohya" if arguments else "networks.lora" if plain else ""
    if not alphas and plain:  # the products act in full
        alphas = [float(max(ranks))]
    return {
        "ss_network_module": module,
        "ss_network_args": json.dumps(arguments) if arguments else "",
        "ss_network_dim": str(max(ranks)) if ranks else "",
        "ss_network_alpha": f"{max(alphas):g}" if alphas else "",
    }


def _arguments(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    """LyCORIS' settings of the networks whose tensors are there, most particular first."""
    for end, arguments in _NETWORKS.items():
        if any(key.endswith((end, f"{end}_a")) for key in tensors):
            yield arguments


def _text_width(patch: Patch) -> int:
    """Inputs of the layers by which a UNet reads text; 0 where the patch has none as a product."""
    for path, entry in patch.entries.items():
        if path.endswith((".attn2.to_k", ".attn2.to_v")) and entry.kind in ("lowrank", "dora"):
            return int(entry.tensors["down"].shape[1])
    return 0
