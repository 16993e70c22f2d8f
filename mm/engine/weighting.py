"""Prompt weights and long prompts on any diffusers pipeline, through its tokenizers and text encoders.

Design choices
- The hidden states of a token are multiplied by its weight after the text encoder, as A1111's "No norm" does. That
  needs no knowledge of what a pipeline makes of them, and is the same rule for CLIP, T5 and language models.
- A run's view of the pipeline gets copies of tokenizers and encoders that share all weights (`view_of` in
  `mm.engine.views`); the pipeline itself is not changed, and other runs see nothing.
- Denoisers that begin with an RMS norm of each token (Qwen-Image, Z-Image, Lumina 2) undo any scale, so that weights
  are left out there with a warning.
- Which token stands for which words is known by the tokenizer's character offsets, also where a pipeline puts a prompt
  into a template or writes it in lower case.
- CLIP reads 77 tokens. Where a pipeline uses CLIP's hidden states (Stable Diffusion 1 to 3), longer prompts are read in
  chunks of 75 words' tokens, each between its own start and end token, and the hidden states are joined, as in A1111.
  The pooled state is the first chunk's. Elsewhere (FLUX) CLIP gives a pooled state only, and T5 reads the long prompt.

Legend: B rows, L tokens.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.engine.prompts import weighted

_CHUNKED = ("StableDiffusion", "Kolors")  # beginnings of names of pipelines that use CLIP's hidden states
# Where denoisers read text: Qwen-Image, Z-Image, Lumina 2.
_TEXT_NORMS = ("txt_norm", "cap_embedder.0", "time_caption_embed.caption_embedder.0")
MAX_CHUNKS = 16


def plain_text(prompt: str) -> str:
    """A prompt without the marks of weights."""
    return "".join(text for text, _ in weighted(prompt))


def has_weights(prompt: str) -> bool:
    """Whether any part of a prompt has another weight than 1."""
    return any(weight != 1 for _, weight in weighted(prompt))


def applies_weights(view: Any) -> bool:
    """Whether a pipeline's encoders and denoiser let the weights of words act."""
    return any(_pairs(view)) and not _normalized(view)


def weighed(view: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts of a call without the marks of weights, which the view then applies.

    Args:
        view: from `view_of`; changed in place where that is needed.
        arguments: of the call, by name.
    """
    given = {key: arguments[key] for key in ("prompt", "negative_prompt") if arguments.get(key) is not None}
    several = {key: [value] if isinstance(value, str) else list(value) for key, value in given.items()}
    texts = prepare(view, list(dict.fromkeys(text for values in several.values() for text in values)))
    return {
        key: texts[value] if isinstance(value, str) else [texts[text] for text in value] for key, value in given.items()
    }


def prepare(view: Any, prompts: Sequence[str]) -> dict[str, str]:
    """Makes a run's view of a pipeline apply weights and read long prompts.

    Args:
        view: from `view_of`; changed in place.
        prompts: all prompts and negative prompts of the run.

    Returns:
        The text to call the pipeline with for each prompt.
    """
    marked = [prompt for prompt in prompts if has_weights(prompt)]
    texts = {prompt: plain_text(prompt) for prompt in prompts}
    pairs = list(_pairs(view))
    if marked and not pairs:
        text = f"{type(view).__name__} applies no prompt weights; {marked[0]!r} is read without them"
        warnings.warn(text, stacklevel=2)
        return texts
    if marked and (where := _normalized(view)):
        text = f"{where} normalizes the length of every token, so that weights have no effect: {marked[0]!r}"
        warnings.warn(text, stacklevel=2)
        marked = []
    long = type(view).__name__.startswith(_CHUNKED)
    for tokens, encoder in pairs:
        tokenizer = getattr(view, tokens)
        chunks = _chunks(tokenizer, list(texts.values())) if long and _is_clip(tokenizer) else 1
        if not marked and chunks == 1:
            continue
        record = _Record(_spans(marked), tokenizer)
        setattr(view, tokens, _tokenizer(tokenizer, record, chunks))
        setattr(view, encoder, _encoder(getattr(view, encoder), record, chunks))
    return texts


def _normalized(view: Any) -> str:
    """The denoiser's class where it begins with an RMS norm of text tokens, which undoes any scale; else empty."""
    denoiser = getattr(view, "transformer", None)
    for path in _TEXT_NORMS:
        layer = denoiser
        for name in path.split("."):
            layer = getattr(layer, name, None)
        if "RMSNorm" in type(layer).__name__:
            return type(denoiser).__name__
    return ""


def _pairs(view: Any) -> list[tuple[str, str]]:
    """Names of tokenizers and the encoders that read their tokens."""
    found = []
    for suffix in ("", "_2", "_3"):
        tokens, encoder = f"tokenizer{suffix}", f"text_encoder{suffix}"
        one, other = getattr(view, tokens, None), getattr(view, encoder, None)
        if isinstance(other, nn.Module) and getattr(one, "is_fast", False):
            found.append((tokens, encoder))
    return found


def _is_clip(tokenizer: Any) -> bool:
    return type(tokenizer).__name__.startswith("CLIPTokenizer")


def _chunks(tokenizer: Any, texts: Sequence[str]) -> int:
    """How many times CLIP's length the longest text takes."""
    chunk = tokenizer.model_max_length - 2
    longest = max((len(tokenizer(t, add_special_tokens=False, verbose=False).input_ids) for t in texts), default=0)
    needed = max(1, math.ceil(longest / chunk))
    if needed > MAX_CHUNKS:
        text = f"the prompt has {longest} tokens; {MAX_CHUNKS * chunk} are read, the rest is left out"
        warnings.warn(text, stacklevel=3)
    return min(MAX_CHUNKS, needed)


def _spans(prompts: Sequence[str]) -> dict[str, list[float]]:
    """For each text without marks, the weight of every character."""
    return {
        "".join(text for text, _ in pieces): [weight for text, weight in pieces for _ in text]
        for pieces in map(weighted, prompts)
    }


class _Record:
    """Weights of the rows of tokens that a tokenizer gave, for the encoder that reads them next."""

    def __init__(self, spans: dict[str, list[float]], tokenizer: Any) -> None:
        self.spans, self.special = spans, set(tokenizer.all_special_ids)
        self.rows: dict[tuple[int, ...], list[float]] = {}

    def weights(self, text: str, offsets: Sequence[tuple[int, int]]) -> list[float]:
        """The weight of each token of a text that holds a prompt, by where the token stands in it."""
        for plain, weights in self.spans.items():
            wanted = plain.strip().lower()
            start = text.lower().rfind(wanted) if wanted else -1
            if start >= 0:
                skipped = len(plain) - len(plain.lstrip())
                of_text = dict(enumerate(weights[skipped : skipped + len(wanted)], start))
                return [_mean([of_text.get(k, 1.0) for k in range(a, b) if not text[k].isspace()]) for a, b in offsets]
        return [1.0] * len(offsets)

    def keep(self, ids: Sequence[int], weights: Sequence[float]) -> None:
        self.rows[tuple(ids)] = list(weights)

    def of(self, ids_BL: Tensor) -> Tensor | None:
        """Weights (B, L) of rows of tokens; None where all are 1. A row may be cut or padded since it was kept."""
        found = [self._row(row) for row in ids_BL.tolist()]
        return None if all(weight == 1 for row in found for weight in row) else torch.tensor(found)

    def _row(self, ids: list[int]) -> list[float]:
        for kept, weights in self.rows.items():
            length = min(len(kept), len(ids))
            if tuple(ids[:length]) == kept[:length]:
                return [*weights[:length], *[1.0] * (len(ids) - length)]
        return [1.0] * len(ids)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def _tokenizer(tokenizer: Any, record: _Record, chunks: int) -> Any:
    """A copy of a tokenizer that records the weights of what it reads, and gives CLIP's tokens in chunks."""
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, list | tuple) or any(not isinstance(one, str) for one in texts):
            return kind.__call__(self, text, *args, **options)
        if chunks > 1 and options.get("add_special_tokens", True):
            return _chunked(tokenizer, record, texts, chunks)
        made = kind.__call__(self, text, *args, **options)
        for one, encoding in zip(texts, made.encodings or (), strict=False):
            record.keep(encoding.ids, record.weights(one, encoding.offsets))
        return made

    made = copy.copy(tokenizer)
    made.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return made


def _chunked(tokenizer: Any, record: _Record, texts: Sequence[str], chunks: int) -> Any:
    """Tokens (B, chunks x 77) of texts, each chunk with its own start, end and padding."""
    length = tokenizer.model_max_length
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[list[int]] = []
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, verbose=False)
        weights = record.weights(text, found.encodings[0].offsets)
        ids: list[int] = []
        kept: list[float] = []
        for k in range(chunks):
            part = slice(k * (length - 2), (k + 1) * (length - 2))
            words, scales = found.input_ids[part], weights[part]
            rest = length - 1 - len(words)
            ids += [start, *words, end, *[pad] * (rest - 1)]
            kept += [1.0, *scales, *[1.0] * rest]
        rows.append(ids)
        record.keep(ids, kept)
    tensor = torch.tensor(rows)
    return type(tokenizer(texts[0]))({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})


def _encoder(encoder: nn.Module, record: _Record, chunks: int) -> nn.Module:
    """A copy of a text encoder, with the same weights, that scales hidden states and reads tokens chunk by chunk."""
    made = copy.copy(encoder)
    made._forward_hooks = OrderedDict(encoder._forward_hooks)
    made._forward_hooks_with_kwargs = OrderedDict(encoder._forward_hooks_with_kwargs)
    inner = encoder.forward

    def forward(*args: Any, **options: Any) -> Any:
        ids = options.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return inner(*args, **options)
        count = chunks if chunks > 1 and ids.shape[1] % chunks == 0 else 1
        if count == 1:
            return _scaled(inner(*args, **options), record.of(ids))
        options = {key: value for key, value in options.items() if key not in ("input_ids", "attention_mask")}
        parts = [inner(part, **options) for part in ids.chunk(count, dim=1)]
        return _scaled(_joined(parts), record.of(ids))

    made.forward = forward
    return made


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs of chunks as one: hidden states one after the other, everything else the first chunk's."""
    made = copy.copy(parts[0])
    for key, value in parts[0].items():
        if key == "last_hidden_state":
            made[key] = torch.cat([part[key] for part in parts], dim=1)
        elif key == "hidden_states" and value is not None:
            made[key] = tuple(torch.cat(layer, dim=1) for layer in zip(*(part[key] for part in parts), strict=True))
    return made


def _scaled(output: Any, weights_BL: Tensor | None) -> Any:
    """An encoder's output with the hidden states of tokens times their weights; the pooled state stays."""
    if weights_BL is None:
        return output

    def scale(states: Tensor) -> Tensor:
        return states * weights_BL.to(states)[..., None]

    if isinstance(output, tuple):
        return (scale(output[0]), *output[1:])
    for key in ("last_hidden_state", "hidden_states"):
        value = output.get(key) if hasattr(output, "get") else None
        if value is not None:
            output[key] = tuple(scale(layer) for layer in value) if isinstance(value, tuple) else scale(value)
    return output
