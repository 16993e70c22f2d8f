"""The trunk: what a token may see, caches, features of pictures, and learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_trunk import CONFIG, TOKENS, WIDTH, awake, same, some_ids, some_latents

from mm.models import layers
from mm.models.cache import PromptCache
from mm.models.trunk import Trunk


@pytest.fixture
def trunk() -> Trunk:
    torch.manual_seed(0)
    return awake(Trunk(**CONFIG))


# ---- what text sees -------------------------------------------------------------------------------------------------


def test_text_is_causal(trunk):
    ids = some_ids(2, 7)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 40
    before, after = trunk.encode_text(ids), trunk.encode_text(changed)
    for old, new in zip(before.keys + before.values, after.keys + after.values, strict=True):
        assert same(old[:, :4], new[:, :4])
        assert not same(old[:, 4], new[:, 4])
    assert same(before.keys[0][:, 5:], after.keys[0][:, 5:])  # layer 0 offers the words themselves
    assert not same(before.keys[-1][:, 5], after.keys[-1][:, 5])


def test_with_prefix_lm_a_prompt_is_bidirectional_and_a_reply_causal():
    """Whether the last layer's key of token `at` depends on token `moved`."""
    torch.manual_seed(0)
    trunk = awake(Trunk(**CONFIG, prefix_lm=True))
    bos, user, reply, end = 2, 7, 8, 9
    ids = torch.tensor([[bos, user, 20, 21, reply, 22, 23, end, user, 24, 25, reply]])

    def depends(at: int, moved: int) -> bool:
        changed = ids.clone()
        changed[:, moved] += 10
        return not same(trunk.encode_text(ids).keys[-1][:, at], trunk.encode_text(changed).keys[-1][:, at])

    assert depends(2, 3)  # earlier words of a turn attend to later ones
    assert depends(3, 2)
    assert not depends(3, 5)  # no attention to a later reply
    assert not depends(5, 6)  # a reply is causal
    assert depends(6, 5)
    assert depends(9, 10)  # the second turn likewise
    assert not depends(3, 9)  # and the first does not attend to the second
    assert depends(9, 3)


def test_with_prefix_lm_a_prompt_can_be_padded_and_continued():
    torch.manual_seed(0)
    trunk = awake(Trunk(**CONFIG, prefix_lm=True, reads=True))
    prompt = torch.tensor([[2, 20, 21, 22, 3]])
    padded = torch.cat([prompt, torch.zeros(1, 3, dtype=torch.int64)], 1)
    mask = torch.arange(8)[None] < 5
    short, long = trunk.encode_text(prompt), trunk.encode_text(padded, mask)
    for a, b in zip(short.keys + short.values, long.keys + long.values, strict=True):
        assert same(a, b[:, :5])
    turns = torch.tensor([[2, 7, 20, 21, 8, 22, 9, 7, 24, 25, 8]])
    whole = trunk.read(turns)[0]
    first, state = trunk.read(turns[:, :5])
    reply, state = trunk.read(turns[:, 5:7], past=state)
    second, _ = trunk.read(turns[:, 7:], past=state)
    assert same(whole, torch.cat([first, reply, second], 1))


def test_padding_changes_nothing(trunk):
    """Neither the prompt's own tokens nor what a picture reads of it, whatever stands in the padding."""
    ids, latents, sigma = some_ids(2, 5), some_latents(2), torch.tensor([0.3, 0.9])
    padded = torch.cat([ids, some_ids(2, 3)], 1)
    mask = torch.arange(8).expand(2, 8) < 5
    short, long = trunk.encode_text(ids), trunk.encode_text(padded, mask)
    for a, b in zip(short.keys + short.values, long.keys + long.values, strict=True):
        assert same(a, b[:, :5])
    assert long.mask_BT.tolist() == mask.tolist()
    assert same(trunk(latents, sigma, short), trunk(latents, sigma, long))


def test_text_order_matters(trunk):
    ids = torch.tensor([[1, 2, 3, 4]])
    a, b = trunk.encode_text(ids), trunk.encode_text(ids[:, [0, 2, 1, 3]])
    assert not same(a.keys[-1][:, 3], b.keys[-1][:, 3])


def test_text_neither_sees_pictures_nor_noise(trunk):
    """A cache is used for several pictures and noise levels, so nothing may write into it."""
    cache = trunk.encode_text(some_ids(1, 4))
    copies = [x.clone() for x in cache.keys + cache.values]
    trunk(some_latents(1), torch.tensor([0.7]), cache)
    trunk(some_latents(1), torch.tensor([0.0]), cache, "codes")
    assert all(torch.equal(a, b) for a, b in zip(copies, cache.keys + cache.values, strict=True))


# ---- the prompt cache -----------------------------------------------------------------------------------------------


def equal_caches(a: PromptCache, b: PromptCache) -> bool:
    return torch.equal(a.mask_BT, b.mask_BT) and all(
        torch.equal(x, y) for x, y in zip(a.keys + a.values, b.keys + b.values, strict=True)
    )


def test_a_cache_repeats_selects_and_joins(trunk):
    cache = trunk.encode_text(some_ids(3, 5))
    assert len(cache) == 3
    repeated = cache.repeat(2)
    assert len(repeated) == 6
    assert equal_caches(repeated, cache.select(torch.tensor([0, 0, 1, 1, 2, 2])))
    assert equal_caches(repeated.select(slice(0, 6, 2)), cache)
    assert equal_caches(PromptCache.cat([cache.select(slice(0, 1)), cache.select(slice(1, 3))]), cache)
    assert equal_caches(cache.pad(5), cache)


def test_joined_caches_of_other_lengths_read_the_same(trunk):
    short, long, latents = trunk.encode_text(some_ids(1, 3)), trunk.encode_text(some_ids(1, 6)), some_latents(2)
    both = PromptCache.cat([short, long])
    assert both.mask_BT.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    sigma = torch.tensor([0.4, 0.4])
    together = trunk(latents, sigma, both)
    assert same(together[:1], trunk(latents[:1], sigma[:1], short))
    assert same(together[1:], trunk(latents[1:], sigma[1:], long))


def test_padding_a_cache_never_drops_tokens(trunk):
    cache = trunk.encode_text(some_ids(1, 6))
    with pytest.raises(ValueError, match="6 tokens cannot be padded to 4"):
        cache.pad(4)


# ---- what pictures see ----------------------------------------------------------------------------------------------


def test_a_picture_has_the_same_features_in_any_batch(trunk):
    latents, sigma, cache = some_latents(8), torch.rand(8), trunk.encode_text(some_ids(8, 5))
    whole = trunk(latents, sigma, cache)
    assert whole.shape == (8, TOKENS, WIDTH)
    for i in (0, 3, 7):
        part = slice(i, i + 1)
        assert same(trunk(latents[part], sigma[part], cache.select(part)), whole[part], 2e-5)


def test_a_picture_sees_all_of_itself_its_prompt_its_noise_level_and_its_mode(trunk):
    latents, sigma, ids = some_latents(1), torch.tensor([0.5]), some_ids(1, 5)
    cache = trunk.encode_text(ids)
    features = trunk(latents, sigma, cache)
    corner = latents.clone()
    corner[..., 3, 3] += 1
    assert not same(trunk(corner, sigma, cache)[:, 0], features[:, 0])
    assert not same(trunk(latents, sigma + 0.1, cache), features)
    assert not same(trunk(latents, sigma, cache, "codes"), features)
    for t in range(5):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 40
        assert not same(trunk(latents, sigma, trunk.encode_text(changed)), features)


def test_constant_sigma_per_token_equals_one_per_picture(trunk):
    latents, cache, sigma = some_latents(2), trunk.encode_text(some_ids(2, 3)), torch.tensor([0.2, 0.8])
    assert same(trunk(latents, sigma[:, None].expand(2, TOKENS), cache), trunk(latents, sigma, cache))


def test_sigma_per_token_reaches_that_token(trunk):
    """Without attention a token's noise level changes that token alone."""
    for layer in trunk.picture_layers:
        layers.zero(layer.attn.to_out)
    latents, cache, sigma = some_latents(1), trunk.encode_text(some_ids(1, 3)), torch.full((1, TOKENS), 0.5)
    changed = sigma.clone()
    changed[0, 5] = 0.1
    moved = (trunk(latents, changed, cache) - trunk(latents, sigma, cache)).abs().amax((0, 2)) > 1e-4
    assert moved.nonzero().flatten().tolist() == [5]


def test_masked_tokens_hide_their_latents_only(trunk):
    latents, cache = some_latents(1), trunk.encode_text(some_ids(1, 3))
    masked = torch.rand(1, TOKENS) < 0.5
    masked[0, :2] = torch.tensor([True, False])
    sigma = masked.float()
    features = trunk(latents, sigma, cache, "codes", masked)
    junk = torch.where(masked.view(1, 1, 4, 4), torch.randn_like(latents) * 100, latents)
    assert torch.equal(trunk(junk, sigma, cache, "codes", masked), features)
    known = torch.where(masked.view(1, 1, 4, 4), latents, latents + 1)
    assert not same(trunk(known, sigma, cache, "codes", masked), features)
    places = features[0, masked[0]]
    assert not same(places[0], places[1])  # masked tokens still know where they are


def test_hidden_layers_for_alignment(trunk):
    latents, cache, sigma = some_latents(2), trunk.encode_text(some_ids(2, 3)), torch.tensor([0.2, 0.8])
    features, hidden = trunk(latents, sigma, cache, hidden_layer=2)
    assert same(features, trunk(latents, sigma, cache))
    assert same(trunk.norm_out(hidden), features)  # layer 2 is the last of three
    _, first = trunk(latents, sigma, cache, hidden_layer=0)
    assert first.shape == hidden.shape and not same(first, hidden)


# ---- training -------------------------------------------------------------------------------------------------------


def test_layers_start_as_the_identity():
    torch.manual_seed(0)
    fresh = Trunk(**CONFIG)
    cache = fresh.encode_text(some_ids(1, 3))
    features, first = fresh(some_latents(1), torch.tensor([0.5]), cache, hidden_layer=0)
    assert torch.equal(fresh.norm_out(first), features)


def gradients(trunk: Trunk) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    trunk.zero_grad()
    cache = trunk.encode_text(some_ids(2, 4))
    trunk(some_latents(2), torch.rand(2), cache, "codes", torch.rand(2, TOKENS) < 0.5).square().sum().backward()
    return {name: p.grad for name, p in trunk.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(trunk):
    trunk.train()
    plain = gradients(trunk)
    trunk.enable_gradient_checkpointing()
    checkpointed = gradients(trunk)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


def test_every_part_learns_but_the_last_text_layers_tail(trunk):
    """Pictures read layer i's text before layer i runs, so what the last text layer writes is read by nobody yet."""
    learned = {name for name, grad in gradients(trunk.train()).items() if grad.any()}
    idle = {name for name, _ in trunk.named_parameters()} - learned
    read = ("norm_1", "to_k_pic", "to_v_pic", "norm_k_pic")
    assert idle == {
        f"text_layers.2.{name}" for name, _ in trunk.text_layers[2].named_parameters() if name.split(".")[0] not in read
    }


def test_training_and_drawing_compute_the_same(trunk):
    """Attention takes another path when gradients are wanted on a CPU."""
    ids, latents, sigma = some_ids(2, 4), some_latents(2), torch.tensor([0.1, 0.6])
    wanted = trunk(latents, sigma, trunk.encode_text(ids))
    with torch.no_grad():
        drawn = trunk(latents, sigma, trunk.encode_text(ids))
    assert wanted.requires_grad and same(wanted, drawn)


def test_bf16_autocast_stays_near(trunk):
    ids, latents, sigma = some_ids(2, 4), some_latents(2), torch.tensor([0.1, 0.6])
    with torch.no_grad():
        exact = trunk(latents, sigma, trunk.encode_text(ids))
        with torch.autocast("cpu", torch.bfloat16):
            rough = trunk(latents, sigma, trunk.encode_text(ids))
    assert F.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0) > 0.995


# ---- files and mistakes ---------------------------------------------------------------------------------------------


def test_saving_and_loading(trunk, tmp_path):
    trunk.save_pretrained(tmp_path)
    loaded = Trunk.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= CONFIG.items()
    ids, latents, sigma = some_ids(2, 4), some_latents(2), torch.tensor([0.1, 0.6])
    assert torch.equal(loaded(latents, sigma, loaded.encode_text(ids)), trunk(latents, sigma, trunk.encode_text(ids)))
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in {".json", ".safetensors"}] == []


def test_wrong_input_says_what_was_wrong(trunk):
    with pytest.raises(ValueError, match=r"width 30 .*heads = 4"):
        Trunk(width=30)
    with pytest.raises(ValueError, match="129 tokens is longer than the model's 128"):
        trunk.encode_text(some_ids(1, 129))
    cache = trunk.encode_text(some_ids(2, 3))
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        trunk(some_latents(3), torch.rand(3), cache)
    with pytest.raises(ValueError, match="mode 'flows' is none of flow, codes"):
        trunk(some_latents(2), torch.rand(2), cache, "flows")
