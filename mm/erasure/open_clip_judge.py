"""A zero-shot judge for public models: an open_clip model that names which of given concepts a picture shows.

Design choices
- The names compete with each other and with pictures of nothing in particular ("a photo", "noise"): a softmax over
  cosine similarities, as in CLIP (Radford et al. 2021, arXiv 2103.00020). Names of one group (objects, styles) compete
  among themselves.
- A picture that is nearer to a text for unreadable ones ("random noise", "a blank picture") than to any other is
  unreadable.
- The judge must not be a part of the model that is judged.

Legend: B pictures, N texts, D width of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm.core.checks import texts
from mm.core.errors import UserError

NOTHING = ("a photo", "a picture of something else")
UNREADABLE = ("random noise", "a blank picture", "a blurred smear of colours")


class OpenClipJudge:
    """Labels of pictures by an open_clip model.

    Args:
        groups: names by group; the names of a group compete with each other.
        model: an architecture of open_clip, or a loaded model with `encode_image` and `encode_text`.
        pretrained: the tag of its weights.
        templates: texts for a name by group; `{}` stands for it. The default is "a picture of {}".
        threshold: least probability of a name within its group.
        transform: from a PIL picture to a tensor, where `model` is a loaded model.
        tokenizer: of a loaded model.
        unreadable: texts for pictures that cannot be read; empty for a judge that reads every picture.

    Raises:
        UserError: without names, and where open_clip is not installed.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[str]],
        model: Any = "ViT-B-32",
        pretrained: str | None = "laion2b_s34b_b79k",
        *,
        templates: Mapping[str, str] | None = None,
        threshold: float = 0.5,
        transform: Any = None,
        tokenizer: Any = None,
        unreadable: Sequence[str] = UNREADABLE,
    ) -> None:
        if not groups or not all(groups.values()):
            raise UserError("the judge has no names; give groups={'objects': [...]}")
        if isinstance(model, str):
            model, transform, tokenizer = _loaded(model, pretrained)
        self.model, self.transform, self.threshold = model.eval(), transform, threshold
        self.names = {group: texts(group, names) for group, names in groups.items()}
        prompts = {
            group: [(templates or {}).get(group, "a picture of {}").format(name) for name in names]
            for group, names in self.names.items()
        }
        self.vectors = {group: self._texts(tokenizer, [*found, *NOTHING]) for group, found in prompts.items()}
        self.blank_ND = self._texts(tokenizer, texts("unreadable", unreadable)) if unreadable else None

    def __call__(self, pictures: Sequence[Image.Image]) -> list[frozenset[str] | None]:
        """The names that each picture shows; None for one that cannot be read."""
        with torch.no_grad():
            pixels = torch.stack([self.transform(p.convert("RGB")) for p in pictures])
            x_BD = torch.nn.functional.normalize(self.model.encode_image(pixels).float(), dim=-1)
            scale = float(self.model.logit_scale.exp())
            found = {g: (scale * x_BD @ v.T).softmax(1)[:, : len(self.names[g])] for g, v in self.vectors.items()}
            blank_B = self._blank(x_BD)
        return [
            None if blank_B[i] else frozenset(
                name for group, names in self.names.items()
                for k, name in enumerate(names) if found[group][i, k] >= self.threshold
            )
            for i in range(len(pictures))
        ]  # fmt: skip

    def _blank(self, x_BD: Tensor) -> list[bool]:
        if self.blank_ND is None:
            return [False] * len(x_BD)
        best = torch.stack([(x_BD @ v.T).amax(1) for v in self.vectors.values()]).amax(0)
        return ((x_BD @ self.blank_ND.T).amax(1) > best).tolist()

    def _texts(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(self.model.encode_text(tokenizer(list(texts))).float(), dim=-1)


def _loaded(name: str, pretrained: str | None) -> tuple[Any, Any, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise UserError("this judge needs open_clip; pip install open_clip_torch") from error
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    return model, transform, open_clip.get_tokenizer(name)
