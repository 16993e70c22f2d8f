"""The crisp stage's decoder: a published one with more residual blocks.

New blocks start as the identity, so that the first step decodes the published pictures.
"""

from __future__ import annotations

from torch import nn

from mm.tokenizers import Autoencoder
from mm.tokenizers.autoencoder import ResidualBlock
from mm.training.crisp_data import CrispConfig


def grown(autoencoder: Autoencoder, config: CrispConfig) -> Autoencoder:
    """The same autoencoder, whose decoder has the depths that `config` asks for; new blocks are the identity.

    Args:
        autoencoder: The published one; it is not changed.
        config: See `CrispConfig.quarter_depth` and `CrispConfig.refine_depth`.

    Raises:
        ValueError: Where a stage would have fewer blocks than before.
    """
    known = dict(autoencoder.config)
    depths = list(known["decoder_depths"])
    depths[2] = depths[2] if config.quarter_depth is None else config.quarter_depth
    refine = known["refine_depth"] if config.refine_depth is None else config.refine_depth
    fresh = Autoencoder(
        **{k: x for k, x in known.items() if not k.startswith("_")} | {"decoder_depths": depths, "refine_depth": refine}
    )
    fresh.encoder.load_state_dict(autoencoder.encoder.state_dict())
    for old, new in zip(_segments(autoencoder.decoder), _segments(fresh.decoder), strict=True):
        if len(new) < len(old):
            raise ValueError(f"a decoder with {len(old)} blocks in a stage cannot shrink to {len(new)}")
        for mine, yours in zip(old, new, strict=False):
            yours.load_state_dict(mine.state_dict())
    return fresh


def _segments(decoder: nn.Module) -> list[list[nn.Module]]:
    """The decoder's modules: each run of residual blocks, and each other module by itself; runs may be empty."""
    out: list[list[nn.Module]] = [[]]
    for module in decoder.children():
        if isinstance(module, ResidualBlock):
            out[-1].append(module)
        else:
            out += [[module], []]
    return out
