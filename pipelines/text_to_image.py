"""`TextToImagePipeline`: from a prompt to pictures, by flow matching or in codes.

Design choices
- diffusers' order of steps (check_inputs, encode_prompt, prepare_latents, denoise, decode), argument names, outputs and
  callbacks, so that scripts written for other pipelines run.
- A prompt is encoded once a call. Its keys and values (`PromptCache`) serve every step, picture and guidance branch.
- Guidance is classifier-free: in flow mode on the velocity, in codes mode on the trunk's features.
- Everything between steps is float32 on the model's device; noise comes from one CPU generator per picture, so that a
  picture depends on its seed and not on its batch.

Legend: B pictures (prompts times pictures per prompt), C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedTokenizerFast

from mm.core.checks import shown
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.trunk import MODES, Trunk
from mm.models.velocity import VelocityDecoder
from mm.pipelines.batch_parts import joined, parts_of
from mm.pipelines.best_of import check_best_of, unchecked_output
from mm.pipelines.code_filling import code_filling
from mm.pipelines.drawing_arguments import (
    check_callback_tensors,
    check_count,
    check_mode,
    check_output_type,
    check_scale,
    check_temperature,
)
from mm.pipelines.drawing_loops import finish, flow_steps
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.drawing_tries import draw_tries
from mm.pipelines.fast import FastCodes, decides_by_picture, settings_for, tries_of
from mm.pipelines.guidance import text_branches
from mm.pipelines.loading import SharedFolderMixin
from mm.pipelines.lora import TrunkLoraMixin
from mm.pipelines.prompt_encoding import conditions, tokenize
from mm.pipelines.run_state import RunStateMixin
from mm.pipelines.sampling import Generators, check_sigmas, picture_generators, picture_noise
from mm.pipelines.self_check import SelfCheckMixin
from mm.pipelines.unified import UnifiedTextToImagePipeline, kind_at
from mm.tokenizers import Autoencoder, Bridge
from mm.world.asked import asked_of

SCALE = 16  # pixels of a latent, each way
CODES_TEMPERATURE = 0.9
Callback = Callable[["TextToImagePipeline", int, int, dict[str, Any]], dict[str, Any]]


class TextToImagePipeline(RunStateMixin, SelfCheckMixin, SharedFolderMixin, DiffusionPipeline, TrunkLoraMixin):
    """Draws pictures from prompts. See `__call__`."""

    # Trunk and head alternate at every step: offloading the heads would move the trunk at every step, too.
    model_cpu_offload_seq = "trunk->autoencoder"
    _exclude_from_cpu_offload = ["velocity_decoder", "code_head", "bridge"]  # noqa: RUF012
    _optional_components = ["autoencoder", "code_head", "bridge"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    _lora_loadable_modules = ["trunk"]  # noqa: RUF012

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        autoencoder: Autoencoder | None,
        scheduler: SchedulerMixin,
        code_head: CodeHead | None = None,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            text_tokenizer=text_tokenizer,
            trunk=trunk,
            velocity_decoder=velocity_decoder,
            autoencoder=autoencoder,
            scheduler=scheduler,
            code_head=code_head,
            bridge=bridge,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=SCALE)
        self._init_runs()
        self._init_self_check()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> TextToImagePipeline:
        """An embedded model by name ("mm-tiny"), a diffusers folder, or a hub name. Only safetensors files are read.

        Raises UserError where a folder is broken or lacks tensors.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise UserError("use_safetensors=False would load pickled weights, which can run code; leave it out")
        where = resolve_model(pretrained_model_name_or_path)
        if kind_at(where, kwargs) is not None:
            if cls is not TextToImagePipeline:
                raise UserError(f"{where} is a public unified model, which {cls.__name__} cannot use")
            return UnifiedTextToImagePipeline.from_pretrained(where, **kwargs)
        return super().from_pretrained(where, **kwargs)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that this pipeline's components can draw in."""
        return MODES if self.code_head is not None and self.bridge is not None else MODES[:1]

    @property
    def side(self) -> int:
        """Pixels on each side of a picture."""
        return SCALE * int(self.trunk.config.latent_size)

    @property
    def sides(self) -> tuple[int, ...]:
        """All sides that a picture can be written with: that of the model, and twice that by an enlarger."""
        config = getattr(self.autoencoder, "config", None)
        return (self.side, 2 * self.side) if getattr(config, "enlarger_width", 0) else (self.side,)

    def check_inputs(
        self,
        *,
        height: int,
        width: int,
        steps: int,
        pictures: int,
        mode: str,
        guidance_scale: float,
        latents: torch.Tensor | None,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Raises UserError for what cannot be drawn, with the value."""
        if height != width or height not in self.sides:
            known = " and ".join(f"{side} x {side}" for side in self.sides)
            raise UserError(
                f"this model draws {known} pictures, not {shown(width)} x {shown(height)}; leave the size out"
            )
        check_count("num_inference_steps", steps)
        check_count("num_images_per_prompt", pictures)
        check_mode(mode, self.modes, MODES, latents)
        check_scale("guidance_scale", guidance_scale, " (1 = off)")
        check_output_type(output_type, decodes=self.autoencoder is not None)
        check_callback_tensors(tensor_inputs, self._callback_tensor_inputs)

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: PromptCache | None = None,
        negative_prompt_embeds: PromptCache | None = None,
    ) -> tuple[PromptCache, PromptCache]:
        """The prompts' cache, each repeated, and the unconditional one (the empty or the negative prompt).

        Both can be given to a call as `prompt_embeds` and `negative_prompt_embeds`.

        Args:
            prompt: One prompt or several.
            num_images_per_prompt: How often each is repeated.
            negative_prompt: One for all prompts, or one for each.
            device: Where to; by default the pipeline's own.
            do_classifier_free_guidance: Taken for diffusers' sake: the unconditional cache is always there.
            prompt_embeds: A cache to use instead of encoding `prompt`.
            negative_prompt_embeds: The same for the negative prompt.
        """
        given = conditions(
            self.text_tokenizer, prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds,
            checked=False,
        )  # fmt: skip
        caches = given.caches(slice(0, given.pictures), self._encode)
        return (caches[0].to(device), caches[1].to(device)) if device is not None else caches

    def _encode(self, prompts: Sequence[str]) -> PromptCache:
        return self.trunk.encode_text(*tokenize(prompts, self.text_tokenizer, self._execution_device))

    def prepare_latents(self, generators: Sequence[torch.Generator], latents: torch.Tensor | None) -> torch.Tensor:
        """Starting noise (B, C, H, W), float32."""
        side = int(self.trunk.config.latent_size)
        shape = (int(self.trunk.config.latent_channels), side, side)
        if latents is None:
            return picture_noise(generators, shape).to(self._execution_device)
        if latents.shape != (len(generators), *shape):
            raise UserError(f"latents of shape {tuple(latents.shape)}; this call needs {(len(generators), *shape)}")
        return latents.to(self._execution_device, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE,
        mode: str = "flow",
        temperature: float = CODES_TEMPERATURE,
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        fast: bool | Mapping[str, Any] = False,
        strict: bool | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_embeds: PromptCache | None = None,
        negative_prompt_embeds: PromptCache | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draws pictures of prompts.

        Args:
            prompt: One prompt or several.
            negative_prompt: Replaces the empty prompt of classifier-free guidance; one for all, or one for each prompt.
            height: One of `sides`; by default the model's own. 256 shows what 128 does, with more detail.
            width: As the height.
            num_inference_steps: Sampling steps; by default 12 in flow mode and 32 in codes mode.
            guidance_scale: Of classifier-free guidance; 1 = off.
            mode: "flow" or "codes".
            temperature: Of sampling in codes mode; 0 takes the likeliest code.
            num_images_per_prompt: Pictures of each prompt.
            generator: One generator with seed s gives picture k the seed s + k; a list gives each picture its own. Only
                seeds count, not what was drawn from a generator before.
            latents: Starting noise (B, 16, 8, 8) of flow mode.
            sigmas: Noise levels of the steps in flow mode, falling, each above 0; instead of num_inference_steps.
            prompt_embeds: An encoded prompt, as `encode_prompt` returns it, instead of `prompt`.
            negative_prompt_embeds: The same for the negative prompt.
            strict: True refuses a prompt with words that are not understood, None one of which no thing is known,
                before anything is drawn; False draws all.
            best_of: The most times that a picture is drawn, until the model itself reads in it what the prompt asks for
                (`mm.pipelines.best_of`); the output then has `tries`, `right`, `missing` and `steps` as well.
            fast: Less work a picture (docs/fast.md): True is the measured mix, a mapping names single settings of
                `mm.pipelines.fast`. In codes mode pictures are checked as with `best_of`, if the model can read.
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, 16, 8, 8).
            return_dict: False returns a tuple of the pictures alone.
            attention_kwargs: `{"scale": x}` scales loaded LoRAs.
            callback_on_step_end: `callback(pipe, step, timestep, tensors)`, called after each step. It may return
                changed latents and set `pipe._interrupt`. A model that rounds activations draws its pictures one by
                one, so that each has the same bits in any call; the callback then sees one picture at a time.
            callback_on_step_end_tensor_inputs: The tensors it wants; "latents" is there.

        Returns:
            ImagePipelineOutput (a `CheckedOutput` with `best_of` or `fast` in codes mode), or a tuple.

        Raises:
            UserError: For anything that cannot be drawn. Unknown words give a warning.
        """
        less = None if fast is False else settings_for(mode, fast)
        levels = check_sigmas(sigmas, mode, num_inference_steps, self.scheduler)
        steps = num_inference_steps if levels is None else len(levels)
        steps = steps_for(mode, steps if steps is not None or less is None else less.steps)
        side = self.side
        self.check_inputs(
            height=side if height is None else height,
            width=side if width is None else width,
            steps=steps,
            pictures=num_images_per_prompt,
            mode=mode,
            guidance_scale=guidance_scale,
            latents=latents,
            output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        check_temperature(temperature)
        check_best_of(best_of, latents)
        given = conditions(
            self.text_tokenizer, prompt, negative_prompt, num_images_per_prompt, prompt_embeds, negative_prompt_embeds,
            strict=strict,
        )  # fmt: skip
        checked = best_of > 1 or isinstance(less, FastCodes)
        asked = self._asked([text for text in given.texts or () for _ in range(given.each * checked)], asked_of)
        plan = tries_of(best_of, less, num_inference_steps, checks=any(asked) and self._can_read())
        if plan.most > 1:
            found = draw_tries(
                self, given, asked, generator, plan, output_type, negative_prompt=negative_prompt,
                negative_prompt_embeds=negative_prompt_embeds, sigmas=sigmas,
                guidance_scale=guidance_scale, mode=mode, temperature=temperature, attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, height=height, width=width,
            )  # fmt: skip
            return found if return_dict else (found.images,)
        unchecked = isinstance(less, FastCodes) and less.tries > 1
        if isinstance(less, FastCodes):
            less, steps = less.of_one(checked=False), plan.steps(steps, checked=False)
        generators = picture_generators(generator, given.pictures)
        noise = self.prepare_latents(generators, latents) if mode == "flow" else None
        with (
            self.scaled_lora(attention_kwargs),
            self._new_run(guidance_scale=guidance_scale, temperature=temperature, sigmas=levels, fast=less) as run,
        ):
            on_step = run.step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            done = []
            for part in parts_of(self, len(generators), singly=decides_by_picture(less)):
                branches = text_branches(*given.caches(part, self._encode), guidance_scale)
                start = None if noise is None else noise[part]
                parts = DrawingParts(
                    trunk=self.trunk, generators=generators[part], branches=branches, steps=steps, run=run,
                    on_step=on_step,
                )  # fmt: skip
                drawn = self._draw_latents(start, parts)
                done.append(drawn if output_type == "latent" else self._decode(drawn, output_type, height))

        pictures: Any = joined(done)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (pictures,)
        return unchecked_output(pictures, given.pictures, steps) if unchecked else ImagePipelineOutput(images=pictures)

    def _draw_latents(self, noise: torch.Tensor | None, parts: DrawingParts) -> torch.Tensor:
        """Latents (B, C, H, W): along the flow from `noise`, or in codes where that is None."""
        if noise is not None:
            drawing = flow_steps(parts, self.velocity_decoder, noise)
        else:
            side = int(self.trunk.config.latent_size)
            drawing = code_filling(parts, self.code_head, self.bridge, (side, side))
        with self.progress_bar(total=parts.steps) as bar:
            return finish(drawing, parts.run, bar)

    def _decode(self, latents: torch.Tensor, output_type: str, height: int | None = None) -> Any:
        """Pictures in the wanted type and height; None is the model's own."""
        pictures = self._pixels(latents, height)
        return self.image_processor.postprocess(pictures, output_type=output_type)

    def _pixels(self, latents: torch.Tensor, height: int | None) -> torch.Tensor:
        """Pictures (B, 3, H, H) in [-1, 1]."""
        assert self.autoencoder is not None
        scale = 1 if height is None else height // self.side
        return self.autoencoder.decode(latents.to(self.autoencoder.dtype), scale=scale).float()
