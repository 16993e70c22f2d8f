"""Families of models: one file a family, and a registry. docs/families.md says how to add one."""

from mm.families.family import Family, LatentPreview, LoraNames, SizeRule
from mm.families.registry import (
    families,
    family_named,
    family_of,
    is_text_encoder,
    model_types,
    register,
    rules_of,
    unregister,
)
from mm.families.sites import find_sites, known_denoisers, quantizable_parts

__all__ = [
    "Family", "LatentPreview", "LoraNames", "SizeRule", "families", "family_named", "family_of", "find_sites",
    "is_text_encoder", "known_denoisers", "model_types", "quantizable_parts", "register", "rules_of", "unregister",
]  # fmt: skip
