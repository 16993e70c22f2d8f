"""The crisp stage: the autoencoder's decoder learns to write sharp pictures; latents stay as they are.

Design choices
- The encoder, the latents' statistics and so the bridge, the trunk and the stem are not touched.
- An error per pixel asks for the mean of all pictures that a latent may stand for, which is blurred. So the error per
  pixel weighs little, and two losses ask for what a mean lacks: a patch discriminator with a hinge loss (PatchGAN,
  Isola et al. 2017, arXiv 1611.07004; in tokenizers, Esser et al. 2021, arXiv 2012.09841), and the local strength of
  edges, wherever exactly they run. Its root mean square alone was met with speckles; its mean stands beside it.
- The feature loss is on the discriminator's own features (feature matching, Wang et al. 2018, arXiv 1711.11585). The
  judge has no part in it.
- It learns from encoded renders alone, where the render is what the latents stand for, and judges redrawn ones as well.
- Most patches are plain ground, the same in renders and decoded pictures, so patches weigh by their edges' strength.
- The errors come first: they need no discriminator and cost half. Then it learns alone for a while, and later in more
  steps than the decoder. Where both learned in every step, the decoder outran it and left it at chance, and features
  that are not trained yet were soon matched.
- Its weight is fixed. A weight that keeps the share of its gradient, as Esser et al. have it, amplified what a weak
  discriminator says.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from mm.training.crisp_critic import Discriminator
from mm.training.crisp_data import CrispBatch, CrispConfig
from mm.training.tokenizer_data import reconstruction_loss


class Crisp(nn.Module):
    """The decoder and its discriminator with their losses; one backward pass serves both."""

    def __init__(self, decoder: nn.Module, config: CrispConfig, discriminator: Discriminator | None = None) -> None:
        super().__init__()
        self.config = config
        self.decoder = decoder
        self.discriminator = discriminator or Discriminator()
        self.passes: torch.Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: CrispBatch) -> dict[str, torch.Tensor]:
        """Weighted losses: `pixels`, `edges`, `features` and `adversary` are the decoder's, `critic` is not.

        At first there is no discriminator; then it learns alone, and later with the decoder in some of its passes.
        `_sharp`: the gradient energy of the decoded pictures as a share of the renders'.
        """
        config, wanted = self.config, batch.pictures_BCHW
        judged = int(self.passes) - config.adversary_after  # passes with the discriminator so far
        self.passes += 1
        alone = 0 <= judged < config.critic_first or (judged > 0 and judged % config.critic_steps > 0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
            written = self.decoder(batch.latents_BCHW).float()
        sharp = gradient_energy(written.detach()).mean() / gradient_energy(wanted).mean()
        errors = {
            "pixels": config.pixel_weight * pixel_loss(written, wanted, batch.redrawn_B),
            "edges": config.edge_weight * edge_loss(written, wanted),
        }
        if judged < 0:
            return errors | {"_sharp": sharp}
        critic, known = self._critic(written.detach(), batch)
        if alone:
            return {"critic": critic, "_sharp": sharp}
        with _frozen(self.discriminator):
            scores, features = self.discriminator(written, batch.before_BCHW)
        weights = patch_weights(batch.before_BCHW, scores)
        hinge = -torch.stack([(w * score).mean() for w, score in zip(weights, scores, strict=True)]).mean()
        return errors | {
            "features": config.feature_weight * feature_loss(features, known, batch.redrawn_B),
            "adversary": config.adversary_weight * hinge,
            "critic": critic,
            "_sharp": sharp,
        }

    def _critic(self, written_BCHW: torch.Tensor, batch: CrispBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The discriminator's hinge loss on encoded renders, and its features of all renders."""
        count = int((~batch.redrawn_B).sum())
        both = torch.cat([batch.pictures_BCHW, written_BCHW[:count]])
        before_BCHW = torch.cat([batch.before_BCHW, batch.before_BCHW[:count]])
        scores, features = self.discriminator(both, before_BCHW)
        losses = []
        for weight, score in zip(patch_weights(batch.before_BCHW[:count], scores), scores, strict=True):
            real, made = score[:count], score[-count:]
            losses.append((weight * (F.relu(1 - real) + F.relu(1 + made))).mean())
        return torch.stack(losses).mean(), [feature[: len(written_BCHW)].detach() for feature in features]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients go through the module and not into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def gradient_energy(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of neighbouring pixels, across and down, of each picture (B,)."""
    across = pictures_BCHW[..., 1:] - pictures_BCHW[..., :-1]
    down = pictures_BCHW[..., 1:, :] - pictures_BCHW[..., :-1, :]
    return across.square().mean((1, 2, 3)) + down.square().mean((1, 2, 3))


def pixel_loss(written_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor, redrawn_B: torch.Tensor) -> torch.Tensor:
    """The autoencoder's own reconstruction loss; of redrawn rows on 4 x 4 means, whose details lie elsewhere."""
    total = written_BCHW.new_zeros(())
    for rows, pooled in ((~redrawn_B, 1), (redrawn_B, 4)):
        if bool(rows.any()):
            made, true = (F.avg_pool2d(x[rows], pooled) for x in (written_BCHW, wanted_BCHW))
            total = total + rows.float().mean() * reconstruction_loss(made, true, 0.5)
    return total


def edge_loss(written_BCHW: torch.Tensor, wanted_BCHW: torch.Tensor) -> torch.Tensor:
    """Error of the edges' strength in windows of 4 and 8 pixels: of its root mean square, and of its mean.

    The two together distinguish a few strong edges from many weak ones: speckles have as much energy, and a larger
    mean.
    """
    loss = written_BCHW.new_zeros(())
    made, true = (_edges(x) for x in (written_BCHW, wanted_BCHW))
    for side in (4, 8):
        for moment in (_root_mean_square, F.avg_pool2d):
            loss = loss + (moment(made, side) - moment(true, side)).abs().mean()
    return loss


def _edges(pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """The strength of edges (B, 1, H, W): the gradient's norm over both directions, channels averaged."""
    across = F.pad(pictures_BCHW[..., 1:] - pictures_BCHW[..., :-1], (0, 1))
    down = F.pad(pictures_BCHW[..., 1:, :] - pictures_BCHW[..., :-1, :], (0, 0, 0, 1))
    return ((across.square() + down.square()).mean(1, keepdim=True) + 1e-5).sqrt()


def _root_mean_square(x_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    return F.avg_pool2d(x_BCHW.square(), side).sqrt()


def patch_weights(pictures_BCHW: torch.Tensor, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """For scores (B, H, W) of each scale, weights by the strength of edges in their patches; their mean is 1."""
    weights = []
    for score in scores:
        strength = _root_mean_square(_edges(pictures_BCHW), pictures_BCHW.shape[-1] // score.shape[-1])[:, 0]
        weight = strength + 0.1 * strength.mean()
        weights.append(weight / weight.mean())
    return weights


def feature_loss(
    written: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], redrawn_B: torch.Tensor
) -> torch.Tensor:
    """Mean error of features, as a share of their mean size; of redrawn rows on 4 x 4 means of them."""
    losses = []
    for made, true in zip(written, wanted, strict=True):
        size = true.float().abs().mean().clamp_min(1e-3)
        for rows, pooled in ((~redrawn_B, 1), (redrawn_B, 4)):
            if bool(rows.any()):
                pair = [F.avg_pool2d(x[rows].float(), pooled) for x in (made, true)]
                losses.append(rows.float().mean() * (pair[0] - pair[1]).abs().mean() / size)
    return torch.stack(losses).sum() / len(written)
