"""`ImageEditPipeline`: a picture and an instruction in, the changed picture out.

Design choices
- The source enters twice: as looks among the words (understanding), and as clean latents whose keys and values are
  computed once (`Trunk.encode_picture`).
- Text and picture are guided apart, as in InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800): three readings (all;
  the picture without words; nothing) with the weights s_t, s_i - s_t and 1 - s_i.
- A mask (white may change) keeps everything outside it: while drawing, latents outside follow the noised source, and in
  the end the source's own pixels lie there, bit for bit. In codes mode tokens outside start as known.
- Sources of another size are edited at the model's size, from their middle, and come back at that size.

This module does not know wordings: how an instruction is written among looks is `mm.models.dialogue`'s.
Legend: B pictures, C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for the name in our modules
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue
from mm.models.trunk import Trunk
from mm.models.understanding import UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.pipelines.pictures import open_picture, squared, to_tensor
from mm.pipelines.sampling import Generators, picture_generators
from mm.pipelines.text_to_image import MAX_GUIDANCE, Callback, Reading, TextToImagePipeline
from mm.pipelines.understanding import left_padded
from mm.tokenizers import Autoencoder, Bridge


class ImageEditPipeline(TextToImagePipeline):
    """Edits pictures by instructions. See `__call__`. `default_guidance`: of text and picture, where none is given."""

    default_guidance = (GUIDANCE, 1.5)

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        autoencoder: Autoencoder,
        scheduler: SchedulerMixin,
        understanding_encoder: UnderstandingEncoder,
        look_connector: Connector,
        code_head: CodeHead | None = None,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(text_tokenizer, trunk, velocity_decoder, autoencoder, scheduler, code_head, bridge)
        self.register_modules(understanding_encoder=understanding_encoder, look_connector=look_connector)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ImageEditPipeline:
        """An embedded model by name, a diffusers folder, or a hub name."""
        where = resolve_model(pretrained_model_name_or_path)
        if isinstance(where, Path) and not (where / "look_connector" / "config.json").is_file():
            raise UserError(f"{where} holds no look_connector: this model draws, but cannot edit")
        pipe = super().from_pretrained(where, **kwargs)
        assert isinstance(pipe, cls)
        return pipe

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        image: Any,
        prompt: str | Sequence[str],
        *,
        mask_image: Any = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        mode: str = "flow",
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Changes `image` as `prompt` says; lists of both go pairwise.

        `mask_image`: white where pixels may change, of the source's size (or of the model's). `guidance_scale`: how
        strictly the words are followed; `image_guidance_scale`: how closely the source. Generators, output types and
        callbacks as in `TextToImagePipeline`. Raises UserError for what cannot be drawn; warns of unknown words.
        """
        guidance_scale = self.default_guidance[0] if guidance_scale is None else guidance_scale
        image_guidance_scale = self.default_guidance[1] if image_guidance_scale is None else image_guidance_scale
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        num_inference_steps = steps_for(mode, num_inference_steps)
        pictures = list(image) if isinstance(image, (list, tuple)) else [image] * len(prompts)
        if len(pictures) != len(prompts):
            raise UserError(f"{len(pictures)} pictures and {len(prompts)} instructions; give as many")
        side = self.autoencoder.config.sample_size
        self.check_inputs(
            prompts, height=side, width=side, steps=num_inference_steps, pictures=num_images_per_prompt, mode=mode,
            guidance_scale=guidance_scale, latents=None, output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if not 0 <= image_guidance_scale <= MAX_GUIDANCE:
            raise UserError(f"image_guidance_scale is {image_guidance_scale}; give 0 to {MAX_GUIDANCE}")
        self._guidance_scale, self._interrupt = guidance_scale, False
        generators = picture_generators(generator, len(prompts) * num_images_per_prompt)
        source = to_tensor(pictures, side).to(self._execution_device)
        clean = self.autoencoder.encode(source.to(self.autoencoder.dtype)).float()
        reading = self._read(prompts, source, clean, num_images_per_prompt, image_guidance_scale)
        clean = clean.repeat_interleave(num_images_per_prompt, 0)
        source = source.repeat_interleave(num_images_per_prompt, 0)
        mask = None if mask_image is None else _mask(mask_image, pictures[0], side).to(source.device)
        tell = self._teller(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if mode == "flow":
            noise = self.prepare_latents(generators, None)
            kept = tell if mask is None else self._keeper(clean, noise, mask, tell)
            drawn = self._denoise(noise, generators, reading, num_inference_steps, kept)
        else:
            drawn = self._fill_codes(generators, reading, num_inference_steps, tell)
            if mask is not None:
                drawn = torch.where(_coarse(mask, drawn.shape[-1]) > 0, drawn, clean)
        out: Any = drawn if output_type == "latent" else self._finish(drawn, source, mask, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=out) if return_dict else (out,)

    def edit(self, pictures: Sequence[Any], instructions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """One edited picture each, from its own seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self(list(pictures), list(instructions), generator=generators).images

    def _read(
        self, prompts: Sequence[str], source: torch.Tensor, clean: torch.Tensor, each: int, image_scale: float
    ) -> Reading:
        """Caches of words with source, source alone, and nothing; only those that guidance needs."""
        tokens = self.understanding_encoder(source.to(self.understanding_encoder.dtype))[1]
        looks = self.look_connector(tokens.to(self.look_connector.dtype))
        words, pictured = self._guidance_scale, image_scale
        caches = [self._cache(prompts, looks, clean)]
        weights = [words]
        if words != pictured:
            caches.append(self._cache([""] * len(prompts), looks, clean))
            weights.append(pictured - words)
        if pictured != 1:
            caches.append(self._cache([""] * len(prompts), None, None))
            weights.append(1 - pictured)
        return Reading([cache.repeat(each) for cache in caches], weights)

    def _cache(self, words: Sequence[str], looks: torch.Tensor | None, clean: torch.Tensor | None) -> PromptCache:
        count = 16 if looks is None else looks.shape[1]
        pictures = () if looks is None else (None,)
        rows = [Dialogue(self.text_tokenizer, count).user(w, *pictures).starts_drawing().ids for w in words]
        ids, mask = left_padded(rows, self._execution_device)
        cache = self.trunk.encode_text(ids, mask, looks)
        return cache if clean is None else self.trunk.encode_picture(clean.to(self.trunk.dtype), cache)

    def _keeper(
        self, clean: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor, tell: Callable[..., torch.Tensor]
    ) -> Callable[..., torch.Tensor]:
        """After each step, latents outside the mask are the source's at the level that comes next."""
        coarse = _coarse(mask, clean.shape[-1])

        def keep(step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
            left = self.scheduler.timesteps[step + 1 :]
            sigma = float(left[0]) / self.scheduler.config.num_train_timesteps if len(left) else 0.0
            latents = torch.where(coarse > 0, latents, (1 - sigma) * clean + sigma * noise)
            return tell(step, timestep, latents)

        return keep

    def _finish(self, drawn: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None, output_type: str) -> Any:
        pictures = self.autoencoder.decode(drawn.to(self.autoencoder.dtype)).float()
        if mask is not None:
            pictures = torch.where(mask > 0, pictures, source)
        return self.image_processor.postprocess(pictures, output_type=output_type)


def _mask(mask_image: Any, picture: Any, side: int) -> torch.Tensor:
    """(1, 1, side, side): 1 where pixels may change."""
    mask, source = open_picture(mask_image), open_picture(picture)
    if mask.size not in (source.size, (side, side)):
        raise UserError(
            f"the mask is {mask.size[0]} x {mask.size[1]} and the picture {source.size[0]} x {source.size[1]}"
        )
    values = np.asarray(squared(mask, side).convert("L"))
    if not (values > 127).any():
        raise UserError("the mask is black everywhere, so nothing may change; paint white where it may")
    return torch.from_numpy((values > 127).astype(np.float32))[None, None]


def _coarse(mask: torch.Tensor, side: int) -> torch.Tensor:
    """The mask on latents: a latent may change when any of its pixels may."""
    return F.adaptive_max_pool2d(mask, side)
