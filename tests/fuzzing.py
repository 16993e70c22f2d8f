"""Mutated inputs for every reader of files from outside: what is damaged is refused with a UserError, or read whole.

Each reader has valid files made here, and a check that runs it on a mutated one. A mutation is one to three
changes, by structure where the file has one: header and settings as JSON (other types, sizes, keys, nesting), types and
shapes of tensors, values that are not finite, names; and bytes: flipped, cut off, doubled, overwritten.

A case fails where anything but a UserError comes out, a message has more than one line, it takes more than 10 seconds,
it asks for more than 1 GiB beyond what the process had, or a refused file has changed the model.

    python tests/fuzzing.py --count 10000 --json fuzz.json [--reader patch]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READERS = ("patch", "lora", "nunchaku", "folder", "png")
SECONDS = 10
MEMORY = 1 << 30
_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64 - 1, 10**6, 10**9, 10**18, 10**39, 0.5, -0.0, 1e308, 1e-300, "",
    "x", "64", "../../etc/passwd", "\x00", "a\nb", "\x1b[31m", "é" * 40, "\ud800", "A" * 5000, [], {}, [1], ["x"],
    [[]], [1, 2, 3], [-1, -1], {"a": 1}, {"": {}}, [0] * 300,
)  # fmt: skip
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U64", "XX", "")
_TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '{"a":1,"a":2}', "\\", "]")


# ---- mutations -------------------------------------------------------------------------------------------------------


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, overwritten, cut off, doubled or added."""
    out = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0 or not out:
        return bytes(out) + rng.randbytes(rng.randrange(1, 40))
    if kind == 1:
        return bytes(out[: rng.randrange(len(out))])
    start = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(200, len(out)))
    if kind == 2:
        for _ in range(rng.choice((1, 1, 4, 32))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        out[start : start + rng.randrange(1, 30)] = rng.randbytes(rng.randrange(0, 30))
    elif kind == 4:
        out[start:start] = out[start : start + rng.randrange(1, 200)]
    else:
        out[start : start + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1, len(out), len(out) - 8)))
    return bytes(out)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    found, queue = [], [value]
    while queue:
        item = queue.pop()
        keys = list(item) if isinstance(item, dict) else list(range(len(item))) if isinstance(item, list) else []
        found += [(item, key) for key in keys]
        queue += [item[key] for key in keys]
    return found


def json_changed(value: Any, rng: random.Random) -> Any:
    """One value replaced, removed, doubled, renamed, swapped or nested; the argument is changed."""
    places = _places(value)
    if not places:
        return rng.choice(_ODD)
    item, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 2:
        item[key] = rng.choice(_ODD)
    elif kind == 3:
        del item[key]
    elif kind == 4:
        other, name = rng.choice(places)
        if isinstance(other, dict | list) and (name in other if isinstance(other, dict) else name < len(other)):
            item[key] = json.loads(json.dumps(other[name], default=str))
    elif kind == 5 and isinstance(item, dict):
        item[rng.choice((str(key) + "x", str(key).upper(), "", "a.b", rng.choice([*item, "k"])))] = item.pop(key)
    elif kind == 6 and isinstance(item[key], int | float) and not isinstance(item[key], bool):
        item[key] = rng.choice((item[key] * 2, -item[key], item[key] + 1, item[key] * 1000, str(item[key])))
    else:
        for _ in range(rng.choice((1, 3, 100, 900))):
            item[key] = rng.choice(([item[key]], {"a": item[key]})) if rng.random() < 0.9 else [item[key]]
    return value


def text_changed(text: str, rng: random.Random) -> bytes:
    """A JSON text with a token put in, or bytes changed."""
    if rng.random() < 0.5 and text:
        at = rng.randrange(len(text))
        return (text[:at] + rng.choice(_TOKENS) + text[at + rng.randrange(0, 4) :]).encode("utf-8", "surrogatepass")
    return bytes_changed(text.encode("utf-8", "surrogatepass"), rng)


def dumped(value: Any, rng: random.Random) -> bytes:
    """JSON of a changed value, mostly as it is, at times with its text changed."""
    try:
        text = json.dumps(value)
    except (RecursionError, ValueError):
        text = "[" * 5000
    return text_changed(text, rng) if rng.random() < 0.15 else text.encode("utf-8", "surrogatepass")


def tensors_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its header or its data changed."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.randrange(11)
    if kind == 0 or not names:
        return bytes_changed(data, rng)
    name = rng.choice(names)
    entry = header[name]
    if kind == 1:
        header = json_changed(header, rng)
    elif kind == 2:
        entry["dtype"] = rng.choice(_TYPES)
    elif kind == 3:
        entry["shape"] = rng.choice(
            ([], [0], [1], entry["shape"][::-1], [*entry["shape"], 1], [10**9, 10**9], [-1], [2**40])
        )
    elif kind == 4:
        other = header[rng.choice(names)]
        header[name] = dict(other)
    elif kind == 5:
        start, end = entry["data_offsets"]
        header, body = _removed(header, body, name) if rng.random() < 0.7 else (header, body[:start] + body[end:])
    elif kind == 6:
        new = rng.choice(
            (name + "x", name.replace(".", "_"), name.upper(), "a" + name, name.rpartition(".")[2], "", "|")
        )
        header[new] = header.pop(name)
    elif kind == 7:  # values that are not finite, or large
        start, end = entry["data_offsets"]
        patterns = (
            b"\x00\x00\xc0\x7f",
            b"\x00\x00\x80\x7f",
            b"\xff\xff\xff\xff",
            b"\x00\x7c\x00\x7c",
            b"\x7f\x7f\x7f\x7f",
        )
        pattern = rng.choice(patterns)
        at = start + 4 * rng.randrange(max(1, (end - start) // 4))
        body = (body[:at] + pattern + body[at + 4 :])[: len(body)]
    elif kind == 8:  # another type of the same size
        same = {
            "F32": ("I32", "U32"),
            "BF16": ("F16", "I16", "U16"),
            "F16": ("BF16", "I16"),
            "I8": ("U8", "BOOL", "F8_E4M3"),
        }
        entry["dtype"] = rng.choice(same.get(entry["dtype"], ("F32", "I64", "F64")))
    elif kind == 9 and "__metadata__" in header:
        key = rng.choice(list(header["__metadata__"]))
        inside = header["__metadata__"][key]
        try:
            value: Any = json_changed(json.loads(inside), rng)
            header["__metadata__"][key] = dumped(value, rng).decode("utf-8", "replace")
        except ValueError:
            header["__metadata__"][key] = rng.choice(_ODD)
    else:
        header["__metadata__"] = rng.choice((*_ODD, {"format": 3}, {"format": "pt", "config": "["}))
    text = dumped(header, rng)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _removed(header: dict[str, Any], body: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """A whole file without one tensor: the offsets of the others are right."""
    start, end = header[name]["data_offsets"]
    size = end - start
    out = {k: x for k, x in header.items() if k != name}
    for key, entry in out.items():
        if key != "__metadata__" and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [x - size for x in entry["data_offsets"]]
    return out, body[:start] + body[end:]


def png_changed(data: bytes, rng: random.Random) -> bytes:
    """A PNG with its text chunks changed, or its bytes."""
    if rng.random() < 0.25:
        return bytes_changed(data, rng)
    at, chunks = 8, []
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    texts = [i for i, (kind, _) in enumerate(chunks) if kind == b"iTXt"]
    i = rng.choice(texts)
    key, _, rest = chunks[i][1].partition(b"\0")
    text = rest[4:]
    kind = rng.randrange(7)
    if kind <= 2 and text.startswith(b"{"):
        text = dumped(json_changed(json.loads(text), rng), rng)
    elif kind == 3:
        text = text_changed(text.decode(), rng)
    elif kind == 4:
        text += rng.choice((b', A: "', b"A, ", b"Aa: ", b"\nSteps: 1, ", b"[" * 9)) * rng.randrange(1, 30_000)
    elif kind == 5:
        key = rng.choice((b"mm", b"parameters", b"prompt", b"workflow", b"invokeai_metadata", b"sd-metadata", b""))
    else:
        text = bytes_changed(text, rng)
    made = key + b"\0\0\0\0\0" + text
    chunks[i] = (b"iTXt", made)
    if rng.random() < 0.15:
        chunks[i] = (b"zTXt", key + b"\0\0" + zlib.compress(text * rng.choice((1, 50, 3000))[:1] or text))
    if rng.random() < 0.1:
        chunks[i] = (rng.choice((b"tEXt", b"zTXt", b"abcd")), made)
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


# ---- readers ---------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A reader: `mutate` writes a damaged input, `read` runs the reader on it; `unchanged` is asked after refusals."""

    mutate: Callable[[random.Random], Any]
    read: Callable[[], Any]
    unchanged: Callable[[], bool] = field(default=lambda: True)


def _print_of(model: Any) -> tuple[Any, ...]:
    """What a model is: its layers' types and its tensors' sums."""
    kinds = tuple((name, type(part).__name__) for name, part in model.named_modules())
    sums = tuple((name, str(t.dtype), float(t.double().sum())) for name, t in model.state_dict().items())
    return kinds + sums


def _patch(folder: Path) -> Case:
    from adapter_cases import WORDS, K, five, text_encoder

    from mm.adapters.patch import Patch

    model, path = text_encoder(), folder / "a.safetensors"
    valid = []
    for patch in five():
        patch.save(path)
        valid.append(path.read_bytes())
    assert K and WORDS
    before = _print_of(model)

    def read() -> None:
        patch = Patch.load(path)
        patch.apply(model)
        patch.verify(model)
        patch.undo(model)
        if _print_of(model) != before:
            raise AssertionError("undoing left a change")

    return Case(
        mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, tensors_changed)),
        read=read,
        unchanged=lambda: _print_of(model) == before,
    )


def _lora(folder: Path) -> Case:
    import peft
    from adapter_cases import text_encoder

    from mm import read_lora

    valid = []
    for options in ({}, {"use_dora": True}, {"use_rslora": True, "alpha_pattern": {"q_proj": 3}}):
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, **options)
        peft.get_peft_model(text_encoder(), config).save_pretrained(folder / "made")
        weights, settings = (folder / "made" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
        valid.append((weights.read_bytes(), settings.read_bytes()))
    model = text_encoder()
    before = _print_of(model)
    where = folder / "adapter"
    where.mkdir()

    def mutate(rng: random.Random) -> None:
        weights, settings = rng.choice(valid)
        if rng.random() < 0.4:
            settings = _some(settings, rng, _json_file)
        else:
            weights = _some(weights, rng, tensors_changed)
        (where / "adapter_model.safetensors").write_bytes(weights)
        (where / "adapter_config.json").write_bytes(settings)

    def read() -> None:
        patch = read_lora(where, model)
        patch.apply(model)
        patch.undo(model)
        if _print_of(model) != before:
            raise AssertionError("undoing left a change")

    return Case(mutate=mutate, read=read, unchanged=lambda: _print_of(model) == before)


def _nunchaku(folder: Path) -> Case:
    from nunchaku_files import flux, published, write

    from mm.quantization.integrations.nunchaku import load_nunchaku, read_nunchaku

    path, valid = folder / "a.safetensors", []
    for version, fp4 in ((1, False), (2, True)):
        valid.append(write(path, *published(version, fp4)).read_bytes())
    model = flux()
    before = _print_of(model)
    state = {"turn": 0}

    def read() -> None:
        state["turn"] += 1
        if state["turn"] % 2:
            load_nunchaku(path)
        else:
            fresh = flux()
            fresh.load_state_dict(model.state_dict())
            state["model"] = fresh
            read_nunchaku(path, fresh)
            del state["model"]

    def unchanged() -> bool:
        fresh = state.pop("model", None)
        return fresh is None or _print_of(fresh) == before

    return Case(
        mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, tensors_changed)),
        read=read,
        unchanged=unchanged,
    )


def _folder(folder: Path) -> Case:
    from tiny import draw, tiny_pipeline

    from mm import SVDQuantConfig, TextToImagePipeline, quantize

    valid = folder / "valid"
    tiny_pipeline().save_pretrained(valid)
    small = tiny_pipeline(codes=False)
    quantize(small, SVDQuantConfig(rank=4, data_free=True), progress=False)
    small.save_pretrained(folder / "small")
    where = folder / "model"

    def mutate(rng: random.Random) -> None:
        shutil.rmtree(where, ignore_errors=True)
        shutil.copytree(rng.choice((valid, folder / "small")), where)
        files = sorted(path for path in where.rglob("*") if path.is_file())
        by_kind = [[p for p in files if p.suffix == ".json"], [p for p in files if p.suffix == ".safetensors"]]
        path = rng.choice(by_kind[rng.random() < 0.4])
        how = tensors_changed if path.suffix == ".safetensors" else _json_file
        if rng.random() < 0.04:
            path.unlink()
        else:
            path.write_bytes(_some(path.read_bytes(), rng, how))

    def read() -> None:
        pipe = TextToImagePipeline.from_pretrained(where)
        pipe.set_progress_bar_config(disable=True)
        if not draw(pipe, num_inference_steps=1).isfinite().all():
            raise AssertionError("a picture that is not finite")

    return Case(mutate=mutate, read=read)


def _png(folder: Path) -> Case:
    from foreign_samples import SAMPLES
    from PIL import Image, PngImagePlugin

    from mm.core.png_settings import drawing_settings, png_bytes, read_settings

    path, valid = folder / "a.png", []
    for texts in SAMPLES:
        chunks = PngImagePlugin.PngInfo()
        for key, text in texts.items():
            chunks.add_itxt(key, text)
        Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
        valid.append(path.read_bytes())
    settings = drawing_settings(prompt="é two cats", seed=7, steps=12, mode="flow", guidance=4.0, model="mm-tiny")
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("mm", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunks)
    valid += [path.read_bytes()]
    assert png_bytes(Image.new("RGB", (8, 8)), settings)

    def read() -> None:
        found = read_settings(path)
        if not isinstance(found, dict):
            raise AssertionError("settings that are no dict")
        json.dumps(found, allow_nan=False)

    return Case(mutate=lambda rng: path.write_bytes(_some(rng.choice(valid), rng, png_changed)), read=read)


def _json_file(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return text_changed(data.decode(), rng)
    return dumped(json_changed(json.loads(data), rng), rng)


def _some(data: bytes, rng: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
    """One change, at times two or three; what can no longer be parsed is changed by bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            data = change(data, rng)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            data = bytes_changed(data, rng)
    return data


_MAKERS = {"patch": _patch, "lora": _lora, "nunchaku": _nunchaku, "folder": _folder, "png": _png}


# ---- running ---------------------------------------------------------------------------------------------------------


class _TooSlowError(BaseException):
    pass


@dataclass
class Result:
    """What a run gave. faults: by kind, with how often and an example."""

    reader: str
    cases: int = 0
    refused: int = 0
    read: int = 0
    slowest: float = 0.0
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)


def run(reader: str, seed: int, start: int, count: int) -> Result:
    """Runs cases `start` to `start + count` in this process, under its limits of time and memory."""
    import torch

    from mm.core.errors import UserError

    torch.set_num_threads(1)
    result = Result(reader=reader)
    faults: Counter[str] = Counter()
    examples: dict[str, str] = {}
    signal.signal(signal.SIGPROF, _ring)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as quiet:
        case = _MAKERS[reader](Path(folder))
        _limit_memory()
        sink = quiet.enter_context(open("/dev/null", "w"))
        quiet.enter_context(contextlib.redirect_stderr(sink))
        quiet.enter_context(contextlib.redirect_stdout(sink))
        for k in range(start, start + count):
            case.mutate(random.Random(f"{reader} {seed} {k}"))
            fault, began = "", time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of CPU: a busy machine is no fault
                case.read()
                result.read += 1
            except UserError as error:
                result.refused += 1
                fault = _of_refusal(error, case)
            except _TooSlowError:
                fault = f"more than {SECONDS} seconds"
            except BaseException as error:  # panics of Rust are no Exceptions
                fault = _named(error)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            result.cases += 1
            result.slowest = max(result.slowest, time.process_time() - began)
            if fault:
                faults[fault] += 1
                examples.setdefault(fault, f"case {k}")
    result.faults = {name: (number, examples[name]) for name, number in faults.items()}
    return result


def _ring(*_: object) -> None:
    raise _TooSlowError


def _limit_memory() -> None:
    """At most 1 GiB of addresses beyond those of now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def _of_refusal(error: BaseException, case: Case) -> str:
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or "allocate memory" in str(cause) or "not enough memory" in str(cause):
            return "refused only when the memory was used up"
        if isinstance(cause, _TooSlowError):
            return f"more than {SECONDS} seconds"
        cause = cause.__cause__
    if "\n" in text or not text.isprintable() or len(text) > 1500:
        return f"a message that is not one line: {ascii(text)[:150]}"
    return "" if case.unchanged() else f"refused and changed: {text[:120]}"


def _named(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/mm/" in f.filename or "/pipelines/" in f.filename or "/tests/" in f.filename]
    places = [f"{Path(f.filename).name}:{f.lineno}" for f in (ours[-1:] if ours else []) + frames[-1:]]
    return f"{type(error).__name__}: {ascii(str(error))[:110]} at {' <- '.join(reversed(places))}"


def main(arguments: list[str] | None = None) -> int:
    """Runs every reader in processes of their own; 0 where there was no fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases a reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--part", type=int, default=1000, help="cases a process")
    options = parser.parse_args(arguments)
    totals = []
    for reader in options.reader or READERS:
        total = Result(reader=reader)
        for start in range(0, options.count, options.part):
            _add(total, in_process(reader, options.seed, start, min(options.part, options.count - start)))
            bad, counts = sum(n for n, _ in total.faults.values()), f"{total.refused} refused, {total.read} read"
            print(f"{reader}: {total.cases} cases, {counts}, {bad} faults, slowest {total.slowest:.1f} s", flush=True)
        for name, (number, example) in total.faults.items():
            print(f"  {number} x {name} ({example})")
        totals.append(vars(total))
    if options.json:
        from mm.core.files import write_json

        write_json(options.json, {"seed": options.seed, "readers": totals})
    return 1 if any(total["faults"] for total in totals) else 0


def in_process(reader: str, seed: int, start: int, count: int) -> Result:
    """A process may die, or hang where no signal reaches it: both are faults."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mm", "diffusers.pipelines.pipeline_utils", "transformers", "peft"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(theirs, reader, seed, start, count), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(600 + count * SECONDS / 4):
            found = ours.recv()
            return found if isinstance(found, Result) else Result(reader, count, faults={found: (1, f"from {start}")})
        return Result(reader, count, faults={"a process that hung": (1, f"cases from {start}")})
    except EOFError:
        return Result(reader, count, faults={"a process that died": (1, f"cases from {start}")})
    finally:
        process.kill()
        process.join()


def _worker(pipe: Any, reader: str, seed: int, start: int, count: int) -> None:
    try:
        pipe.send(run(reader, seed, start, count))
    except BaseException:
        pipe.send(f"the run itself failed: {traceback.format_exc()[-1500:]}")


def _add(total: Result, part: Result) -> None:
    total.cases, total.refused, total.read = (
        total.cases + part.cases,
        total.refused + part.refused,
        total.read + part.read,
    )
    total.slowest = max(total.slowest, part.slowest)
    for name, (number, example) in part.faults.items():
        total.faults[name] = (total.faults.get(name, (0, ""))[0] + number, total.faults.get(name, (0, example))[1])


if __name__ == "__main__":
    sys.exit(main())
