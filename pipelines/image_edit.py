"""`ImageEditPipeline`: changes a picture by an instruction.

Design choices
- The source is encoded twice: as understanding tokens in the prompt, and as clean latents whose keys and values are
  computed once (`Trunk.encode_picture`).
- Text and picture have guidance scales of their own, as in InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800):
  three branches (instruction and source; source only; neither) with weights s_t, s_i - s_t and 1 - s_i.
- A mask (white may change) keeps everything outside: after each step latents outside are the noised source, and in the
  end the source's own pixels are copied back, bit for bit. In codes mode latents outside are the source's.
- Sources of another size are cropped to a square and scaled to the model's size; the result has the model's size.

Legend: B pictures, C = 16 channels, H = W = 8 latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from transformers import PreTrainedTokenizerFast

from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.families.mm_tiny import GUIDANCE, steps_for
from mm.models.cache import PromptCache
from mm.models.codes import CodeHead
from mm.models.connectors import Connector
from mm.models.dialogue import Dialogue
from mm.models.trunk import Trunk
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.models.velocity import VelocityDecoder
from mm.pipelines.batch_parts import joined, parts_of
from mm.pipelines.best_of import CheckedOutput, check_best_of, draw_best, passing_on
from mm.pipelines.domain import warn_of
from mm.pipelines.drawing_arguments import check_scale
from mm.pipelines.drawing_parts import DrawingParts
from mm.pipelines.edit_sources import coarse_mask, keep_outside, mask_of, one_for_each, sources_of
from mm.pipelines.guidance import GuidanceBranches
from mm.pipelines.instructions import check_instructions
from mm.pipelines.pictures import open_picture, to_tensor
from mm.pipelines.prompt_encoding import left_padded, negatives_of, texts_of
from mm.pipelines.sampling import Generators, picture_generators
from mm.pipelines.text_to_image import Callback, TextToImagePipeline
from mm.pipelines.understanding import answers_about
from mm.tokenizers import Autoencoder, Bridge
from mm.world import vocabulary as v
from mm.world.asked import asked_of_change
from mm.world.asking.counting import facts_of
from mm.world.asking.edit_words import Seen
from mm.world.asking.plans import is_absent, run
from mm.world.asking.query import Thing

_MOST_WORDS = 48  # of a description


class ImageEditPipeline(TextToImagePipeline):
    """Edits pictures by instructions. See `__call__`.

    Attributes:
        default_guidance: Guidance scales of text and picture, used where the call gives none.
    """

    default_guidance = (GUIDANCE, 1.5)

    def __init__(
        self,
        text_tokenizer: PreTrainedTokenizerFast,
        trunk: Trunk,
        velocity_decoder: VelocityDecoder,
        autoencoder: Autoencoder,
        scheduler: SchedulerMixin,
        understanding_encoder: UnderstandingEncoder,
        understanding_connector: Connector,
        code_head: CodeHead | None = None,
        bridge: Bridge | None = None,
    ) -> None:
        super().__init__(text_tokenizer, trunk, velocity_decoder, autoencoder, scheduler, code_head, bridge)
        self.register_modules(
            understanding_encoder=understanding_encoder, understanding_connector=understanding_connector
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ImageEditPipeline:
        """An embedded model by name, a diffusers folder, or a hub name."""
        where = resolve_model(pretrained_model_name_or_path)
        if isinstance(where, Path) and not (where / "understanding_connector" / "config.json").is_file():
            raise UserError(f"{where} holds no understanding_connector: this model draws, but cannot edit")
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
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        mode: str = "flow",
        num_images_per_prompt: int = 1,
        best_of: int = 1,
        strict: bool | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Changes pictures as instructions say.

        Args:
            image: A path, a PIL picture of any size and mode, an array (H, W, 3) or (B, H, W, 3) or a tensor (3, H, W)
                or (B, 3, H, W), of bytes or of numbers in [0, 1]; or a list of them.
            prompt: One instruction, or one for each picture.
            mask_image: White where pixels may change; of the source's size or of the model's.
            negative_prompt: What the result moves away from, beside the plain source; one, or one for each picture.
            height: One of `sides`; by default the model's own. Sources may have any size.
            width: As the height.
            num_inference_steps: Sampling steps; by default 12 in flow mode and 32 in codes mode.
            guidance_scale: Guidance towards the instruction.
            image_guidance_scale: Guidance towards the source.
            mode: "flow" or "codes".
            num_images_per_prompt: Results for each picture.
            best_of: The most times that a picture is changed, until the model itself reads in the result what the
                instruction asks for (`mm.pipelines.best_of`); the output then has `tries`, `right` and `missing`, too.
            strict: True refuses an instruction with words that are not understood, None one that cannot be carried
                out as a whole; False tries all.
            generator: As in `TextToImagePipeline`, as are the arguments below.
            latents: Starting noise (B, 16, 8, 8) of flow mode.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False returns a tuple of the pictures alone.
            attention_kwargs: `{"scale": x}` scales loaded LoRAs.
            callback_on_step_end: Called after each step.
            callback_on_step_end_tensor_inputs: The tensors it wants.

        Returns:
            ImagePipelineOutput (with `best_of` above 1 a `CheckedOutput`), or a tuple.

        Raises:
            UserError: For anything that cannot be drawn. Unknown words give a warning.
        """
        guidance_scale = self.default_guidance[0] if guidance_scale is None else guidance_scale
        image_guidance_scale = self.default_guidance[1] if image_guidance_scale is None else image_guidance_scale
        prompts = texts_of(prompt)
        negatives = negatives_of(negative_prompt, self.text_tokenizer)
        num_inference_steps = steps_for(mode, num_inference_steps)
        pictures = sources_of(image, len(prompts))
        prompts = check_instructions(
            prompts, self.text_tokenizer, lambda at: self._seen(pictures[at]),
            lambda at, name: self._is_absent(pictures[at], name), strict=strict,
        )  # fmt: skip
        negatives = one_for_each(negatives, len(prompts))
        side = self.side
        self.check_inputs(
            height=side if height is None else height, width=side if width is None else width,
            steps=num_inference_steps, pictures=num_images_per_prompt, mode=mode,
            guidance_scale=guidance_scale, latents=latents, output_type=output_type,
            tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        check_scale("image_guidance_scale", image_guidance_scale)
        check_best_of(best_of, latents)
        generators = picture_generators(generator, len(prompts) * num_images_per_prompt)
        options: dict[str, Any] = {
            "mask_image": mask_image, "num_inference_steps": num_inference_steps, "mode": mode,
            "guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale,
            "output_type": output_type, "return_dict": False, "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
            "attention_kwargs": attention_kwargs, "height": height, "width": width,
        }  # fmt: skip
        if best_of > 1:
            found = self._edit_best(pictures, prompts, negatives, generators, best_of, options)
            return found if return_dict else (found.images,)
        if len(parts_of(self, len(generators))) > 1:  # one by one: see mm.pipelines.batch_parts
            made = self._one_by_one(pictures, prompts, negatives, generators, latents, **options)
            return ImagePipelineOutput(images=made) if return_dict else (made,)
        opened = [open_picture(picture) for picture in pictures]
        source = to_tensor(opened, side).to(self._execution_device)
        tokens = self.understanding_encoder(source.to(self.understanding_encoder.dtype))[1]
        warn_of(self.understanding_connector, tokens, opened, side, stacklevel=3, result=height)
        mask = None if mask_image is None else mask_of(mask_image, pictures[0], side).to(source.device)
        with self.scaled_lora(attention_kwargs), self._new_run(guidance_scale=guidance_scale) as run_:
            assert self.autoencoder is not None
            clean = self.autoencoder.encode(source.to(self.autoencoder.dtype)).float()
            branches = self._edit_branches(
                prompts, negatives, tokens, clean, num_images_per_prompt, guidance_scale, image_guidance_scale
            )
            on_step = run_.step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
            clean = clean.repeat_interleave(num_images_per_prompt, 0)
            noise = self.prepare_latents(generators, latents) if mode == "flow" else None
            if noise is not None and mask is not None:
                on_step = keep_outside(run_, clean, noise, mask, on_step)
            parts = DrawingParts(
                trunk=self.trunk, generators=generators, branches=branches, steps=num_inference_steps, run=run_,
                on_step=on_step,
            )  # fmt: skip
            drawn = self._draw_latents(noise, parts)
        if mode == "codes" and mask is not None:
            drawn = torch.where(coarse_mask(mask, drawn.shape[-1]) > 0, drawn, clean)
        if mask is not None and height not in (None, side):
            # outside of the mask, the source's own pixels are kept, at the size of the result
            source = to_tensor(opened, height).to(drawn.device)
            mask = mask_of(mask_image, pictures[0], height).to(drawn.device)
        source = source.repeat_interleave(num_images_per_prompt, 0)
        out: Any = drawn if output_type == "latent" else self._finish(drawn, source, mask, output_type, height)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=out) if return_dict else (out,)

    def _one_by_one(
        self, pictures: Sequence[Any], prompts: Sequence[str], negatives: Sequence[str],
        generators: Sequence[torch.Generator], latents: torch.Tensor | None, **options: Any,
    ) -> Any:  # fmt: skip
        """The edited pictures of a call, each drawn in a call of its own; `options` are those of `__call__`."""
        each = len(generators) // len(prompts)
        made = [
            self(
                [pictures[k // each]], [prompts[k // each]], negative_prompt=negatives[k // each],
                generator=[one], strict=False, latents=None if latents is None else latents[k : k + 1], **options,
            )[0]
            for k, one in enumerate(generators)
        ]  # fmt: skip
        return joined(made)

    def _edit_best(
        self, pictures: Sequence[Any], prompts: Sequence[str], negatives: Sequence[str],
        generators: Sequence[torch.Generator], best_of: int, options: dict[str, Any],
    ) -> CheckedOutput:  # fmt: skip
        """The best of several tries of each picture; `options` are those of `__call__`."""
        each = len(generators) // len(prompts)
        own = [k // each for k in range(len(generators))]
        output_type, given_mask, mask = options["output_type"], options["mask_image"], None
        if given_mask is not None:  # at the model's size, it fits every source
            mask = mask_of(given_mask, pictures[0], self.side)
            options = options | {"mask_image": to_pil_image(mask[0])}

        def draw(rows: Sequence[int], some: Sequence[torch.Generator]) -> torch.Tensor:
            at = [own[row] for row in rows]
            given = options | {"output_type": "latent", "negative_prompt": [negatives[i] for i in at]}
            sources, words = [pictures[i] for i in at], [prompts[i] for i in at]
            return torch.as_tensor(self(sources, words, generator=list(some), strict=False, **given)[0])

        check = self._checker(self._asked([prompts[i] for i in own], asked_of_change))
        with self._new_run(guidance_scale=options["guidance_scale"]) as run_:
            options = options | {"callback_on_step_end": passing_on(options["callback_on_step_end"], run_)}
            best = draw_best(draw, check, generators, best_of, run_)
        latents: Any = best.latents
        steps = [int(options["num_inference_steps"])] * len(generators)
        if output_type == "latent":
            return best.output(latents, steps)
        height = options["height"]
        source = to_tensor([open_picture(pictures[i]) for i in own], height or self.side).to(latents.device)
        if mask is not None:
            mask = mask_of(given_mask, pictures[0], height or self.side).to(latents.device)
        finished = [
            self._finish(latents[part], source[part], mask, output_type, height)
            for part in parts_of(self, len(generators))
        ]
        return best.output(joined(finished), steps)

    def edit(
        self, pictures: Sequence[Any], instructions: Sequence[str], seeds: Sequence[int], *, best_of: int = 1
    ) -> list[Image.Image]:
        """One edited picture each, from its own seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self(list(pictures), list(instructions), generator=generators, best_of=best_of).images

    def _seen(self, picture: Any) -> Seen:
        """What a source shows by the model's own description, for instructions that speak of "it"."""
        tokens = self._read(picture)
        (facts,) = run([facts_of()], lambda _, questions: self._ask_about(tokens, questions, _MOST_WORDS))
        return Seen(groups=facts.groups)

    def _is_absent(self, picture: Any, name: str) -> bool:
        """Whether the model sees no thing of a name in a source."""
        if name not in v.OBJECTS:
            return False
        tokens = self._read(picture)
        (absent,) = run([is_absent(Thing(name=name))], lambda _, asked: self._ask_about(tokens, asked, _MOST_WORDS))
        return bool(absent)

    def _read(self, picture: Any) -> torch.Tensor:
        """The understanding tokens (1, S, D) of a source."""
        source = to_tensor([open_picture(picture)], self.side).to(self._execution_device)
        tokens = self.understanding_encoder(source.to(self.understanding_encoder.dtype))[1]
        return self.understanding_connector(tokens.to(self.understanding_connector.dtype))

    def _ask_about(self, tokens: torch.Tensor, questions: Sequence[str], max_words: int) -> list[str]:
        """The model's own answers to questions about one picture, by its understanding tokens (1, S, D)."""
        return answers_about(self.trunk, self.text_tokenizer, tokens, questions, max_words)

    def _edit_branches(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        tokens: torch.Tensor,
        clean: torch.Tensor,
        each: int,
        scale: float,
        image_scale: float,
    ) -> GuidanceBranches:
        """The branches of instruction and source, source only, and neither; those of weight zero are left out.

        `tokens` are the understanding encoder's of the source, `clean` its latents.
        """
        understanding = self.understanding_connector(tokens.to(self.understanding_connector.dtype))
        full = self._prompt_cache(prompts, understanding, clean).repeat(each)
        others = []
        if scale != image_scale:
            cache = self._prompt_cache(negatives, understanding, clean).repeat(each)
            others.append((cache, lambda now: image_scale - now))
        if image_scale != 1:
            others.append((self._prompt_cache(negatives, None, None).repeat(each), lambda _: 1 - image_scale))
        return GuidanceBranches(full, others, scale=scale, complete=scale != image_scale)

    def _prompt_cache(
        self, words: Sequence[str], understanding: torch.Tensor | None, clean: torch.Tensor | None
    ) -> PromptCache:
        """The cache of instructions, with the source as understanding tokens and clean latents where they are given."""
        count = 16 if understanding is None else understanding.shape[1]
        pictures = () if understanding is None else (None,)
        rows = [Dialogue(self.text_tokenizer, count).user(w, *pictures).starts_drawing().ids for w in words]
        ids, mask = left_padded(rows, self._execution_device)
        cache = self.trunk.encode_text(ids, mask, understanding)
        return cache if clean is None else self.trunk.encode_picture(clean.to(self.trunk.dtype), cache)

    def _finish(
        self, drawn: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None, output_type: str, height: int | None
    ) -> Any:  # fmt: skip
        pictures = self._pixels(drawn, height)
        if mask is not None:
            pictures = torch.where(mask > 0, pictures, source)
        return self.image_processor.postprocess(pictures, output_type=output_type)
