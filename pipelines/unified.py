"""Public unified models in mm's pipelines: one model of transformers that draws and reads.

Design choices
- A family (`mm.pipelines.janus`, `mm.pipelines.emu3`) wraps transformers' own classes, unchanged, behind the protocol
  `UnifiedModel`: draw tokens, decode them, answer. The pipelines here are the same for all families.
- They are called as mm's own: `TextToImagePipeline.from_pretrained(folder)` and `UnderstandingPipeline.from_pretrained`
  return the classes here for a folder whose config.json names such a model.
- The same seed gives the same picture: transformers' `generate` samples a whole batch from one generator, so that a
  picture depends on the others. Here each picture has Gumbel noise of its own, in float32, token by token.

Legend: B pictures, L tokens a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - diffusers expects the name in our modules
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

from mm.core.errors import UserError
from mm.core.model_files import check_loaded
from mm.core.nouns import with_article
from mm.core.paths import expanded
from mm.families import model_types
from mm.families.folders import unified_type
from mm.pipelines.answers import UnderstandingOutput, paired
from mm.pipelines.drawing_arguments import check_count, check_output_type, check_scale
from mm.pipelines.emu3 import Emu3
from mm.pipelines.janus import Janus
from mm.pipelines.loading import check_transformers_folder
from mm.pipelines.pictures import open_picture
from mm.pipelines.sampling import Generators, picture_generators
from mm.pipelines.token_sampling import Sampling
from mm.pipelines.unified_protocol import UnifiedModel

FAMILIES: dict[str, Any] = {"emu3": Emu3, "janus": Janus}


def kind_at(where: str | Path, options: Mapping[str, Any] | None = None) -> str | None:
    """The family of the model in a folder or under a hub name (fetched with `options`); None for any other."""
    if isinstance(where, Path) or expanded(where).is_dir():
        return unified_type(where)
    from transformers import PretrainedConfig

    try:
        found = PretrainedConfig.get_config_dict(where, **_for_hub(options or {}))[0].get("model_type")
    except (OSError, ValueError):
        return None
    return found if found in model_types() else None


def _for_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: options[k] for k in ("cache_dir", "force_download", "local_files_only", "revision", "token") if k in options
    }


def family_of(model: Any, processor: Any) -> UnifiedModel:
    """The family of a model of transformers, by its config's `model_type`."""
    return FAMILIES[model.config.model_type](model, processor)


def load_parts(where: str | Path, kind: str, **kwargs: Any) -> dict[str, Any]:
    """Model and processor from a folder or a hub name. Raises UserError where tensors are missing."""
    import transformers

    name = kind.capitalize()
    if Path(where).is_dir():
        check_transformers_folder(
            getattr(transformers, f"{name}ForConditionalGeneration"), Path(where), kwargs.get("variant")
        )
    if "torch_dtype" in kwargs:  # its name in older versions of both libraries
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    try:
        processor = getattr(transformers, f"{name}Processor").from_pretrained(where, **_for_hub(kwargs))
        model, loaded = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(
            where, **(kwargs | {"use_safetensors": True, "output_loading_info": True})
        )
    except UserError:
        raise
    except Exception as error:  # what tokenizers and processors raise for damaged files is of any type
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{where} is {with_article(kind)} model that cannot be loaded: {why}") from error
    wrong = [
        str(key) for kinds in ("missing_keys", "mismatched_keys", "unexpected_keys") for key in loaded.get(kinds, ())
    ]
    if wrong:
        raise UserError(
            f"{where} does not hold just the tensors of {with_article(name)}ForConditionalGeneration; missing, unknown "
            f"or of another shape: {', '.join(wrong[:3])} ({len(wrong)} in all); copy or save the model again"
        )
    if Path(where).is_dir():
        check_loaded(model, where)
    return {"model": model.eval(), "processor": processor}


class UnifiedPipeline(DiffusionPipeline):
    """What both pipelines share: the two parts, in transformers' folder layout."""

    model_cpu_offload_seq = "model"

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.register_modules(model=model, processor=processor)
        self.family = family_of(model, processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """A folder or a hub name of a Janus or Emu3 in transformers' layout. Only safetensors files are read."""
        kind = kind_at(pretrained_model_name_or_path, kwargs)
        if kind is None:
            raise UserError(f"{pretrained_model_name_or_path} holds no config.json of a Janus or Emu3 of transformers")
        if kwargs.pop("use_safetensors", True) is not True:
            raise UserError("use_safetensors=False would load pickled weights, which can run code; leave it out")
        return cls(**load_parts(pretrained_model_name_or_path, kind, **kwargs))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes the folder as transformers does, so that both libraries load it; files in it are replaced."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


class UnifiedTextToImagePipeline(UnifiedPipeline):
    """Draws pictures from prompts, token by token. See `__call__`."""

    modes = ("codes",)

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.image_processor = VaeImageProcessor(do_normalize=False)

    @property
    def side(self) -> int:
        """Pixels on each side of a picture whose size is not given."""
        return self.family.size(None, None)[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        mode: str = "codes",
        temperature: float = 1.0,
        top_k: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draws `num_images_per_prompt` pictures of each prompt.

        Arguments and results as in `TextToImagePipeline`. `guidance_scale`, `top_k` (0 = all codes) and
        `negative_prompt` default to the family's; `temperature` 0 takes the likeliest token. A step is a
        token, so `num_inference_steps` changes nothing. `output_type` "latent" gives tokens (B, L).
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        default = self.family.defaults
        sampling = Sampling(
            guidance_scale=default.guidance_scale if guidance_scale is None else guidance_scale,
            temperature=temperature,
            top_k=default.top_k if top_k is None else top_k,
        )
        _check_drawing(prompts, sampling, mode, num_images_per_prompt, output_type)
        size = self.family.size(height, width)
        negative = default.negative_prompt if negative_prompt is None else negative_prompt
        generators = picture_generators(generator, len(prompts) * num_images_per_prompt)
        several = [p for p in prompts for _ in range(num_images_per_prompt)]
        with self.progress_bar(total=self.family.length(size)) as bar:
            pictures: Any = self.family.draw(several, negative, size, generators, sampling, bar)
        if output_type != "latent":
            pictures = self.family.decode(pictures, size).clamp(0, 1)
            pictures = self.image_processor.postprocess(pictures, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)


def _check_drawing(prompts: Sequence[str], sampling: Sampling, mode: str, pictures: int, output_type: str) -> None:
    """Raises UserError for what no family can draw, with the value."""
    if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
        raise UserError(f"a prompt is a text that says what to draw, got {prompts!r}")
    if mode != "codes":
        raise UserError(f"this model draws in codes only, not in mode {mode!r}; give mode='codes' (--mode codes)")
    check_count("num_images_per_prompt", pictures)
    check_scale("guidance_scale", sampling.guidance_scale, " (1 = off)")
    check_output_type(output_type, decodes=True)


class UnifiedUnderstandingPipeline(UnifiedPipeline):
    """Answers questions about pictures, and describes them."""

    @torch.no_grad()
    def __call__(
        self, image: Any, question: str | Sequence[str] | None = None, *, max_words: int = 128
    ) -> UnderstandingOutput:
        """Answers `question` (default: a description) about `image`; lists of both go pairwise.

        `max_words` counts tokens. Decoding is greedy, so that an answer is repeatable. `outside` is always False: it is
        not measured for public models.
        """
        pictures, questions = paired(image, question)
        if max_words < 1:
            raise UserError(f"max_words is {max_words}; give 1 or more")
        answers = self.family.answer([open_picture(p) for p in pictures], questions, max_words)
        self.maybe_free_model_hooks()
        return UnderstandingOutput(answers=answers, outside=[False] * len(answers))

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """One answer a pair."""
        return self(list(pictures), list(questions)).answers

    def describe(self, pictures: Sequence[Any]) -> list[str]:
        """One description a picture."""
        return self(list(pictures)).answers
