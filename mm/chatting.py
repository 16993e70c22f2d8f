"""A conversation over lines of text: what `mm chat` does, for scripts too.

Design choices
- Lines come from anywhere that can be iterated; words go out as they come, pictures into numbered files that are named.
- Ctrl-C stops the current turn and leaves the conversation as it was before; at the prompt it ends the program.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm.core.devices import place
from mm.core.errors import UserError
from mm.core.paths import resolve_model
from mm.core.png_settings import drawing_settings, png_bytes
from mm.drawing import save_numbered
from mm.models.dialogue import detokenize

if TYPE_CHECKING:
    from mm.pipelines.interleaved import InterleavedPipeline


def converse(model: str, out: Path, *, seed: int, steps: int, lines: Iterable[str], interactive: bool = False) -> None:
    """Answers line after line.

    Args:
        model: An embedded model, a folder, or a hub name.
        out: Folder for the pictures.
        seed: Of the first picture.
        steps: Sampling steps.
        lines: What the user says; commands begin with a slash.
        interactive: Whether to print prompts.

    Raises:
        UserError: The model cannot be loaded; or, where not interactive, a turn failed. A turn's error is printed and
            the conversation goes on.
    """
    resolve_model(model)

    from mm import InterleavedPipeline

    pipe = InterleavedPipeline.from_pretrained(model)
    place(pipe)
    out.mkdir(parents=True, exist_ok=True)
    conversation, picture, failed = pipe.start(), None, False
    if interactive:
        print("say what to draw, change or describe; /image FILE, /new, /quit\n> ", end="", flush=True)
    for line in lines:
        words = line.strip()
        try:
            if words == "/quit":
                break
            if words == "/new":
                conversation, picture = pipe.start(), None
            elif words.startswith("/image "):
                from mm.pipelines.pictures import open_picture

                picture = open_picture(Path(words.removeprefix("/image ").strip()))
            elif words.startswith("/"):
                raise UserError(f"unknown command {words.split()[0]!r}; there are /image FILE, /new, /quit")
            elif words:
                _turn(pipe, conversation, words, picture, out, seed, steps, model)
                picture = None
        except UserError as error:
            failed = True
            print(f"mm: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)", flush=True)
        if interactive:
            print("> ", end="", flush=True)
    if failed and not interactive:
        raise UserError("some turns failed; see above")


def _turn(
    pipe: InterleavedPipeline,
    conversation: Any,
    words: str,
    picture: Any,
    out: Path,
    seed: int,
    steps: int,
    model: str,
) -> None:
    said: list[str] = []
    for event in pipe.turn(conversation, words, picture, seed=seed, steps=steps):
        if event.kind == "word":
            before = detokenize(said)
            said.append(event.word)
            print(detokenize(said)[len(before) :], end="", flush=True)
        elif event.picture is not None:
            used = seed + conversation.pictures - 1
            settings = drawing_settings(prompt=words, seed=used, steps=steps, mode="flow", model=model)
            print(f"[{save_numbered(out, png_bytes(event.picture, settings))}]", end="", flush=True)
    print(flush=True)
