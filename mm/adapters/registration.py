"""Lets peft, diffusers and transformers treat layers with branches right: merging, loading LoRAs, saving.

Design choices
- Their functions are wrapped when their modules are imported, which `import mm` alone does not do.
- A wrapped function does what it did wherever no layer of mm's is involved.
"""

from __future__ import annotations

from collections.abc import Callable

from mm.core.import_hooks import after_import


def _peft(name: str) -> Callable[[], None]:
    def action() -> None:
        from mm.adapters import peft_support

        getattr(peft_support, name)()

    return action


def _saving(module: str, kind: str) -> Callable[[], None]:
    def action() -> None:
        from mm.adapters.saving import wrap_saving

        wrap_saving(module, kind)

    return action


def register() -> None:
    """Registers all of it; called by `import mm`."""
    after_import("peft.tuners.lora.layer", _peft("wrap_merging"))
    after_import("peft.tuners.tuners_utils", _peft("wrap_merge_check"))
    after_import("diffusers.loaders.peft", _peft("wrap_fusing_of_models"))
    after_import("diffusers.loaders.lora_base", _peft("wrap_fusing_of_pipelines"))
    after_import("diffusers.loaders.lora_pipeline", _peft("wrap_expanding"))
    after_import("diffusers.models.modeling_utils", _saving("diffusers.models.modeling_utils", "ModelMixin"))
    after_import("transformers.modeling_utils", _saving("transformers.modeling_utils", "PreTrainedModel"))
