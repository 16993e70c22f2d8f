"""Orders and visits without any page: pictures with settings, cancelling, readers that have gone, bounded visits."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

import mm
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.engine import calls
from mm.engine.events import CancelToken
from mm.engine.prompts import expand
from mm.engine.requests import Draw
from mm.ui.guard import Readers, trim
from mm.ui.orders import Orders, keep_all
from mm.ui.public import for_page, settings_for_page, without_folders
from mm.ui.visits import BusyError, Visit, Visits


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return mm.load(folder)


@pytest.fixture
def orders(engine, tmp_path: Path) -> Orders:
    return Orders(engine, tmp_path)


def idle(orders: Orders) -> None:
    """Waits until nothing runs."""
    end = time.monotonic() + 300
    while orders.active and time.monotonic() < end:
        time.sleep(0.01)
    assert not orders.active


@pytest.mark.parametrize("count", [1, 3, 8])
def test_pictures_are_those_of_the_engine_and_carry_their_settings(orders: Orders, count: int) -> None:
    """Picture k has seed + k, and is what Python's `engine.draw` gives for that seed."""
    request = Draw(prompt="a red cat", seed=5, count=count, steps=2)
    last = list(orders.run(request, CancelToken()))[-1]
    assert (last.state, len(last.kept)) == ("done", count)
    assert [read_settings(file)["seed"] for file in last.files] == [5 + k for k in range(count)]
    for file, wanted in zip(last.files, orders.engine.draw("a red cat", seed=5, count=count, steps=2), strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(wanted))


def test_a_cancel_stops_within_a_step_and_keeps_what_is_finished(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second picture waits in its first step until the cancel is reported."""
    token, begun, stopping, steps = CancelToken(), threading.Event(), threading.Event(), []
    real = calls.draw

    def held(*arguments, on_step, **options):
        def step(number, latents):
            on_step(number, latents)
            steps.append(number)
            if len(steps) == 5:
                begun.set()
                assert stopping.wait(300)

        return real(*arguments, on_step=step, **options)

    monkeypatch.setattr(calls, "draw", held)
    states = []
    for now in orders.run(Draw(prompt="a cat", seed=1, count=5, steps=4), token):
        states.append(now.state)
        if len(now.kept) == 1:
            assert begun.wait(300)
            token.cancel()
        if now.state == "stopping":
            stopping.set()
    assert (now.state, len(now.kept)) == ("cancelled", 1)
    assert set(states[states.index("stopping") :]) == {"stopping", "cancelled"}
    assert steps == [0, 1, 2, 3, 0]
    assert len(list(orders.folder.iterdir())) == 1


def test_an_order_that_nobody_reads_is_stopped(orders: Orders) -> None:
    there = [True]
    run = orders.run(Draw(prompt="a cat", seed=1, count=200, steps=20), CancelToken(), reads=lambda: there[0])
    next(run)
    next(run)
    there[0] = False
    assert list(run) == []
    idle(orders)


def test_a_waiting_order_can_be_cancelled_before_its_turn(orders: Orders) -> None:
    """Another run holds the model; the cancelled order answers at once."""
    token = CancelToken()
    with orders.engine._turn:
        run = orders.run(Draw(prompt="a cat", seed=1, steps=1), token)
        assert next(run).state == "waiting"
        token.cancel()
        assert [now.state for now in run if now.state != "stopping"] == ["cancelled"]
    idle(orders)


def test_a_small_order_waits_for_one_picture_of_a_large_one(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small order comes while the large one draws its first or second picture, and is drawn before the next."""
    prompts, lock, real = [], orders.engine._turn, calls.draw

    def noted(view, arguments, *rest, **options):
        prompts.append(arguments["prompt"])
        end = time.monotonic() + 300
        while len(prompts) == 2 and not lock._waiting and time.monotonic() < end:
            time.sleep(0.005)
        return real(view, arguments, *rest, **options)

    monkeypatch.setattr(calls, "draw", noted)
    large = orders.run(Draw(prompt="a dog", seed=1, count=4, steps=1), CancelToken())
    while next(large).state == "waiting":
        pass
    small = list(orders.run(Draw(prompt="a cat", seed=1, steps=1), CancelToken()))[-1]
    assert (small.state, list(large)[-1].state) == ("done", "done")
    assert prompts.index("a cat") in (1, 2) and sorted(prompts) == ["a cat", *["a dog"] * 4]


def test_too_many_orders_are_refused(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.ui.orders.MAX_ORDERS", 1)
    with orders.engine._turn:  # another run holds the model
        run = orders.run(Draw(prompt="a cat", seed=1, steps=1), CancelToken())
        next(run)
        with pytest.raises(UserError, match="running or waiting"):
            next(orders.run(Draw(prompt="a cat"), CancelToken()))
        run.close()
    idle(orders)
    assert list(orders.run(Draw(prompt="a cat", steps=1), CancelToken()))[-1].state == "done"


def test_wildcards_are_chosen_as_the_command_does(orders: Orders) -> None:
    last = list(orders.run(Draw(prompt="a {cat|dog|owl|fox}", seed=3, count=6, steps=1), CancelToken()))[-1]
    prompts = [kept.settings["prompt"] for kept in last.kept]
    assert prompts == [expand("a {cat|dog|owl|fox}", 3 + k) for k in range(6)] and len(set(prompts)) > 1


def test_folders_of_the_server_are_not_shown(orders: Orders) -> None:
    view = for_page(orders.engine)
    assert "/" not in view.name and view.capabilities.model == view.name and view._turn is orders.engine._turn
    assert without_folders("4-bit weights from /home/me/.cache/mm/a-4.b: 3 of 3") == "4-bit weights from a-4.b: 3 of 3"
    assert without_folders("see https://a.example/b/c and 16/32 GiB") == "see https://a.example/b/c and 16/32 GiB"
    assert settings_for_page({"adapters": [{"file": "/x/y/z.safetensors", "scale": 1}]})["adapters"] == [
        {"file": "z.safetensors", "scale": 1}
    ]


def test_warnings_come_once_and_errors_are_raised(orders: Orders) -> None:
    last = list(orders.run(Draw(prompt="a red tigr", steps=1, count=2), CancelToken()))[-1]
    assert [("tiger" in notice) for notice in last.notices] == [True]
    with pytest.raises(UserError, match="mode is 'magic'"):
        list(orders.run(Draw(prompt="a cat", mode="magic"), CancelToken()))


def test_a_visit_has_one_order_at_a_time() -> None:
    visit = Visit("a")
    token = visit.begin()
    with pytest.raises(BusyError, match="still running"):
        visit.begin()
    assert visit.cancel() and token.cancelled
    visit.end(token)
    assert not visit.cancel()
    visit.end(visit.begin())


def test_history_is_bounded_and_goes_with_its_visit(
    orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm.ui.visits.MAX_HISTORY", 2)
    visit = Visits().open("")
    last = list(orders.run(Draw(prompt="a cat", seed=1, count=3, steps=1), CancelToken()))[-1]
    assert keep_all(visit, last, 0) == 3
    assert [kept.settings["seed"] for kept in visit.history] == [3, 2]
    assert len(list(tmp_path.iterdir())) == 2
    visit.forget()
    assert not list(tmp_path.iterdir()) and not visit.history


def test_visits_are_found_by_name_and_old_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.ui.visits.MAX_VISITS", 3)
    now = [0.0]
    visits = Visits(lambda: now[0])
    first = visits.open("")
    assert visits.open(first.name) is first
    for strange in ("no-such-visit", None, 7, ["x"]):
        assert visits.open(strange) is not first
    assert len(visits) == 3  # the first one was used longest ago
    assert visits.open(first.name) is not first
    busy = visits.open("")
    token = busy.begin()
    now[0] = 1e6
    alone = visits.open("")
    assert len(visits) == 2 and visits.open(busy.name) is busy and visits.open(alone.name) is alone
    busy.end(token)


def test_readers_are_counted() -> None:
    now = [0.0]
    readers = Readers(lambda: now[0])
    reads = readers.watch("session", None)
    assert reads()
    now[0] = 100.0
    assert not reads()  # nobody ever came
    reads = readers.watch("session", "event")
    readers.enter("event")
    readers.enter("event")
    readers.leave("event")
    now[0] = 500.0
    assert reads()
    readers.leave("event")
    assert not reads()  # at once


def test_the_oldest_files_go_when_the_folder_is_full(tmp_path: Path) -> None:
    import os

    for k in range(4):
        (tmp_path / str(k)).mkdir()
        file = tmp_path / str(k) / "f"
        file.write_bytes(bytes(100))
        os.utime(file, (k, k))
    trim(tmp_path, 400)
    assert len(list(tmp_path.rglob("f"))) == 4
    trim(tmp_path, 399)
    assert sorted(p.parent.name for p in tmp_path.rglob("f")) == ["3"]
