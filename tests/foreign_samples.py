"""Settings as other programs write them into PNG files."""

from __future__ import annotations

import json

A1111 = """masterpiece, a girl reading under a tree, <lora:cozy_v2:0.8>
soft light
Negative prompt: (worst quality:1.4), blurry,
extra fingers
Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 3141592653, Size: 512x768, Model hash: 6ce0161689, \
Model: dreamy_v5, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000.safetensors, Denoising strength: 0.45, Clip skip: 2, \
ControlNet 0: "Module: canny, Model: control_v11p_sd15_canny [d14c016b], Weight: 1, Seed: 5, Steps: 3", \
Hires upscale: 2, Lora hashes: "cozy_v2: 1a2b3c4d5e6f, detail: 99aa", \
TI hashes: "easyneg: c74b4e810b03", Version: v1.10.1"""

FORGE = """a lighthouse at dusk, oil painting
Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 42, Size: 896x1152, \
Model hash: c161224931, Model: flux1-dev-bnb-nf4-v2, Hires prompt: "a lighthouse, \\"the old one\\", 4k", \
Version: f2.0.1v1.10.1-previous-659, Module 1: ae, Module 2: t5xxl_fp16"""

COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 18446744073709551615, "steps": 25, "cfg": 7.5, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1.0, "model": ["10", 0], "positive": ["12", 0], "negative": ["12", 1], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd_xl_base_1.0.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 768, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["14", 0], "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["10", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.7, "model": ["4", 0], "clip": ["4", 1]},
    },
    "12": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"strength": 0.9, "positive": ["6", 0], "negative": ["7", 0], "image": ["13", 0]},
    },
    "13": {"class_type": "LoadImage", "inputs": {"image": "edge.png"}, "is_changed": [float("nan")]},
    "14": {"class_type": "PrimitiveString", "inputs": {"value": "a glass bottle landscape"}},
}  # fmt: skip

COMFY_FLUX = {
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a fennec fox in snow", "clip": ["11", 0]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["10", 0]}},
    "12": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}},
    "13": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["25", 0], "guider": ["22", 0], "sampler": ["16", 0], "sigmas": ["17", 0],
            "latent_image": ["27", 0],
        },
    },
    "16": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "17": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 20, "model": ["12", 0]}},
    "22": {"class_type": "BasicGuider", "inputs": {"model": ["12", 0], "conditioning": ["26", 0]}},
    "25": {"class_type": "RandomNoise", "inputs": {"noise_seed": 219670278747233}},
    "26": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
    "27": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 1024, "height": 1024, "batch_size": 1}},
}  # fmt: skip

WORKFLOW = {
    "last_node_id": 9,
    "nodes": [
        {
            "id": 3, "type": "KSampler", "widgets_values": [156680208700286, "randomize", 20, 8, "euler", "normal", 1],
            "inputs": [
                {"name": "model", "type": "MODEL", "link": 1}, {"name": "positive", "type": "CONDITIONING", "link": 4},
                {"name": "negative", "type": "CONDITIONING", "link": 6}, {"name": "latent_image", "link": 2},
            ],
        },
        {"id": 4, "type": "CheckpointLoaderSimple", "widgets_values": ["v1-5-pruned-emaonly.ckpt"]},
        {"id": 5, "type": "EmptyLatentImage", "widgets_values": [512, 512, 1]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["purple galaxy bottle"], "inputs": []},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["watermark"], "inputs": [{"name": "clip"}]},
        {"id": 9, "type": "SaveImage", "widgets_values": ["ComfyUI"], "inputs": [{"name": "images", "link": 9}]},
        {"id": 8, "type": "VAEDecode", "inputs": [{"name": "samples", "link": 7}]},
    ],
    "links": [
        [1, 4, 0, 3, 0, "MODEL"], [2, 5, 0, 3, 3, "LATENT"], [4, 6, 0, 3, 1, "CONDITIONING"],
        [6, 7, 0, 3, 2, "CONDITIONING"], [7, 3, 0, 8, 0, "LATENT"], [9, 8, 0, 9, 0, "IMAGE"],
    ],
    "version": 0.4,
}  # fmt: skip

INVOKE = {
    "generation_mode": "txt2img",
    "positive_prompt": "an owl, ink drawing",
    "negative_prompt": "",
    "width": 832,
    "height": 1216,
    "seed": 2713842690,
    "rand_device": "cpu",
    "cfg_scale": 7.5,
    "steps": 30,
    "scheduler": "dpmpp_2m_k",
    "clip_skip": 0,
    "model": {"key": "f2e1", "hash": "blake3:ab", "name": "Juggernaut XL v9", "base": "sdxl", "type": "main"},
    "loras": [],
    "app_version": "5.4.2",
}

INVOKE_OLD = {
    "model": "stable diffusion",
    "model_weights": "stable-diffusion-1.5",
    "image": {
        "prompt": [{"prompt": "a tree [dead]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5, "seed": 1234,
        "sampler": "k_lms", "width": 512, "height": 512, "type": "txt2img",
    },
}  # fmt: skip

SWARM = {
    "sui_image_params": {
        "prompt": "a man mid-sprint, <lora:speed>",
        "negativeprompt": "",
        "model": "Flux/flux1-dev-fp8",
        "seed": 123998,
        "steps": 25,
        "cfgscale": 0.8,
        "aspectratio": "Custom",
        "width": 512,
        "height": 768,
        "sampler": "euler",
        "scheduler": "simple",
        "swarm_version": "0.9.1.1",
    },
    "sui_extra_data": {"date": "2024-08-09", "generation_time": "4.16 (prep) and 57.61 (gen) seconds"},
}

# The text chunks of one file each
SAMPLES = (
    {"parameters": A1111},
    {"parameters": FORGE},
    {"prompt": json.dumps(COMFY), "workflow": json.dumps(WORKFLOW)},
    {"prompt": json.dumps(COMFY_FLUX)},
    {"workflow": json.dumps(WORKFLOW)},
    {"invokeai_metadata": json.dumps(INVOKE)},
    {"sd-metadata": json.dumps(INVOKE_OLD)},
    {"parameters": json.dumps(SWARM)},
)
