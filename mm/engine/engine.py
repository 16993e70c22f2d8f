"""`Engine`: a loaded model that takes requests and yields events.

Design choices
- `run` gives a `Run`: an iterator over events, for which a worker thread draws, or `each`, which draws in the caller's
  thread. A caller that stops reading cancels the run.
- Runs share the model. They take turns call by call (`FairLock`), so a small order waits for one batch of a large one.
  A run that waits can be cancelled; `Done` comes when nothing of it works any more.
- Nothing of a run is kept on the pipeline: each call gets a view with a scheduler of its own.
- A run ends its OpenMP threads with each turn (`release_team`), so that the next one, in whatever thread, has the cores
  to itself.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.core.checks import whole
from mm.core.errors import UserError
from mm.core.threads import release_team
from mm.engine import calls
from mm.engine.apart import draw_apart
from mm.engine.arguments import arguments_of, grouped, size_of, unbinned
from mm.engine.attaching import Adapter, attach_all, detach, facts_of, listed
from mm.engine.batching import rounds_activations
from mm.engine.capabilities import VERBS, Capabilities, task_of
from mm.engine.events import CancelToken, Done, Event, Picture, Preview, RunCancelledError, Step, Words
from mm.engine.faster import less_work
from mm.engine.notices import Notices
from mm.engine.requests import MAX_BATCH, Describe, Draw, Edit, Request, Turn
from mm.engine.running import Emit, Run
from mm.engine.serial import FairLock
from mm.engine.settings import batch_of, settings_of
from mm.engine.views import call_parameters, view_of
from mm.engine.weighting import weighed

_NO_SPACE = frozenset(".,;:?!")  # pieces of an answer that follow the last word directly


class Engine:
    """A model with its capabilities. Made by `mm.load`.

    Attributes:
        pipeline: the plain diffusers pipeline; nothing of diffusers' own API stops working on it.
        capabilities: what the model can do.
    """

    def __init__(
        self,
        pipeline: Any,
        capabilities: Capabilities,
        *,
        name: str,
        pipeline_for: Callable[[str], Any],
        preview: Callable[[Any, tuple[int, int]], Any] | None = None,
        notes: tuple[str, ...] = (),
        facts: dict[str, Any] | None = None,
        adapters: Sequence[str | Path | Adapter] = (),
        attached: Sequence[str] = (),
        mixed: bool = True,
        own_batches: bool = False,
    ) -> None:
        """Takes what `mm.load` found.

        Args:
            pipeline: of diffusers.
            capabilities: of the model.
            name: of the model, in messages and settings.
            pipeline_for: gives the pipeline of a task.
            preview: from latents and (width, height) to small pictures.
            notes: what was chosen while loading, and why.
            facts: settings of the model that every picture carries.
            adapters: that are on the pipeline, by file and scale.
            attached: their names.
            mixed: whether pictures of different prompts can share a call without changing.
            own_batches: whether the pipeline itself draws one by one where that is needed.
        """
        self.pipeline = pipeline
        self.capabilities = capabilities
        self.name = name
        self.notes = notes
        self._pipeline_for = pipeline_for
        self._preview = preview
        self._base_facts = facts or {}
        self._facts = self._base_facts | facts_of(adapters)
        self._attached = list(attached)
        self._mixed, self._own_batches = mixed, own_batches
        self._turn = FairLock()

    def run(self, request: Request, cancel: CancelToken | None = None, *, previews: bool = False) -> Run:
        """Does what a request asks for.

        Args:
            request: what to do; checked against the capabilities before this returns its first event.
            cancel: stops the run within one step; finished pictures are kept.
            previews: whether `Preview` events come after steps, where the family has a map from latents to colours.

        Returns:
            Events in order; the last one is `Done`. `each` reads them without a thread.

        Raises:
            UserError: for a request that this model cannot do.
        """
        self.capabilities.check(request)
        token = cancel or CancelToken()
        return Run(lambda emit: self._work(request, token, emit, previews), token)

    def run_all(
        self,
        requests: Sequence[Draw | Edit],
        cancel: CancelToken | None = None,
        *,
        batch_size: int = 1,
        previews: bool = False,
    ) -> Run:
        """Pictures of several requests as one run; those that differ in prompt and seed alone share calls.

        Args:
            requests: each is checked before the first event; one of several pictures counts as that many.
            cancel: as in `run`.
            batch_size: the most pictures of a call; changes no picture.
            previews: as in `run`.

        Returns:
            Events in order; `index` counts the pictures of all requests.

        Raises:
            UserError: for a request that this model cannot do.
        """
        whole("batch_size", batch_size, 1, MAX_BATCH)
        for request in requests:
            self.capabilities.check(request)
        token = cancel or CancelToken()
        singles = [one for request in requests for one in _singles(request)]
        return Run(lambda emit: self._draw(singles, batch_size, token, emit, previews), token)

    def draw(self, prompt: str, **settings: Any) -> list[Any]:
        """The pictures of `Draw(prompt=prompt, **settings)` as PIL images, in order."""
        events: list[Event] = []
        self.run(Draw(prompt=prompt, **settings)).each(events.append)
        return [event.picture for event in events if isinstance(event, Picture)]

    def describe(self, image: Any, question: str | None = None) -> str:
        """The answer to a question about a picture, or its description."""
        events: list[Event] = []
        self.run(Describe(image=image, question=question)).each(events.append)
        return "".join(event.text for event in events if isinstance(event, Words))

    @property
    def facts(self) -> dict[str, Any]:
        """Settings of the model that every picture carries: bits, adapters."""
        return dict(self._facts)

    def pipeline_for(self, task: str) -> Any:
        """The pipeline of a task of `mm.engine.capabilities.TASKS`, with the modules that are loaded.

        Raises:
            UserError: where the model cannot do it.
        """
        if task not in self.capabilities.tasks:
            can = ", ".join(name.replace("_", " ") for name in self.capabilities.tasks)
            raise UserError(f"{self.name} cannot {VERBS[task]}; it can: {can}")
        return self._pipeline_for(task)

    def set_adapters(self, adapters: str | Path | Adapter | Sequence[str | Path | Adapter]) -> list[str]:
        """Replaces the adapters that `mm.load` or this call put on; patches that others applied stay.

        Args:
            adapters: patch or LoRA files, each alone or with its scale, applied in this order; or one alone.

        Returns:
            A line for each, which says how many layers it changes.

        Raises:
            UserError: where one does not fit; then none is left.
        """
        adapters = listed(adapters)
        with self._turn:
            detach(self.pipeline, self._attached)
            self._attached, self._facts = [], self._base_facts
            self._attached, lines = attach_all(self.pipeline, adapters)
            self._facts = self._base_facts | facts_of(adapters)
        return lines

    def converse(self) -> Any:
        """Begins a conversation, for `Turn` requests.

        Raises:
            UserError: where the model cannot converse.
        """
        return self.pipeline_for("converse").start()

    def _work(self, request: Request, cancel: CancelToken, emit: Emit, previews: bool) -> None:
        notices = Notices(emit)
        try:
            if isinstance(request, Describe):
                with self._computing(cancel, notices):
                    emit(self._answer(request))
                emit(Done(pictures=0))
            elif isinstance(request, Turn):
                self._converse(request, cancel, emit, notices)
            else:
                self._draw(_singles(request), request.batch_size, cancel, emit, previews)
        except RunCancelledError:  # while it waited for its turn
            emit(Done(pictures=0, cancelled=True))

    @contextmanager
    def _computing(self, cancel: CancelToken, notices: Notices) -> Iterator[None]:
        """A turn on the model, with warnings as events."""
        with self._turn.turn(cancel), notices:
            try:
                yield
            finally:
                release_team()

    def _answer(self, request: Describe) -> Words:
        reader = self._pipeline_for("describe")
        options = {} if request.max_words is None else {"max_words": request.max_words}
        found = reader(request.image, request.question, **options)
        if found.outside[0]:
            warnings.warn(
                f"the picture is unlike those that {self.name} was trained on; do not trust the answer",
                stacklevel=2,
            )
        return Words(text=found.answers[0], outside=found.outside[0])

    def _draw(
        self, requests: Sequence[Draw | Edit], size: int, cancel: CancelToken, emit: Emit, previews: bool
    ) -> None:
        """One picture for each request, in calls of at most `size`; other runs may take their turns between them."""
        notices, finished = Notices(emit), 0
        own = self._own_batches
        size = 1 if self._singly(requests) else size
        for group in grouped(requests, size, mixed=self._mixed, mixed_negatives=not own):
            if cancel.cancelled:
                break
            places, together = [at for at, _ in group], [request for _, request in group]
            try:
                with self._computing(cancel, notices):
                    made = self._call(together, places, cancel, emit, previews)
            except RunCancelledError:
                break
            batch = batch_of(together)
            for k, (at, request, one) in enumerate(zip(places, together, made, strict=True)):
                assert request.seed is not None
                settings = settings_of(request, self.capabilities, self.name, request.seed, one.picture) | self._facts
                settings |= {} if one.steps is None else {"steps": one.steps}
                settings |= {"batch": [batch, k]} if batch > 1 else {}
                emit(Picture(index=at, seed=request.seed, picture=one.picture, settings=settings))
            finished += len(made)
        emit(Done(pictures=finished, cancelled=finished < len(requests)))

    def _singly(self, requests: Sequence[Draw | Edit]) -> bool:
        """Whether each picture needs a call of its own to be the same at any batch size."""
        if any(isinstance(request, Draw) and request.apart is not False for request in requests):
            return True
        if self._own_batches:
            return False
        if any(request.fast is not False for request in requests):  # a threshold decides, by the last bits too
            return True
        return any(request.image is not None for request in requests) or rounds_activations(self.pipeline)

    def _call(
        self, requests: list[Draw | Edit], places: list[int], cancel: CancelToken, emit: Emit, previews: bool
    ) -> list[calls.Made]:
        if cancel.cancelled:  # while this run waited for its turn
            raise RunCancelledError
        can, first = self.capabilities, requests[0]
        pipe, steps = self._pipeline_for(task_of(first)), can.steps_of(first)
        size = size_of(first, can) or can.size

        def on_step(step: int, latents: Any, total: int | None = steps) -> None:
            emit(Step(step=step + 1, steps=max(total or 0, step + 1), first=places[0], count=len(places)))
            if previews and self._preview is not None and latents is not None:
                for at, image in zip(places, self._preview(latents, size), strict=False):
                    emit(Preview(index=at, picture=image))

        view = view_of(pipe, first.scheduler)
        takes = call_parameters(view)
        arguments = unbinned(view, takes) | arguments_of(requests, can, takes, one_negative=self._own_batches)
        seeds = [request.seed or 0 for request in requests]
        fast = can.fast_of(first)
        if isinstance(first, Draw) and first.apart is not False:
            picture = draw_apart(view, arguments, first, steps=steps, fast=fast, cancel=cancel, on_step=on_step)
            return [calls.Made(picture=picture)]
        with less_work(view, arguments, fast):
            arguments |= weighed(view, arguments)
            return calls.draw(view, arguments, seeds, steps=steps, cancel=cancel, on_step=on_step)

    def _converse(self, request: Turn, cancel: CancelToken, emit: Emit, notices: Notices) -> None:
        """A turn: words and pictures as the pipeline gives them."""
        pipe, pictures, line = self._pipeline_for("converse"), 0, ""
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        steps = self.capabilities.steps_of(request)
        options: dict[str, Any] = {} if steps is None else {"steps": steps}
        options |= {} if request.strict is None else {"strict": request.strict}
        options |= {} if request.best_of == 1 else {"best_of": request.best_of}
        with self._computing(cancel, notices):
            events = pipe.turn(request.conversation, request.words, request.image, seed=seed, **options)
            for event in events:
                if cancel.cancelled:
                    events.close()
                    break
                if event.kind == "word":
                    piece = event.word if not line or event.word in _NO_SPACE else f" {event.word}"
                    line += piece
                    emit(Words(text=piece))
                elif event.kind == "step":
                    emit(Step(step=event.step, steps=event.steps, first=pictures, count=1))
                elif event.picture is not None:
                    used = seed if event.seed is None else event.seed
                    settings = settings_of(request, self.capabilities, self.name, used, event.picture)
                    emit(Picture(index=pictures, seed=used, picture=event.picture, settings=settings | self._facts))
                    pictures += 1
        emit(Done(pictures=pictures, cancelled=cancel.cancelled))


def _singles(request: Draw | Edit) -> list[Draw | Edit]:
    """A request of several pictures as one for each, picture k with seed + k."""
    first = secrets.randbelow(2**31) if request.seed is None else request.seed
    return [replace(request, count=1, seed=first + k) for k in range(request.count)]
