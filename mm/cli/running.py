"""What commands have in common while a model is loaded and runs: notes, warnings and progress go to stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm.cli import say as say
from mm.engine.events import Done, Notice, Picture, Step, Words
from mm.engine.running import Run


def loaded(model: str, *, adapters: list[tuple[Path, float]], **options: Any) -> Any:
    """The engine of a model; what was chosen is said on stderr, and nothing else is."""
    from mm.core.paths import embedded_models

    engine = quietly_loaded(model, adapters=adapters, **options)
    plain = model in embedded_models() and options.get("bits") is None and not adapters
    for note in () if plain else engine.notes:
        say(note)
    return engine


def quietly_loaded(model: str, **options: Any) -> Any:
    """The engine of a model; warnings alone are shown."""
    import mm

    with quiet_libraries():
        return mm.load(model, **options)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Progress bars and log lines of diffusers and transformers stay away; warnings for users are one line each."""
    from mm.engine.notices import library_logs, no_loading_bars

    lines: list[str] = []
    no_loading_bars()
    with library_logs(lines), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = lambda text, *_, **__: say(text)
        yield


def follow(events: Run, on_picture: Callable[[Picture], None], *, total: int = 1) -> Done:
    """Reads a run's events to the end: pictures go to `on_picture`, words to stdout, all else to stderr.

    Args:
        events: of `Engine.run`; worked on in this thread.
        on_picture: called with each picture as soon as it is finished.
        total: pictures of the run, for the progress bar, which is shown in a terminal only.
    """
    from tqdm import tqdm

    done = Done(pictures=0)
    with tqdm(total=total, unit="picture", disable=None, file=sys.stderr, leave=False) as bar:

        def show(event: Any) -> None:
            nonlocal done
            if isinstance(event, Step):
                bar.set_postfix_str(f"step {event.step} of {event.steps}")
            elif isinstance(event, Picture):
                bar.update()
                bar.clear()
                on_picture(event)
            elif isinstance(event, Words):
                print(event.text, end="", flush=True)
            elif isinstance(event, Notice):
                bar.clear()
                say(event.text)
            elif isinstance(event, Done):
                done = event

        events.each(show)
    return done
