"""Mutations of files by their structure, and of bytes, for `fuzzing.py`: settings, safetensors, PNG."""

from __future__ import annotations

import json
import random
import struct
import zlib
from typing import Any

_ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64 - 1, 10**6, 10**9, 10**18, 10**39, 0.5, -0.0, 1e308, 1e-300, "",
    "x", "64", "../../etc/passwd", "\x00", "a\nb", "\x1b[31m", "é" * 40, "\ud800", "A" * 5000, [], {}, [1], ["x"],
    [[]], [1, 2, 3], [-1, -1], {"a": 1}, {"": {}}, [0] * 300,
)  # fmt: skip
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U64", "XX", "")
_TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, '{"a":1,"a":2}', "\\", "]")


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
