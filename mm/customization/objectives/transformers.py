"""SD3, FLUX, Qwen-Image, SANA and Z-Image, and the editing models among them: transformers under flow matching.

Conventions of each call (timestep's unit, layout of latents, sign of the output) are those of diffusers' pipelines.

Legend: B pictures, C channels, H x W latents, S side of the pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm.customization.objectives.processes import FlowObjective
from mm.customization.objectives.remembered import padded, stacked


class StableDiffusion3(FlowObjective):
    """Stable Diffusion 3 and 3.5."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(pictures_B3SS.to(vae.device, vae.dtype)).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = latents_BCHW / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(latents.to(vae.device, vae.dtype)).sample

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), list(prompts), list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        given = {key: value.to(self.dtype) for key, value in condition.items()}
        out = self.pipe.transformer(noisy_BCHW.to(self.dtype), timestep=level_B * 1000, **given, return_dict=False)
        return out[0].float()


class Flux(StableDiffusion3):
    """FLUX.1. Where the model reads a guidance scale, it is trained at 1, so that the adapter holds at any."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, pooled, ids = self.pipe.encode_prompt(list(prompts), list(prompts), device=self.device)
        return {"encoder_hidden_states": text, "pooled_projections": pooled, "txt_ids": ids}

    def joined(self, conditions: Sequence[Any]) -> Any:
        return stacked(conditions) | {"txt_ids": conditions[0]["txt_ids"]}  # the same for all prompts

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents_BCHW, *latents_BCHW.shape)
        return packed

    def read(self, noisy_BCHW: Tensor) -> Tensor:
        """What the transformer reads of noisy latents."""
        return self.packed(noisy_BCHW)

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        batch, _, height, width = noisy_BCHW.shape
        pipe, dtype = self.pipe, self.dtype
        packed = self.read(noisy_BCHW.to(dtype))
        ids = pipe._prepare_latent_image_ids(batch, height // 2, width // 2, noisy_BCHW.device, dtype)
        length = packed.shape[1]
        if "source" in condition:  # clean latents behind the noisy ones, with 1 as their first coordinate
            packed = torch.cat([packed, self.packed(condition["source"].to(dtype))], 1)
            behind = ids.clone()
            behind[..., 0] = 1
            ids = torch.cat([ids, behind])
        guided = pipe.transformer.config.guidance_embeds
        out = pipe.transformer(
            packed, timestep=level_B.to(dtype), img_ids=ids, txt_ids=condition["txt_ids"],
            guidance=torch.ones(batch, device=noisy_BCHW.device) if guided else None,
            encoder_hidden_states=condition["encoder_hidden_states"].to(dtype),
            pooled_projections=condition["pooled_projections"].to(dtype), return_dict=False,
        )[0][:, :length]  # fmt: skip
        return unpacked(out.float(), height, width)


class Kontext(Flux):
    """FLUX.1 Kontext: the source's latents behind the noisy ones. Without a source it draws as FLUX.1 does."""

    edits = "also"

    def encode_edits(self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor) -> Any:
        return self.encode_prompts(instructions) | {"source": latents_BCHW}


class QwenImage(FlowObjective):
    """Qwen-Image, whose autoencoder is one of videos."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae = self.pipe.vae
        latents = vae.encode(pictures_B3SS[:, :, None].to(vae.device, vae.dtype)).latent_dist.mode()[:, :, 0].float()
        mean, deviation = self._moments(latents.device)
        return (latents - mean) / deviation

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipe.vae
        mean, deviation = self._moments(latents_BCHW.device)
        latents = latents_BCHW * deviation + mean
        return vae.decode(latents[:, :, None].to(vae.device, vae.dtype)).sample[:, :, 0]

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and deviation (1, C, 1, 1) of the autoencoder's latents."""
        config = self.pipe.vae.config
        mean, deviation = (
            torch.tensor(values, device=device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, mask = self.pipe.encode_prompt(list(prompts), device=self.device)
        return {"encoder_hidden_states": text, "mask": mask}

    def joined(self, conditions: Sequence[Any]) -> Any:
        text, mask = padded([c["encoder_hidden_states"] for c in conditions], [c["mask"] for c in conditions])
        sources = [c["source"] for c in conditions if "source" in c]
        more = {"source": torch.cat(sources)} if sources else {}
        return {"encoder_hidden_states": text, "mask": mask} | more

    def packed(self, latents_BCHW: Tensor) -> Tensor:
        packed: Tensor = self.pipe._pack_latents(latents_BCHW, *latents_BCHW.shape)
        return packed

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        batch, _, height, width = noisy_BCHW.shape
        packed = self.packed(noisy_BCHW.to(self.dtype))
        length, shapes = packed.shape[1], [(1, height // 2, width // 2)]
        if "source" in condition:
            packed = torch.cat([packed, self.packed(condition["source"].to(self.dtype))], 1)
            shapes = shapes * 2
        out = self.pipe.transformer(
            hidden_states=packed, timestep=level_B.to(self.dtype), guidance=None,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_hidden_states_mask=condition["mask"], img_shapes=[shapes] * batch,
            return_dict=False,
        )[0][:, :length]  # fmt: skip
        return unpacked(out.float(), height, width)


class QwenImageEdit(QwenImage):
    """Qwen-Image-Edit: the source's latents behind the noisy ones, and the source picture in the prompt."""

    edits = "only"

    def encode_edits(self, instructions: Sequence[str], pictures_B3SS: Tensor, latents_BCHW: Tensor) -> Any:
        bytes_BSS3 = ((pictures_B3SS.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
        sources = [Image.fromarray(picture.numpy()) for picture in bytes_BSS3]
        text, mask = self.pipe.encode_prompt(image=sources, prompt=list(instructions), device=self.device)
        return {"encoder_hidden_states": text, "mask": mask, "source": latents_BCHW}


class Sana(FlowObjective):
    """SANA. Prompts get the instruction that the pipeline's call puts in front of them."""

    def encode_pictures(self, pictures_B3SS: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.encode(pictures_B3SS.to(vae.device, vae.dtype)).latent.float() * vae.config.scaling_factor

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        vae = self.pipe.vae
        return vae.decode((latents_BCHW / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, mask, _, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device,
            complex_human_instruction=self._usual_instruction(),
        )  # fmt: skip
        return {"encoder_hidden_states": text, "encoder_attention_mask": mask}

    def _usual_instruction(self) -> Any:
        return inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        transformer = self.pipe.transformer
        out = transformer(
            noisy_BCHW.to(self.dtype), timestep=level_B * 1000 * getattr(transformer.config, "timestep_scale", 1.0),
            encoder_hidden_states=condition["encoder_hidden_states"].to(self.dtype),
            encoder_attention_mask=condition["encoder_attention_mask"], return_dict=False,
        )[0]  # fmt: skip
        return out.float()


class ZImage(StableDiffusion3):
    """Z-Image: pictures and texts as lists, time runs the other way, and the output is the negative velocity."""

    def encode_prompts(self, prompts: Sequence[str]) -> Any:
        text, _ = self.pipe.encode_prompt(list(prompts), self.device, do_classifier_free_guidance=False)
        return {"cap_feats": text}

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        return torch.stack([text.float().mean(0) for text in self.conditions(prompts)["cap_feats"]])

    def predict(self, noisy_BCHW: Tensor, level_B: Tensor, condition: Any) -> Tensor:
        pictures = list(noisy_BCHW.to(self.dtype).unsqueeze(2))
        texts = [text.to(self.dtype) for text in condition["cap_feats"]]
        out = self.pipe.transformer(pictures, (1 - level_B).to(self.dtype), texts, return_dict=False)[0]
        return -torch.stack([one[:, 0] for one in out]).float()


def unpacked(packed_BLD: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, H, W) of 2 x 2 patches in rows, D = 4 C."""
    batch, _, wide = packed_BLD.shape
    grid = packed_BLD.view(batch, height // 2, width // 2, wide // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, wide // 4, height, width)
