"""open_clip's own tools load and use the understanding encoder by name, after `import mm`."""

from __future__ import annotations

import random
import subprocess
import sys

import open_clip
import torch
from PIL import Image

from mm.core.paths import weights_dir
from mm.models.understanding_encoder import UnderstandingEncoder
from mm.world.captions import caption
from mm.world.render import render
from mm.world.scene import sample_scene


def test_open_clip_finds_pictures_by_their_captions_with_our_weights():
    model, _, transform = open_clip.create_model_and_transforms("mm-tiny-vit", pretrained="mm")
    tokenizer = open_clip.get_tokenizer("mm-tiny-vit")
    rng = random.Random(4)
    scenes = [sample_scene(rng, held_out=True) for _ in range(32)]
    pixels = render(scenes)
    pictures = torch.stack([transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels])
    ours = UnderstandingEncoder.from_pretrained(weights_dir() / "mm-tiny" / "understanding_encoder").float().eval()
    model.eval()
    with torch.no_grad():
        vectors = model.encode_image(pictures)
        assert torch.allclose(vectors, ours(pixels / 127.5 - 1)[0], atol=1e-4)
        ids = tokenizer([caption(scene, rng) for scene in scenes])
        assert torch.allclose(model.encode_text(ids), ours.encode_text(ids), atol=1e-4)
        words = model.encode_text(ids, normalize=True)
        best = (torch.nn.functional.normalize(vectors, dim=-1) @ words.T).argmax(1)
    assert (best == torch.arange(32)).float().mean() > 0.6  # chance: 0.03


def test_it_is_there_however_the_two_are_imported():
    orders = ["import mm, open_clip"]
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, timeout=120).returncode == 0:
        orders.append("import open_clip, mm")  # a torchvision that does not fit torch needs mm first
    for order in orders:
        tags = "open_clip.list_pretrained_tags_by_model('mm-tiny-vit')"
        code = f"{order}; print('mm-tiny-vit' in open_clip.list_models(), {tags})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "True ['mm']", done.stderr
