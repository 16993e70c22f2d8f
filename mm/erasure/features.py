"""What the text-reading layers of a model read for given prompts.

Design choices
- Features are recorded at the layers themselves, by hooks, in one sampling step without guidance: this serves every
  family, and gives what a layer really reads (behind adaLN and norms, where there are any).
- The run ends as soon as every layer has been seen. Where text is read once before sampling begins, no step is run.

Legend: B prompts, T tokens, D width.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm.core.errors import UserError
from mm.core.nouns import counted
from mm.families import family_of
from mm.families.frames import one_frame
from mm.families.sizes import exact_size
from mm.families.sources import draws_from_text, plain_sources
from mm.families.wording import as_written

CHUNK = 64  # prompts in one call
_WITH_SOURCES = 4  # of a pipeline that brings a source picture a prompt to a size of its own, such as a megapixel
SMALL = 64  # pixels a side, or the nearest that the family draws
# Arguments of some pipelines that would put words around the prompt or choose another size (SANA), ask for two steps
# (SANA-Sprint), or ask the model about a picture before it is edited (ours).
PLAIN: dict[str, Any] = {
    "complex_human_instruction": None, "use_resolution_binning": False, "intermediate_timesteps": None, "strict": False,
}  # fmt: skip


class _RecordedError(Exception):
    """Leaves a pipeline once every layer has been seen."""


class Watch(Protocol):
    """What is watched beside the layers, one value a prompt."""

    def begin(self) -> None:
        """Called before a call for some prompts."""
        ...

    def again(self) -> None:
        """Called where these prompts are drawn again one by one: what was seen since `begin` does not count."""
        ...


@torch.no_grad()
def record(
    pipe: Any, layers: Mapping[str, nn.Module], prompts: Sequence[str], pictures: Sequence[Any] = (),
    watch: Watch | None = None,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """What each layer reads for each prompt.

    Args:
        pipe: a diffusers pipeline.
        layers: the layers by path.
        prompts: what they are to read.
        pictures: one a prompt, for a pipeline that edits pictures by prompts; none for others.
        watch: its methods are called before each call, and where prompts are drawn again.

    Returns:
        For each path a tensor (T, D) a prompt, in float32 on the CPU.

    Raises:
        UserError: where a layer never ran.
    """
    texts = list(prompts) if pictures else list(dict.fromkeys(prompts))  # many targets share anchors and neighbours
    found: dict[str, list[Tensor]] = {path: [] for path in layers}
    family = family_of(pipe)
    size = CHUNK if draws_from_text(pipe) else _WITH_SOURCES
    size = size if family is None or family.mixed else 1
    for start in range(0, len(texts), size):
        part = slice(start, start + size)
        if watch is not None:
            watch.begin()
        for path, x_BTD in _seen(pipe, layers, texts[part], list(pictures[part]), watch).items():
            found[path] += list(x_BTD)
    if len(texts) == len(prompts):
        return found
    place = {text: i for i, text in enumerate(texts)}
    return {path: [x[place[prompt]] for prompt in prompts] for path, x in found.items()}


def _seen(
    pipe: Any, layers: Mapping[str, nn.Module], prompts: list[str], pictures: list[Any], watch: Watch | None = None
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if path not in seen:
                seen[path] = x.detach().float().cpu()
            if len(seen) == len(layers):
                raise _RecordedError

        return before

    handles = [m.register_forward_pre_hook(hook(path), with_kwargs=True) for path, m in layers.items()]
    try:
        draw_once(pipe, prompts, pictures)
    except _RecordedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in layers if path not in seen]:
        raise UserError(
            f"{counted(len(missing), 'layer')} that should read text did not run, {missing[0]} first; name the sites"
        )
    for path, x in seen.items():
        if x.ndim != 3 or x.shape[0] < len(prompts):
            if len(prompts) == 1:
                seen[path] = x.reshape(1, -1, x.shape[-1])
            else:  # a layer without a batch dimension, or a 4-bit model that draws each prompt alone: one by one
                if watch is not None:
                    watch.again()
                parts = [_seen(pipe, layers, [prompt], pictures[i : i + 1]) for i, prompt in enumerate(prompts)]
                return {p: torch.nn.utils.rnn.pad_sequence([q[p][0] for q in parts], batch_first=True) for p in layers}
    return {path: x[-len(prompts) :] for path, x in seen.items()}  # with guidance, the prompts' rows come last


def draw_once(pipe: Any, prompts: list[str], pictures: Sequence[Any] = ()) -> Any:
    """One sampling step for each prompt, without guidance and without decoding; with pictures, each is edited."""
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"prompt": prompts, "num_inference_steps": 1, "output_type": "latent"}
    given |= {"guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)} | PLAIN | as_written(takes)
    given |= {"image": list(pictures)} if pictures else plain_sources(pipe, len(prompts), SMALL)
    family = family_of(pipe)
    if family is not None and family.size is not None:  # text does not depend on the picture's size
        side = family.size.nearest(SMALL)
        given |= exact_size(takes, side, side)
    given |= one_frame(takes) | {"output_type": "latent"}
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the words: the prompts are not the user's
            given = {key: value for key, value in given.items() if key in takes}
            try:
                return pipe(**given)
            except ZeroDivisionError:  # Mochi has no schedule of one step
                return pipe(**given | {"num_inference_steps": 2})
    finally:
        pipe.set_progress_bar_config(**quiet)
