"""`Engine`: a loaded model that takes requests and yields events.

Design choices
- `run` is a generator: a worker thread draws, the caller reads events. A caller that stops reading cancels the run.
- Runs share the model. They take turns call by call (`FairLock`), so a small order waits for one batch of a large one.
- Nothing of a run is kept on the pipeline: each call gets a view with a scheduler of its own.
"""

from __future__ import annotations

import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mm.core.errors import UserError
from mm.engine import calls
from mm.engine.capabilities import Capabilities, task_of
from mm.engine.events import CancelToken, Done, Event, Notice, Picture, Preview, Step, Words
from mm.engine.requests import Describe, Draw, Edit, Request, Turn
from mm.engine.serial import FairLock
from mm.engine.settings import settings_of
from mm.engine.views import view_of

Emit = Callable[[Event], None]
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
    ) -> None:
        self.pipeline = pipeline
        self.capabilities = capabilities
        self.name = name
        self.notes = notes
        self._pipeline_for = pipeline_for
        self._preview = preview
        self._facts = facts or {}
        self._turn = FairLock()

    def run(self, request: Request, cancel: CancelToken | None = None, *, previews: bool = False) -> Iterator[Event]:
        """Does what a request asks for.

        Args:
            request: what to do; checked against the capabilities before this returns its first event.
            cancel: stops the run within one step; finished pictures are kept.
            previews: whether `Preview` events come after steps, where the family has a map from latents to colours.

        Yields:
            Events in order; the last one is `Done`.

        Raises:
            UserError: for a request that this model cannot do.
        """
        self.capabilities.check(request)
        token = cancel or CancelToken()
        return self._events(lambda emit: self._work(request, token, emit, previews), token)

    def draw(self, prompt: str, **settings: Any) -> list[Any]:
        """The pictures of `Draw(prompt=prompt, **settings)` as PIL images, in order."""
        return [event.picture for event in self.run(Draw(prompt=prompt, **settings)) if isinstance(event, Picture)]

    def describe(self, image: Any, question: str | None = None) -> str:
        """The answer to a question about a picture, or its description."""
        events = self.run(Describe(image=image, question=question))
        return "".join(event.text for event in events if isinstance(event, Words))

    def converse(self) -> Any:
        """Begins a conversation, for `Turn` requests.

        Raises:
            UserError: where the model cannot converse.
        """
        if "converse" not in self.capabilities.tasks:
            raise UserError(f"{self.name} cannot converse; it can: {', '.join(self.capabilities.tasks)}")
        return self._pipeline_for("converse").start()

    def _events(self, work: Callable[[Emit], None], token: CancelToken) -> Iterator[Event]:
        """Runs `work` in a thread and yields what it emits; its exception is raised here."""
        events: queue.SimpleQueue[Event | BaseException | None] = queue.SimpleQueue()

        def body() -> None:
            try:
                work(events.put)
            except BaseException as error:
                events.put(error)
            finally:
                events.put(None)

        thread = threading.Thread(target=body, name="mm-run", daemon=True)
        thread.start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            token.cancel() if thread.is_alive() else None
            thread.join()

    def _work(self, request: Request, cancel: CancelToken, emit: Emit, previews: bool) -> None:
        notices = _Notices(emit)
        if isinstance(request, Describe):
            with self._turn, notices:
                reader = self._pipeline_for("describe")
                image, question = request.image, request.question
                answers = reader.describe([image]) if question is None else reader.answer([image], [question])
                emit(Words(text=answers[0]))
            emit(Done(pictures=0))
        elif isinstance(request, Turn):
            self._converse(request, cancel, emit, notices)
        else:
            self._draw(request, cancel, emit, notices, previews)

    def _draw(self, request: Draw | Edit, cancel: CancelToken, emit: Emit, notices: _Notices, previews: bool) -> None:
        """Pictures in batches; other runs may take their turns between them."""
        pipe = self._pipeline_for(task_of(request))
        first = secrets.randbelow(2**31) if request.seed is None else request.seed
        finished = 0
        while finished < request.count and not cancel.cancelled:
            seeds = [first + k for k in range(finished, min(request.count, finished + request.batch_size))]
            try:
                with self._turn, notices:
                    made = self._call(pipe, request, seeds, finished, cancel, emit, previews)
            except calls.RunCancelledError:
                break
            for k, image in enumerate(made):
                settings = settings_of(request, self.capabilities, self.name, seeds[k], image) | self._facts
                emit(Picture(index=finished + k, seed=seeds[k], picture=image, settings=settings))
            finished += len(made)
        emit(Done(pictures=finished, cancelled=finished < request.count))

    def _call(
        self, pipe: Any, request: Draw | Edit, seeds: list[int], first: int, cancel: CancelToken, emit: Emit,
        previews: bool,
    ) -> list[Any]:  # fmt: skip
        if cancel.cancelled:  # while this run waited for its turn
            raise calls.RunCancelledError
        can, steps = self.capabilities, self.capabilities.steps_of(request)
        size = request.size if isinstance(request, Draw) and request.size else can.size

        def on_step(step: int, latents: Any) -> None:
            emit(Step(step=step + 1, steps=steps or step + 1, first=first, count=len(seeds)))
            if previews and self._preview is not None and latents is not None:
                for k, image in enumerate(self._preview(latents, size)[: len(seeds)]):
                    emit(Preview(index=first + k, picture=image))

        arguments = _arguments(request, can)
        return calls.draw(
            view_of(pipe, request.scheduler), arguments, seeds, steps=steps, cancel=cancel, on_step=on_step
        )

    def _converse(self, request: Turn, cancel: CancelToken, emit: Emit, notices: _Notices) -> None:
        """A turn: words and pictures as the pipeline gives them."""
        pipe, pictures, line = self._pipeline_for("converse"), 0, ""
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        steps = self.capabilities.steps_of(request)
        options = {} if steps is None else {"steps": steps}
        with self._turn, notices:
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
                    used = seed + request.conversation.pictures - 1
                    settings = settings_of(request, self.capabilities, self.name, used, event.picture)
                    emit(Picture(index=pictures, seed=used, picture=event.picture, settings=settings | self._facts))
                    pictures += 1
        emit(Done(pictures=pictures, cancelled=cancel.cancelled))


def _arguments(request: Draw | Edit, can: Capabilities) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call for a request."""
    given: dict[str, Any] = dict(request.options)
    if can.modes:
        given["mode"] = can.mode(request)
    if can.guidance_name:
        given[can.guidance_name] = can.guidance_of(request)
    if isinstance(request, Draw):
        given |= {"prompt": request.prompt, "negative_prompt": request.negative, "image": request.image}
        given |= {"mask_image": request.mask, "strength": request.strength}
        if request.size is not None:
            given |= {"width": request.size[0], "height": request.size[1]}
    else:
        given |= {"image": request.image, "prompt": request.instruction, "negative_prompt": request.negative}
        given |= {"mask_image": request.mask, "image_guidance_scale": request.image_guidance}
    return given


class _Notices:
    """Turns warnings of a run into events, each text once a run. Entered while the run has its turn."""

    def __init__(self, emit: Emit) -> None:
        self.emit, self.seen = emit, set[str]()

    def __enter__(self) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.log = self.caught.__enter__()
        warnings.simplefilter("always", UserWarning)

    def __exit__(self, *error: Any) -> None:
        self.caught.__exit__(*error)
        for text in dict.fromkeys(str(w.message) for w in self.log or () if issubclass(w.category, UserWarning)):
            if text not in self.seen:
                self.seen.add(text)
                self.emit(Notice(text=text))
