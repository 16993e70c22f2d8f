"""Files in which a run keeps what it has done, so that one that was stopped goes on.

Design choices
- Whatever a damaged file causes while it is taken in becomes one error: which file, what is wrong, and what to do.
- A state says how many tensors it holds. A part that is missing cannot be distinguished from a new one, and would
  begin again without a word.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mm.core.errors import UserError
from mm.core.files import write_bytes
from mm.core.nouns import counted
from mm.core.safe_json import Fields, read_object
from mm.core.safe_tensors import LIMITS, check_finite, load_tensors, read_header, tensor_bytes

COUNT = "tensors"  # in the metadata
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError)


@contextmanager
def taking(path: str | os.PathLike[str], what: str, advice: str) -> Iterator[None]:
    """Within the context, what a damaged file causes is raised as one UserError.

    Args:
        path: the file.
        what: it is, for messages: "state of the run".
        advice: what to do about it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # no matter of the file
    except _WRONG as error:
        why = str(error) if isinstance(error, UserError) else f"the {what} is damaged ({error!r:.200})"
        named = why if str(path) in why else f"{path}: {why}"
        raise UserError(f"{named}; {advice}") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What `read_state` found.

    Attributes:
        path: of the file.
        what: it is, for messages.
        advice: what to do about a damaged one.
        tensors: by name.
        metadata: its texts.
    """

    path: Path
    what: str
    advice: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within the context, what is wrong with the file is raised as one UserError that says what to do."""
        with taking(self.path, self.what, self.advice):
            yield

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A tensor, on the device of `like`. Raises UserError where it is missing or has another shape."""
        found = self.tensors.get(name)
        if found is None:
            raise UserError(f"{self.path} lacks the tensor {name!r}")
        if found.shape != like.shape:
            raise UserError(f"{self.path}: {name!r} has shape {list(found.shape)}, not {list(like.shape)}")
        return found.to(like.device)

    def fields(self, key: str) -> Fields:
        """The JSON object under a key of the metadata. Raises UserError where there is none."""
        if key not in self.metadata:
            raise UserError(f"{self.path} lacks {key!r}")
        return Fields(json.loads(self.metadata[key]), f"{self.path}: {key}")


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a state, whole or not at all. One that is there is replaced.

    Args:
        path: the file.
        tensors: by name.
        metadata: texts by key.
    """
    write_bytes(path, tensor_bytes(tensors, {**metadata, COUNT: str(len(tensors))}))


def read_state(path: str | os.PathLike[str], what: str, advice: str, *, finite: bool = True) -> State:
    """Reads a file that `write_state` wrote.

    Args:
        path: the file.
        what: it is, for messages: "state of the run".
        advice: what to do about a damaged one.
        finite: whether NaN and infinity are refused.

    Raises:
        UserError: where it is damaged, with the advice.
    """
    with taking(path, what, advice):
        header = read_header(path, what, limits=LIMITS)
        tensors = load_tensors(header)
        said = header.metadata.get(COUNT, str(len(tensors)))  # earlier versions did not say it
        if said != str(len(tensors)):
            raise UserError(f"{path} holds {len(tensors)} of {counted(int(said), 'tensor')}")
        for name, tensor in tensors.items() if finite else ():
            check_finite(tensor, name, path)
    return State(path=Path(path), what=what, advice=advice, tensors=tensors, metadata=header.metadata)


def read_result(path: str | os.PathLike[str], what: str, advice: str) -> dict[str, Any]:
    """The JSON object that a run kept.

    Args:
        path: the file.
        what: it is, for messages.
        advice: what to do about a damaged one.

    Raises:
        UserError: where it is damaged, with the advice.
    """
    with taking(path, what, advice):
        return read_object(path, what)
