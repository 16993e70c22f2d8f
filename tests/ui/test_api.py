"""The app over HTTP: calls of programs, limits, and what hostile requests get."""

from __future__ import annotations

import io
import json
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from tiny_page import call, free_port, png, save_reader, served, upload

import mm
from mm.core.errors import UserError
from mm.core.png_settings import read_settings
from mm.engine.running import Run
from mm.ui import limits


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The address of a page of ours, its folder, and its engine."""
    root = tmp_path_factory.mktemp("app")
    engine = mm.load(save_reader(root / "model"))
    (root / "pictures").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(root / "cache"))
        with served(engine, root / "pictures") as at:
            yield at, root, engine


@pytest.fixture
def client(app):
    return Client(app[0], verbose=False)


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_api_draws_what_python_draws(app, client, count: int) -> None:
    files, about = client.predict("a red cat", seed=5, count=count, steps=2, api_name="/draw")
    assert (len(files), about["state"]) == (count, "done")
    assert [read_settings(file)["seed"] for file in files] == [5 + k for k in range(count)]
    wanted = app[2].draw("a red cat", seed=5, count=count, steps=2)
    for file, image in zip(files, wanted, strict=True):
        assert np.array_equal(pixels(file), np.asarray(image))
    assert [one["seed"] for one in about["settings"]] == [5 + k for k in range(count)]


def test_the_page_draws_what_python_draws(app) -> None:
    """The event of the page's own button, as a browser sends it."""
    at, _, engine = app
    config = httpx.get(f"{at}/config").json()
    kinds = {one["id"]: one for one in config["components"]}
    event = next(
        one for one in config["dependencies"]
        if one["queue"] is not False and any(kinds[t]["props"].get("elem_id") == "go" for t, _ in one["targets"])
    )  # fmt: skip
    values = [kinds[one]["props"].get("value") for one in event["inputs"]]
    labels = [kinds[one]["props"].get("label") for one in event["inputs"]]
    for label, value in (("Prompt", "a red cat"), ("Seed", "5"), ("Count", 3), ("Steps", 2)):
        values[labels.index(label)] = value
    body = {"data": values, "fn_index": event["id"], "session_hash": "s1", "event_data": None, "trigger_id": None}
    httpx.post(f"{at}/gradio_api/queue/join", json=body).raise_for_status()
    shown: list[str] = []
    with httpx.stream("GET", f"{at}/gradio_api/queue/data?session_hash=s1", timeout=300) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                shown.append(line)
    urls = [part.split('"')[0] for part in "".join(shown).split('"path": "' if '"path": "' in shown[0] else '"path":"')]
    files = sorted({url for url in urls if url.endswith(".png")}, key=lambda url: url.rpartition("-s")[2])
    assert len(files) == 3
    for file, image in zip(files, engine.draw("a red cat", seed=5, count=3, steps=2), strict=True):
        data = httpx.get(f"{at}/gradio_api/file={file}").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
        assert b"Seed" in data  # settings travel with the download


def test_the_steps_follow_mode_and_fast(app) -> None:
    """The page sends the field's steps always, which would else be those of a drawing in full."""
    config = httpx.get(f"{app[0]}/config").json()
    labels = {one["id"]: str(one["props"].get("label")).split(":")[0] for one in config["components"]}
    found = {
        tuple(labels[at] for at, _ in one["targets"])
        for one in config["dependencies"]
        if [labels[at] for at in one["outputs"]] == ["Steps"]
    }
    assert {("Mode",), ("Fast",)} <= found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "cat " * 6000}, "at most 2000"),
        ({"prompt": "a cat", "seed": "x"}, "seed is"),
        ({"prompt": "a cat", "seed": True}, "seed is"),
        ({"prompt": "a cat", "seed": -1}, "seed is"),
        ({"prompt": "a cat", "count": 1.5}, "count is 1.5"),
        ({"prompt": "a cat", "count": 99}, "count is 99"),
        ({"prompt": "a cat", "steps": 0}, "steps is 0"),
        ({"prompt": "a cat", "steps": 1001}, "from 1 to 1000"),
        ({"prompt": "a cat", "guidance": 101}, "from 0 to 100"),
        ({"prompt": "a cat", "guidance": "much"}, "guidance is"),
        ({"prompt": "a cat", "mode": "magic"}, "mode is"),
        ({"prompt": "a cat", "width": 512}, "size is 512 x 128"),
        ({"prompt": "a cat", "scheduler": "X"}, "scheduler is"),
        ({"prompt": ["a"]}, "prompt is"),
    ],
)
def test_wrong_values_give_one_line(client, values: dict, message: str) -> None:
    with pytest.raises(AppError, match=message) as raised:
        client.predict(**values, api_name="/draw")
    assert "\n" not in str(raised.value)


def test_limits_of_steps_and_guidance_are_those_of_the_command(client) -> None:
    files, about = client.predict("a cat", steps=51, guidance=10.5, seed=0, api_name="/draw")
    assert (len(files), about["settings"][0]["steps"], about["settings"][0]["guidance"]) == (1, 51, 10.5)


def test_calls_that_skip_the_queue_are_refused_and_others_still_draw(app) -> None:
    """24 at a time of each: a clear refusal, or the right picture."""
    at, _, engine = app
    wanted = [np.asarray(image) for image in engine.draw("a red cat", seed=0, count=24, steps=2)]

    def direct(k: int) -> httpx.Response:
        return httpx.post(f"{at}/gradio_api/run/draw", json={"data": ["a red cat", k, 1, 2]}, timeout=300)

    def queued(k: int) -> httpx.Response:
        return call(at, "draw", "a red cat", k, 1, 2)

    with ThreadPoolExecutor(48) as pool:
        refused, drawn = [pool.submit(direct, k) for k in range(24)], [pool.submit(queued, k) for k in range(24)]
    for one in refused:
        assert one.result().status_code == 404
        assert "join the queue" in one.result().text
    for k, one in enumerate(drawn):
        data = json.loads(one.result().text.rpartition("event: complete\ndata: ")[2].split("\n")[0])
        image = httpx.get(f"{at}/gradio_api/file={data[0][0]['path']}").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), wanted[k])


def test_edits_describes_and_converses(app, client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, engine = app
    (tmp_path / "in.png").write_bytes(png())
    given = handle_file(str(tmp_path / "in.png"))
    files, about = client.predict(given, "make it blue", seed=3, steps=2, api_name="/edit")
    assert read_settings(files[0]) | {"prompt": "make it blue", "seed": 3, "steps": 2} == about["settings"][0]
    (tmp_path / "mask.png").write_bytes(png(colour="white"))
    masked, _ = client.predict(
        given, "make it blue", mask=handle_file(str(tmp_path / "mask.png")), seed=3, steps=2, api_name="/edit"
    )
    assert Image.open(masked[0]).size == (128, 128)
    source = Image.open(tmp_path / "in.png")
    assert client.predict(given, "what is it?", api_name="/describe") == engine.describe(source, "what is it?")
    words, pictures, _ = client.predict("hi", api_name="/say")
    assert (words, pictures) == ("Hello! What can I draw for you?", [])
    words, pictures, about = client.predict("draw a cat", api_name="/say")
    assert len(pictures) == 1 and about["state"] == "done"
    with pytest.raises(AppError, match="message is empty"):
        client.predict(" ", api_name="/say")


def test_no_address_is_fetched_and_no_file_of_the_server_is_read(app) -> None:
    at, root, _ = app
    asked: list[str] = []
    port = free_port()
    listener = threading.Thread(target=_listen, args=(port, asked), daemon=True)
    listener.start()
    here = str(Path(__file__).with_suffix(".png"))
    (root / "secret.png").write_bytes(png())
    paths = [f"http://127.0.0.1:{port}/a.png", f"HTTP://127.0.0.1:{port}/b.png", "file:///etc/passwd", "/etc/passwd"]
    paths += [here, str(root / "secret.png"), str(root / "cache" / ".." / "secret.png"), "\0"]
    meta = {"meta": {"_type": "gradio.FileData"}}
    for path in paths:
        for given in ({"path": path}, {"path": path} | meta, path, {"path": None, "url": path} | meta):
            answer = call(at, "describe", given, None).text
            assert "event: error" in answer or "422" in answer, (given, answer)
            assert str(root) not in answer.replace(str(path), "") and "Traceback" not in answer
    assert not asked


def _listen(port: int, asked: list[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(20)
        try:
            server.accept()
            asked.append("connected")
        except TimeoutError:
            pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no picture at all", "cannot be read as a picture"),
        (png()[:40], "cannot be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as a picture"),
    ],
)
def test_a_corrupt_upload_gives_one_line_without_paths(app, data: bytes, message: str) -> None:
    at, root, _ = app
    answer = call(at, "describe", upload(at, data), None).text
    assert message in answer
    assert str(root) not in answer and "cache" not in answer and "\\n" not in answer


@pytest.mark.parametrize("side", [5_001, 10_000, 30_000])
def test_a_picture_of_too_many_pixels_is_not_decoded(app, side: int) -> None:
    at = app[0]
    head = side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    chunk = b"IHDR" + head
    bomb = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png()[33:]
    answer = call(at, "describe", upload(at, bomb), None).text
    assert "more than 25 million pixels" in answer


def test_bodies_are_limited(app) -> None:
    at = app[0]
    large = "cat " * (limits.MAX_BODY_BYTES // 4 + 1)
    for path in ("call/draw", "queue/join", "run/draw"):
        answer = httpx.post(f"{at}/gradio_api/{path}", json={"data": [large], "session_hash": "x", "fn_index": 0})
        assert answer.status_code == 413 and "KiB" in answer.text

    def parts():
        for _ in range(64):
            yield b"x" * 4096

    answer = httpx.post(f"{at}/gradio_api/call/draw", content=parts())  # no length is stated
    assert answer.status_code == 413
    big = bytes(limits.MAX_UPLOAD_BYTES + 1)
    answer = httpx.post(f"{at}/gradio_api/upload", files={"files": ("a.png", big)})
    assert answer.status_code == 413
    assert httpx.post(f"{at}/gradio_api/component_server", json={}).status_code == 404


def test_files_and_headers(app) -> None:
    at, root, _ = app
    (root / "pictures" / "own.png").write_bytes(png())
    for path in (root / "pictures" / "own.png", "/etc/passwd", __file__, root / "cache" / ".." / "model"):
        assert httpx.get(f"{at}/gradio_api/file={path}").status_code in (403, 404), path
    page = httpx.get(at)
    assert "img-src 'self' data: blob:" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert "fonts.googleapis" not in page.text and "fonts.gstatic" not in page.text


def test_an_order_is_stopped_when_its_stream_is_closed(app, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose answer nobody ever asks for, after a short while."""
    at = app[0]
    steps: list[str] = []
    ended: list[bool] = []
    inner = Run._threaded

    def counted(self):
        try:
            for event in inner(self):
                steps.extend(["step"] * (type(event).__name__ == "Step"))
                yield event
        finally:
            ended.append(True)

    def wait_for(runs: int) -> None:
        end = time.monotonic() + 300
        while len(ended) < runs and time.monotonic() < end:
            time.sleep(0.02)
        assert len(ended) == runs and len(steps) < 16 * 1000

    monkeypatch.setattr(Run, "_threaded", counted)
    begun = call(at, "draw", "a cat", 1, 16, 1000, read=False).json()["event_id"]
    with httpx.stream("GET", f"{at}/gradio_api/call/draw/{begun}", timeout=300) as stream:
        for _ in stream.iter_lines():
            if len(steps) > 3:
                break
    wait_for(1)
    monkeypatch.setattr("mm.ui.guard.UNREAD_SECONDS", 0.5)
    call(at, "draw", "a cat", 1, 16, 1000, read=False)
    wait_for(2)


def test_a_taken_port_is_an_error_with_advice(app, tmp_path: Path) -> None:
    from mm.ui.app import launch
    from mm.ui.ports import check_address

    port = int(app[0].rpartition(":")[2])
    for attempt in (
        lambda: launch(app[2], tmp_path, port=port, block=False),
        lambda: check_address("127.0.0.1", port),
    ):
        with pytest.raises(UserError, match=rf"port {port} is taken; port \d+ is free: --port"):
            attempt()
    with pytest.raises(UserError, match="no address of this machine"):
        check_address("no.such.host.invalid", 7860)
    with pytest.raises(UserError, match="no address of this machine"):
        check_address("192.0.2.1", 7860)
    check_address("127.0.0.1", free_port())


def test_an_error_of_the_code_is_not_sent(app, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """The client gets a line; the traceback, which may hold paths, stays on the server."""

    def broken(*args, **options):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(Run, "_threaded", broken)
    answer = call(app[0], "draw", "a cat").text
    assert "the model failed" in answer and "secret" not in answer
    assert "/secret/path" in capfd.readouterr().err
