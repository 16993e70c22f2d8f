"""Rows of a denoiser's arguments and results, whatever nests them.

Legend: R rows of a batch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def selected(value: Any, rows: torch.Tensor, count: int, *, lists: bool) -> Any:
    """The arguments of some rows.

    Args:
        value: An argument: a tensor, or tensors in lists, tuples and mappings; anything else is kept as it is.
        rows: Which rows, int64 on the CPU.
        count: R; what has another length belongs to no row.
        lists: Whether the model takes a list of pictures, so that a list of R entries has one for each row. In other
            models a list of tensors holds whole batches (residuals of a ControlNet).
    """
    if isinstance(value, torch.Tensor):
        return value[rows.to(value.device)] if value.ndim and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: selected(one, rows, count, lists=lists) for key, one in value.items()}
    if not isinstance(value, list | tuple):
        return value
    tensors = any(isinstance(one, torch.Tensor) for one in value)
    if len(value) == count and (lists or not tensors):
        return type(value)(value[row] for row in rows.tolist())
    return type(value)(selected(one, rows, count, lists=lists) for one in value)


def prediction_of(result: Any) -> Any:
    """The prediction in a denoiser's result: a tensor (R, ...), or a list of R tensors."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, Mapping):
        return next(iter(result.values()))
    if dataclasses.is_dataclass(result):
        return getattr(result, dataclasses.fields(result)[0].name)
    return result[0]


def with_prediction(result: Any, prediction: Any) -> Any:
    """A denoiser's result with another prediction in it."""
    if isinstance(result, torch.Tensor):
        return prediction
    if isinstance(result, tuple):
        return (prediction, *result[1:])
    changed: Any = copy.copy(result)
    name = next(iter(result)) if isinstance(result, Mapping) else dataclasses.fields(result)[0].name
    if isinstance(changed, dict):
        changed[name] = prediction  # diffusers' outputs keep keys and attributes equal
    else:
        setattr(changed, name, prediction)
    return changed


def flat(prediction: Any) -> torch.Tensor:
    """A prediction as (R, N), float32."""
    if isinstance(prediction, Sequence):
        return torch.stack([one.float().flatten() for one in prediction])
    return prediction.float().flatten(1)


def shaped(flat_RN: torch.Tensor, like: Any) -> Any:
    """The inverse of `flat`; `like` is a prediction of the same kind and any number of rows."""
    if isinstance(like, Sequence):
        first = like[0]
        return [row.to(first.dtype).view(first.shape) for row in flat_RN]
    return flat_RN.to(like.dtype).view(len(flat_RN), *like.shape[1:])
