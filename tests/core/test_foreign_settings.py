"""Settings of other programs' PNG files: texts as those programs write them, and hostile ones."""

from __future__ import annotations

import json
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from foreign_samples import A1111, COMFY, COMFY_FLUX, FORGE, INVOKE, INVOKE_OLD, SWARM, WORKFLOW
from PIL import Image, PngImagePlugin

from mm.core.errors import UserError
from mm.core.png_chunks import MAX_TEXT, SIGNATURE
from mm.core.png_settings import from_a1111, read_settings, to_a1111


def _png(path: Path, **texts: str) -> Path:
    chunks = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        chunks.add_itxt(key, text)
    Image.new("RGB", (8, 8)).save(path, "PNG", pnginfo=chunks)
    return path


def _without_other(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "other"}


# ---- A1111 and Forge -------------------------------------------------------------------------------------------------


def test_a1111_with_quoted_values() -> None:
    found = from_a1111(A1111)
    assert _without_other(found) == {
        "prompt": "masterpiece, a girl reading under a tree, <lora:cozy_v2:0.8>\nsoft light",
        "negative_prompt": "(worst quality:1.4), blurry,\nextra fingers",
        "steps": 28,
        "sampler": "DPM++ 2M Karras",
        "guidance": 6.5,
        "seed": 3141592653,
        "width": 512,
        "height": 768,
        "model": "dreamy_v5",
    }
    other = found["other"]
    assert other["ControlNet 0"].startswith("Module: canny, Model: control_v11p_sd15_canny [d14c016b]")
    assert other["Lora hashes"] == "cozy_v2: 1a2b3c4d5e6f, detail: 99aa" and other["Clip skip"] == "2"
    assert len(other) == 10 and other["Version"] == "v1.10.1"


def test_forge_with_a_quoted_prompt() -> None:
    found = from_a1111(FORGE)
    assert (found["guidance"], found["scheduler"], found["model"]) == (1, "Simple", "flux1-dev-bnb-nf4-v2")
    assert found["other"]["Hires prompt"] == 'a lighthouse, "the old one", 4k'
    assert found["other"]["Distilled CFG Scale"] == "3.5" and found["other"]["Module 2"] == "t5xxl_fp16"


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        ("Steps: 20, Seed: 1", "", None),  # both prompts empty: A1111 strips the text
        ("\nSteps: 20, Seed: 1", "", None),
        ("Negative prompt: blurry\nSteps: 20, Seed: 1", "", "blurry"),
        ("a dog\nNegative prompt: \nSteps: 20", "a dog", ""),
        ("a dog\nNegative prompt: blurry\nNegative prompt: dull\nSteps: 20", "a dog", "blurry\nNegative prompt: dull"),
        ("a Negative prompt: of mine\nSteps: 20", "a Negative prompt: of mine", None),
        ("just words: and a colon", "just words: and a colon", None),
        ("a dog\r\nNegative prompt: x\r\nSteps: 20\r\n", "a dog", "x"),
    ],
)
def test_prompts_stay_what_they_are(text: str, prompt: str, negative: str | None) -> None:
    found = from_a1111(text)
    assert (found["prompt"], found.get("negative_prompt")) == (prompt, negative)
    assert found.get("steps") == (20 if "Steps" in text else None)


def test_a_line_without_steps_needs_three_pairs() -> None:
    assert from_a1111("a dog\nSampler: Euler, Seed: 4, Size: 8x8")["seed"] == 4
    assert from_a1111("a dog\nwith: a, cat: b") == {"prompt": "a dog\nwith: a, cat: b"}


def test_values_with_commas_come_back_from_our_own_text() -> None:
    settings = {"prompt": "a, b: c", "steps": 3, "seed": 4, "model": 'one, "two": three', "negative_prompt": "dull"}
    assert from_a1111(to_a1111(settings)) == settings


def test_json_values_and_loose_pieces_are_kept() -> None:
    found = from_a1111('a\nSteps: 2, Civitai resources: [{"type":"lora","weight":1}], Note: one, two, Seed: 3')
    assert found["other"] == {"Civitai resources": [{"type": "lora", "weight": 1}], "Note": "one, two"}
    assert found["seed"] == 3


def test_numbers_that_are_none_are_kept_as_text() -> None:
    found = from_a1111("a\nSteps: 2, CFG scale: inf, Seed: 1_000, Size: 0x8, Model: ")
    assert found["other"] == {"CFG scale": "inf", "Seed": "1_000", "Size": "0x8", "Model": ""}


@pytest.mark.parametrize(
    "piece", ["A" * 10, "A ", "Aa: ", 'A: "', "A: [", 'A: ["\\", ', 'A: "\\", ', "A: {", "A, ", "\n", "A: [[1,", ": "]
)
def test_reading_a_long_text_takes_no_time(piece: str) -> None:
    start = time.perf_counter()
    from_a1111("a dog\nSteps: 2, " + piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 5


# ---- graphs and JSON -------------------------------------------------------------------------------------------------


def test_comfyui(tmp_path: Path) -> None:
    found = read_settings(_png(tmp_path / "a.png", prompt=json.dumps(COMFY), workflow="{}"))
    assert found == {
        "seed": 2**64 - 1,
        "steps": 25,
        "guidance": 7.5,
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "prompt": "a glass bottle landscape",
        "negative_prompt": "text, watermark",
        "model": "sd_xl_base_1.0.safetensors",
        "width": 1024,
        "height": 768,
        "other": {"loras": ["ink.safetensors"]},
    }


def test_comfyui_with_a_guider(tmp_path: Path) -> None:
    assert read_settings(_png(tmp_path / "a.png", prompt=json.dumps(COMFY_FLUX))) == {
        "seed": 219670278747233,
        "steps": 20,
        "guidance": 3.5,
        "sampler": "euler",
        "scheduler": "simple",
        "prompt": "a fennec fox in snow",
        "model": "flux1-dev.safetensors",
        "width": 1024,
        "height": 1024,
    }


def test_comfyui_takes_the_sampler_nearest_to_the_output(tmp_path: Path) -> None:
    second = json.loads(json.dumps(COMFY["3"]))
    second["inputs"] |= {"seed": 7, "steps": 11, "latent_image": ["3", 0]}
    graph = COMFY | {"30": second, "8": {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0]}}}
    found = read_settings(_png(tmp_path / "a.png", prompt=json.dumps(graph)))
    assert (found["seed"], found["steps"], found["width"]) == (7, 11, 1024)


def test_comfyui_workflow_alone(tmp_path: Path) -> None:
    assert read_settings(_png(tmp_path / "a.png", workflow=json.dumps(WORKFLOW))) == {
        "seed": 156680208700286,
        "steps": 20,
        "guidance": 8,
        "sampler": "euler",
        "scheduler": "normal",
        "prompt": "purple galaxy bottle",
        "negative_prompt": "watermark",
        "model": "v1-5-pruned-emaonly.ckpt",
        "width": 512,
        "height": 512,
    }


def test_a_graph_with_circles_ends(tmp_path: Path) -> None:
    circle = {
        str(k): {"class_type": "X", "inputs": {"positive": [str((k + 1) % 9), 0], "model": ["3", 0]}} for k in range(9)
    }
    circle["0"]["inputs"] |= {"seed": ["1", 0], "text": ["0", 0]}
    assert read_settings(_png(tmp_path / "a.png", prompt=json.dumps(circle))) == {}
    with pytest.raises(UserError, match="no graph of ComfyUI with a sampler"):
        read_settings(_png(tmp_path / "a.png", prompt="{}"))


def test_a_long_chain_takes_no_time(tmp_path: Path) -> None:
    count = 40_000
    nodes = [{"text": [str(k + 1), 0], "conditioning": [str(k + 1), 0]} for k in range(count)]
    nodes += [{"positive": ["0", 0], "seed": 1}, {"text": "the end"}]
    nodes[count - 1] = {"text": "x", "conditioning": [str(count + 1), 0]}
    graph = {str(k): {"class_type": "X", "inputs": inputs} for k, inputs in enumerate(nodes)}
    start = time.perf_counter()
    assert read_settings(_png(tmp_path / "a.png", prompt=json.dumps(graph)))["prompt"] == "x\nthe end"
    assert time.perf_counter() - start < 8


def test_invokeai(tmp_path: Path) -> None:
    found = read_settings(_png(tmp_path / "a.png", invokeai_metadata=json.dumps(INVOKE)))
    assert _without_other(found) == {
        "prompt": "an owl, ink drawing",
        "negative_prompt": "",
        "width": 832,
        "height": 1216,
        "seed": 2713842690,
        "guidance": 7.5,
        "steps": 30,
        "scheduler": "dpmpp_2m_k",
        "model": "Juggernaut XL v9",
    }
    assert found["other"]["app_version"] == "5.4.2" and found["other"]["model"]["base"] == "sdxl"
    old = read_settings(_png(tmp_path / "b.png", **{"sd-metadata": json.dumps(INVOKE_OLD)}))
    assert (old["prompt"], old["seed"], old["sampler"], old["model"]) == (
        "a tree [dead]",
        1234,
        "k_lms",
        "stable-diffusion-1.5",
    )


def test_swarmui(tmp_path: Path) -> None:
    found = read_settings(_png(tmp_path / "a.png", parameters=json.dumps(SWARM, indent=2)))
    assert _without_other(found) == {
        "prompt": "a man mid-sprint, <lora:speed>",
        "negative_prompt": "",
        "model": "Flux/flux1-dev-fp8",
        "seed": 123998,
        "steps": 25,
        "guidance": 0.8,
        "width": 512,
        "height": 768,
        "sampler": "euler",
        "scheduler": "simple",
    }
    assert found["other"]["aspectratio"] == "Custom" and found["other"]["sui_extra_data"]["date"] == "2024-08-09"
    with pytest.raises(UserError, match=r"parameters: sui_image_params is missing"):
        read_settings(_png(tmp_path / "b.png", parameters='{"fooocus": 1}'))


# ---- hostile files ---------------------------------------------------------------------------------------------------


def _chunk(kind: bytes, data: bytes, check: int | None = None) -> bytes:
    number = zlib.crc32(kind + data) if check is None else check
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", number)


_END = _chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("chunks", "why"),
    [
        (_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"A" * (MAX_TEXT + 1))) + _END, "bytes of text"),
        (_chunk(b"tEXt", b"parameters\0" + b"A" * (MAX_TEXT + 1)) + _END, "bytes of text"),
        (_chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"A" * (MAX_TEXT + 1))) + _END, "bytes of text"),
        (2 * _chunk(b"tEXt", b"parameters\0" + b"A" * (MAX_TEXT // 2 + 1)) + _END, "bytes of text"),
        (_chunk(b"zTXt", b"parameters\0\0no zlib") + _END, "compressed text is damaged"),
        (_chunk(b"tEXt", b"parameters\0a", check=1) + _END, "wrong checksum"),
        (_chunk(b"tEXt", b"parameters") + _END, "no keyword or no text"),
        (_chunk(b"iTXt", b"parameters\0\0\0") + _END, "no keyword or no text"),
        (_chunk(b"iTXt", b"parameters\0\0\0\0\0\xff") + _END, "not UTF-8"),
        (_chunk(b"tEXt", b"parameters\0a"), "ends within a chunk"),
        (struct.pack(">I", 2**31) + b"IDAT", "ends within a chunk"),
        (_chunk(b"abcd", b"") * 200_001, "more than 200000 chunks"),
    ],
    ids=range(12),
)
def test_damaged_and_oversized_text_is_refused(tmp_path: Path, chunks: bytes, why: str) -> None:
    (tmp_path / "a.png").write_bytes(SIGNATURE + chunks)
    with pytest.raises(UserError, match=why):
        read_settings(tmp_path / "a.png")


def test_a_small_file_of_compressed_text_is_read_at_once(tmp_path: Path) -> None:
    text = b"a dog\nSteps: 2, Note: " + b"A" * 1_000_000
    (tmp_path / "a.png").write_bytes(SIGNATURE + _chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text)) + _END)
    assert (tmp_path / "a.png").stat().st_size < 2000
    start = time.perf_counter()
    assert read_settings(tmp_path / "a.png")["steps"] == 2
    assert time.perf_counter() - start < 5


def test_our_own_settings_have_the_types_that_we_wrote(tmp_path: Path) -> None:
    for text, why in (
        ('{"seed": "7"}', 'seed is "7"'),
        ('{"steps": 0}', "steps is 0"),
        ('{"prompt": []}', "prompt is"),
    ):
        with pytest.raises(UserError, match=why):
            read_settings(_png(tmp_path / "a.png", mm=text))
    with pytest.raises(UserError, match="settings cannot be read"):
        read_settings(_png(tmp_path / "a.png", mm="[1]"))
