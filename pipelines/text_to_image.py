"""`TextToImagePipeline`: from a prompt to pictures, by flow matching or in codes.

Design choices
- diffusers' own order: check_inputs, encode_prompt, prepare_latents, denoise, decode, with its argument names, outputs
  and callbacks, so that scripts written for other pipelines run.
- A prompt is read once a call. Its keys and values (`PromptCache`) serve every step, picture and guidance branch.
- Guidance is classifier-free: in flow mode on the velocity, in codes mode on the trunk's features, there growing
  linearly with the share of tokens already drawn (TokenBridge, arXiv 2503.16430).
- Everything between steps is float32 on the model's device; noise comes from one CPU generator per picture (rule 1).

This module does not know files beyond diffusers' folders, metadata or the command line.
Legend: B pictures (prompts times pictures per prompt), C = 16 channels, H = W = 8 latents, L = 64 tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers looks for the name in our modules
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.trunk import Trunk
from mm.models.velocity import VelocityDecoder
from mm.pipelines.best_of import CheckedOutput, CountReader, check_best_of, draw_best
from mm.pipelines.loading import SharedFolderMixin
from mm.pipelines.lora import TrunkLoraMixin
from mm.pipelines.prompts import check_prompts, tokenize
from mm.pipelines.sampling import Generators, code_steps, gumbel_noise, picture_generators, picture_noise
from mm.pipelines.unified import UnifiedTextToImagePipeline, kind_at
from mm.tokenizers import Autoencoder, Bridge

MODES = ("flow", "codes")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_GUIDANCE = 100
# Chosen on tuning prompts, with revision: at .45 and .7 fewer pictures were right, at 1 as many or fewer.
CODES_TEMPERATURE = 0.9
# Share of `guidance_scale - 1` that counts in codes, where it is mixed into features: the default becomes 3 there (on
# tuning pictures: .71 with 3 at temperature .9, .60 with 4 at 1; at .7, .62 with 3 or 4 and .27 with 7).
CODES_GUIDANCE = 2 / (GUIDANCE - 1)
Callback = Callable[["TextToImagePipeline", int, int, dict[str, Any]], dict[str, Any]]


class Reading:
    """What pictures read in one step: several caches, and the weight of what each makes of them (they add up to 1).

    Classifier-free guidance with scale s has the weights s and 1 - s.
    """

    def __init__(self, caches: Sequence[PromptCache], weights: Sequence[float]) -> None:
        self.prompt = PromptCache.cat(caches) if len(caches) > 1 else caches[0]
        self.weights = tuple(weights)

    def mix(self, made: torch.Tensor, share: float = 1.0) -> torch.Tensor:
        """One out of what each cache gave; `share` 0 takes the first alone, 1 the weights as they are."""
        first, *others = made.chunk(len(self.weights))
        for other, weight in zip(others, self.weights[1:], strict=True):
            first = first + share * weight * (other - made[: len(other)])
        return first


class TextToImagePipeline(SharedFolderMixin, DiffusionPipeline, TrunkLoraMixin):
    """Draws pictures from prompts. See `__call__`."""

    # The trunk takes turns with a head at every step: offloading heads would move the trunk as often.
    model_cpu_offload_seq = "trunk->autoencoder"
    _exclude_from_cpu_offload = ["velocity_decoder", "code_head", "bridge"]  # noqa: RUF012
    _optional_components = ["code_head", "bridge"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012
    _lora_loadable_modules = ["trunk"]  # noqa: RUF012

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        autoencoder: Autoencoder,
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
        self.image_processor = VaeImageProcessor(vae_scale_factor=autoencoder.scale_factor)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False
        self._temperature = CODES_TEMPERATURE
        self.count_reader: CountReader | None = None  # loaded when `best_of` first needs it

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
                raise UserError(f"{where} is a public unified model; {cls.__name__} has no use for it")
            return UnifiedTextToImagePipeline.from_pretrained(where, **kwargs)
        return super().from_pretrained(where, **kwargs)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that this pipeline's components can draw in."""
        return MODES if self.code_head is not None and self.bridge is not None else MODES[:1]

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        prompt: Sequence[str],
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
        side = self.autoencoder.config.sample_size
        if (height, width) != (side, side):
            raise UserError(f"this model draws {side} x {side} pictures, not {width} x {height}; leave the size out")
        if steps < 1:
            raise UserError(f"num_inference_steps is {steps}; give 1 or more")
        if pictures < 1:
            raise UserError(f"num_images_per_prompt is {pictures}; give 1 or more")
        if mode not in MODES:
            raise UserError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        if mode == "codes" and (self.code_head is None or self.bridge is None):
            raise UserError("this model has no code_head and bridge, so mode='codes' is not to be had; use mode='flow'")
        if mode == "codes" and latents is not None:
            raise UserError("latents are the starting noise of mode='flow'; mode='codes' has none, so leave them out")
        if not 0 <= guidance_scale <= MAX_GUIDANCE:  # a NaN fails here too
            raise UserError(f"guidance_scale is {guidance_scale}; give 0 to {MAX_GUIDANCE} (1 = off)")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise UserError(f"callbacks may ask for {self._callback_tensor_inputs}, not {unknown}")
        check_prompts(prompt, self.text_tokenizer)

    def encode_prompt(
        self, prompt: str | Sequence[str], num_images_per_prompt: int = 1, negative_prompt: str | None = None
    ) -> tuple[PromptCache, PromptCache]:
        """The prompts' cache, each repeated, and the unconditional one (the empty or the negative prompt)."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        device = self._execution_device
        ids, mask = tokenize(prompts, self.text_tokenizer, device)
        empty_ids, empty_mask = tokenize([negative_prompt or ""], self.text_tokenizer, device)
        caches = self.trunk.encode_text(ids, mask), self.trunk.encode_text(empty_ids, empty_mask)
        count = len(prompts) * num_images_per_prompt
        return caches[0].repeat(num_images_per_prompt), caches[1].repeat(count)

    def prepare_latents(self, generators: Sequence[torch.Generator], latents: torch.Tensor | None) -> torch.Tensor:
        """Starting noise (B, C, H, W), float32."""
        side = self.autoencoder.config.sample_size // self.autoencoder.scale_factor
        shape = (self.autoencoder.config.latent_channels, side, side)
        if latents is None:
            return picture_noise(generators, shape).to(self._execution_device)
        if latents.shape != (len(generators), *shape):
            raise UserError(f"latents of shape {tuple(latents.shape)}; this call needs {(len(generators), *shape)}")
        return latents.to(self._execution_device, torch.float32)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = GUIDANCE,
        mode: str = "flow",
        temperature: float = CODES_TEMPERATURE,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        best_of: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draws `num_images_per_prompt` pictures of each prompt.

        `generator`: one generator with seed s gives picture k the seed s + k; a list gives each picture its own. Only
        the seed counts, not what was drawn from a generator before. `mode`: "flow" or "codes". `num_inference_steps`
        None: 12 in flow, 32 in codes. `guidance_scale` 1 = off. `temperature`: of sampling in codes mode; 0 takes the
        likeliest code. `latents`: flow's starting noise (B, 16, 8, 8). `best_of`: the most times
        that a picture is drawn, until it shows the numbers of things that the prompt asks for (`mm.pipelines.best_of`);
        the output then has `tries` and `right` as well. `attention_kwargs={"scale": x}` scales loaded
        LoRAs.
        Returns ImagePipelineOutput, or with `return_dict` False a tuple of the pictures alone.
        `output_type`: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent" (B, 16, 8, 8).
        Raises UserError for what cannot be drawn; warns of unknown words.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        num_inference_steps = steps_for(mode, num_inference_steps)
        side = self.autoencoder.config.sample_size
        self.check_inputs(
            prompts,
            height=side if height is None else height,
            width=side if width is None else width,
            steps=num_inference_steps,
            pictures=num_images_per_prompt,
            mode=mode,
            guidance_scale=guidance_scale,
            latents=latents,
            output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        if temperature < 0:
            raise UserError(f"temperature is {temperature}; give 0 or more")
        check_best_of(best_of, latents)
        if best_of > 1:
            found = self._draw_best(
                [text for text in prompts for _ in range(num_images_per_prompt)],
                generator,
                best_of,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                mode=mode,
                temperature=temperature,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            )
            best = found.images if output_type == "latent" else self._decode(found.images, output_type)
            return CheckedOutput(best, found.tries, found.right) if return_dict else (best,)
        self._guidance_scale, self._temperature, self._interrupt = guidance_scale, temperature, False
        generators = picture_generators(generator, len(prompts) * num_images_per_prompt)
        tell = self._teller(callback_on_step_end, callback_on_step_end_tensor_inputs)

        with self.scaled_lora(attention_kwargs):
            caches = self.encode_prompt(prompts, num_images_per_prompt, negative_prompt)
            reading = self._guided(caches)
            if mode == "flow":
                noise = self.prepare_latents(generators, latents)
                drawn = self._denoise(noise, generators, reading, num_inference_steps, tell)
            else:
                drawn = self._fill_codes(generators, reading, num_inference_steps, tell)

        pictures: Any = drawn if output_type == "latent" else self._decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def _draw_best(self, prompts: list[str], generator: Generators, best_of: int, **options: Any) -> CheckedOutput:
        """Latents of the best of several tries, one prompt a picture; `options` are those of `__call__`."""

        def draw(some: Sequence[str], generators: Sequence[torch.Generator]) -> torch.Tensor:
            return self(list(some), generator=list(generators), output_type="latent", **options).images

        if self.count_reader is None:
            if not (name := self.name_or_path):
                raise UserError(
                    "best_of needs the parts that read; set pipe.count_reader = CountReader.from_pretrained(NAME)"
                )
            self.count_reader = CountReader.from_pretrained(name)
        reader = self.count_reader.to(self._execution_device)
        generators = picture_generators(generator, len(prompts))
        return CheckedOutput(*draw_best(draw, reader, prompts, generators, best_of))

    def _guided(self, caches: tuple[PromptCache, PromptCache]) -> Reading:
        """What is read a step: the prompt, and with guidance the empty one as well."""
        scale = self._guidance_scale
        return Reading(caches, (scale, 1 - scale)) if scale > 1 else Reading(caches[:1], (1.0,))

    def _teller(
        self, callback: Callback | None, names: Sequence[str]
    ) -> Callable[[int, Any, torch.Tensor], torch.Tensor]:
        """What is called after each step: hands the latents to the user's callback and takes them back."""

        def tell(step: int, timestep: Any, latents: torch.Tensor) -> torch.Tensor:
            if callback is None:
                return latents
            offered = {"latents": latents}
            changed = callback(self, step, timestep, {name: offered[name] for name in names})
            return (changed or {}).get("latents", latents)

        return tell

    def _denoise(
        self,
        latents: torch.Tensor,
        generators: Sequence[torch.Generator],
        reading: Reading,
        steps: int,
        tell: Callable[[int, Any, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """From noise to latents along the flow."""
        drawing = self._denoising(latents, generators, reading, steps, tell)
        while True:
            try:
                next(drawing)
            except StopIteration as end:
                return end.value

    def _denoising(
        self,
        latents: torch.Tensor,
        generators: Sequence[torch.Generator],
        reading: Reading,
        steps: int,
        tell: Callable[[int, Any, torch.Tensor], torch.Tensor],
    ) -> Generator[int, None, torch.Tensor]:
        """The same step by step, by the scheduler's steps: yields how many are done, returns the latents."""
        self.scheduler.set_timesteps(steps, device=latents.device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # Schedulers that draw noise of their own draw each picture's from its generator, too.
        own_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": list(generators)} if own_noise else {}
        with self.progress_bar(total=len(timesteps)) as bar:
            for i, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                several = latents.repeat(len(reading.weights), 1, 1, 1)
                sigma = (timestep / self.scheduler.config.num_train_timesteps).float().expand(len(several))
                features = self.trunk(several.to(self.trunk.dtype), sigma, reading.prompt, "flow")
                velocity = self.velocity_decoder(several.to(self.velocity_decoder.dtype), sigma, features).float()
                velocity = reading.mix(velocity)
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]
                latents = tell(i, timestep, latents)
                bar.update()
                yield i + 1
        return latents

    def _fill_codes(
        self,
        generators: Sequence[torch.Generator],
        reading: Reading,
        steps: int,
        tell: Callable[[int, Any, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """From nothing to latents, some tokens' codes a step."""
        device = self._execution_device
        side = self.autoencoder.config.sample_size // self.autoencoder.scale_factor
        channels, levels = self.bridge.config.channels, self.bridge.config.levels
        plan = list(code_steps(generators, side * side, steps))
        gumbel_BLKV = gumbel_noise(generators, (side * side, channels, levels)).to(device)
        codes_BLK = torch.zeros(len(generators), side * side, channels, dtype=torch.int64, device=device)
        latents = torch.zeros(len(generators), channels, side, side, device=device)
        self._num_timesteps = len(plan)
        with self.progress_bar(total=len(plan)) as bar:
            for i, (masked_BL, now_BN, known, heat) in enumerate(plan):
                if self._interrupt:
                    break
                masked_BL, now_BN = masked_BL.to(device), now_BN.to(device)
                features_BLD = self._code_features(latents, masked_BL, reading, known)
                row = torch.arange(len(now_BN), device=device)[:, None].expand_as(now_BN)
                drawn = self.code_head.sample(
                    features_BLD[row, now_BN].flatten(0, 1),
                    gumbel_BLKV[row, now_BN].flatten(0, 1),
                    temperature=heat * self._temperature,
                )
                codes_BLK[row, now_BN] = drawn.unflatten(0, now_BN.shape)
                codes_BKHW = codes_BLK.transpose(1, 2).unflatten(-1, (side, side))
                open_B1HW = masked_BL.scatter(1, now_BN, False).unflatten(1, (1, side, side))
                latents = tell(i, i, self.bridge.dequantize(codes_BKHW).float().masked_fill(open_B1HW, 0.0))
                bar.update()
        return latents

    def _code_features(
        self, latents: torch.Tensor, masked_BL: torch.Tensor, reading: Reading, known: float
    ) -> torch.Tensor:
        """The trunk's features with guidance, which grows with the share of known tokens up to codes' own strength."""
        times = len(reading.weights)
        several, masked = latents.repeat(times, 1, 1, 1), masked_BL.repeat(times, 1)
        features = self.trunk(several.to(self.trunk.dtype), masked.float(), reading.prompt, "codes", masked)
        return reading.mix(features, CODES_GUIDANCE * known)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Pictures in the wanted type."""
        pictures = self.autoencoder.decode(latents.to(self.autoencoder.dtype)).float()
        return self.image_processor.postprocess(pictures, output_type=output_type)
