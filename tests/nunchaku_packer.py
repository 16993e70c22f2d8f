"""A packer for files in Nunchaku's layout, written number by number from the layout's description, for tests.

Also what the numbers mean, in numpy and float64: dense weights, and a layer's output with rounded inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SHIFT = 0.171875


# ---- where number (n, k) lies ----------------------------------------------------------------------------------------


def number(*digits):
    """Mixed radix: (digit, size) pairs, the most significant first."""
    value = 0
    for digit, size in digits:
        value = value * size + digit
    return value


def weight_place(n, k, columns):
    """Which nibble of the file holds weight (n, k)."""
    return number(
        (n // 128, 1 << 40), (k // 64, columns // 64), (n % 128 // 16, 8), (n % 8, 8), (k % 32 // 8, 4),
        (n % 16 // 8, 2), (k % 64 // 32, 2), (k % 8, 8),
    )  # fmt: skip


def scale_place(n, g, groups):
    return number((n // 128, 1 << 40), (g, groups), (n % 128 // 16, 8), (n % 8 // 2, 4), (n % 16 // 8, 2), (n % 2, 2))


def micro_place(n, g, groups):
    return number(
        (n // 128, 1 << 40), (g // 4, groups // 4), (n % 8, 8), (n % 32 // 8, 4), (n % 128 // 32, 4), (g % 4, 4)
    )


def branch_place(first, second, tile, tiles, other):
    """In 16 x 16 tiles; `tile` and `other` number them."""
    return number(
        (tile, 1 << 40), (other, tiles), (first % 8, 8), (second % 8 // 2, 4), (first % 16 // 8, 2),
        (second % 16 // 8, 2), (second % 2, 2),
    )  # fmt: skip


def awq_place(n, k, columns):
    return number(
        (n // 4, 1 << 40), (k // 64, columns // 64), (n % 4, 4), (k % 64 // 32, 2), (k % 8, 8), (k % 32 // 8, 4)
    )


def grid(array):
    return np.indices(array.shape)


def nibbles_to_bytes(flat):
    return (flat[0::2] | flat[1::2] << 4).astype(np.uint8)


def pad(array, rows, columns=None, fill=0):
    """To whole tiles of 128."""
    out = np.full((rows,) if columns is None else (rows, columns), fill, array.dtype)
    out[tuple(slice(s) for s in array.shape)] = array
    return out


def up128(size):
    return -(-size // 128) * 128


def pack_codes(codes):
    rows, columns = (up128(s) for s in codes.shape)
    codes = pad(codes, rows, columns)
    flat = np.zeros(codes.size, np.uint8)
    flat[weight_place(*grid(codes), columns)] = codes
    return torch.from_numpy(nibbles_to_bytes(flat).reshape(rows, columns // 2)).view(torch.int8)


def pack_scales(scales, dtype):
    """(N, G) to (G, N)."""
    n, g = scales.shape
    scales = pad(scales.astype(np.float32), up128(n), g, 1)
    flat = np.zeros(scales.size, np.float32)
    flat[scale_place(*grid(scales), g)] = scales
    return torch.from_numpy(flat.reshape(g, -1)).to(dtype)


def pack_vector(vector, dtype, fill=1):
    vector = pad(vector.astype(np.float32), up128(len(vector)), fill=fill)
    return pack_scales(vector[:, None], dtype)[0].clone()


def pack_micro(scales):
    n, g = scales.shape
    scales = pad(scales.astype(np.float32), up128(n), up128(g * 16) // 16, 1)
    flat = np.zeros(scales.size, np.float32)
    flat[micro_place(*grid(scales), scales.shape[1])] = scales
    return torch.from_numpy(flat.reshape(scales.shape[1], -1)).to(torch.float8_e4m3fn)


def pack_down(down, dtype):
    """(R, K) to (K, R)."""
    down = pad(down.astype(np.float32), len(down), up128(down.shape[1]))
    r, k = grid(down)
    flat = np.zeros(down.size, np.float32)
    flat[branch_place(r, k, k // 16, len(down) // 16, r // 16)] = down
    return torch.from_numpy(flat.reshape(down.shape[::-1])).to(dtype)


def pack_up(up, dtype):
    up = pad(up.astype(np.float32), up128(len(up)), up.shape[1])
    n, r = grid(up)
    flat = np.zeros(up.size, np.float32)
    flat[branch_place(n, r, n // 16, up.shape[1] // 16, r // 16)] = up
    return torch.from_numpy(flat.reshape(up.shape)).to(dtype)


def pack_awq(codes):
    flat = np.zeros(codes.size, np.uint8)
    flat[awq_place(*grid(codes), codes.shape[1])] = codes
    packed = nibbles_to_bytes(flat).reshape(codes.shape[0] // 4, codes.shape[1] * 2)
    return torch.from_numpy(packed).view(torch.int32)


# ---- layers ----------------------------------------------------------------------------------------------------------


def sixteen(array):
    """Rounded to bf16, as files have it."""
    return torch.from_numpy(np.asarray(array, np.float32)).bfloat16().double().numpy()


@dataclass
class Layer:
    """Random W4A4 numbers and what they mean. steps: one a weight, of whatever scales the format has."""

    codes: np.ndarray
    steps: np.ndarray
    smooth: np.ndarray
    down: np.ndarray
    up: np.ndarray
    bias: np.ndarray
    fields: dict
    unsigned: bool = False

    @property
    def rounded(self):
        """Weights (N, K) of smoothed inputs."""
        fp4 = "wcscales" in self.fields
        signed = np.where(self.codes < 8, E2M1[self.codes % 8], -E2M1[self.codes % 8]) if fp4 else self.codes
        return signed * self.steps

    @property
    def dense(self):
        """What the layer does to x when x is not rounded."""
        return self.rounded / self.smooth + self.up @ self.down

    @property
    def plain_bias(self):
        """The bias before the shift's part was taken off."""
        return self.bias + (self.rounded / self.smooth).sum(1) * (SHIFT if self.unsigned else 0)

    def __call__(self, x):
        """The output, with inputs rounded to 4 bits a group of 64."""
        v = (x + (SHIFT if self.unsigned else 0)) / self.smooth
        out = np.zeros((len(x), len(self.codes)))
        for start in range(0, v.shape[1], 64):
            part = v[:, start : start + 64]
            scale = np.abs(part).max(1, keepdims=True) / (15 if self.unsigned else 7)
            out += np.round(part / scale) * scale @ self.rounded[:, start : start + 64].T
        return out + self.bias + x @ self.down.T @ self.up.T


def make_layer(rng, n, k, *, fp4=False, unsigned=False, rank=16, lite=False):
    """Random numbers, and their packed tensors under the second version's names."""
    smooth = sixteen(rng.uniform(0.5, 2, k))
    down, up = sixteen(rng.normal(size=(rank, k)) / 40), sixteen(rng.normal(size=(n, rank)) / 10)
    bias = sixteen(rng.normal(size=n) / 10)
    bf16 = torch.bfloat16
    fields = {"bias": pack_vector(bias, bf16, 0), "smooth_factor": pack_vector(smooth, bf16)}
    fields |= {"proj_down": pack_down(down, bf16), "proj_up": pack_up(up, bf16)}
    if fp4:
        codes = rng.integers(0, 16, (n, k))
        micro = torch.from_numpy(rng.uniform(1, 9, (n, k // 16))).to(torch.float8_e4m3fn).double().numpy()
        rows, whole = sixteen(rng.uniform(0.5, 2, n)), sixteen([0.01])
        fields |= {"qweight": pack_codes(codes.astype(np.uint8)), "wscales": pack_micro(micro)}
        fields |= {"wcscales": pack_vector(rows, bf16), "wtscale": torch.from_numpy(whole).to(bf16)}
        steps = micro.repeat(16, 1) * rows[:, None] * whole
    else:
        codes = rng.integers(-8, 8, (n, k))
        scales = sixteen(rng.uniform(0.01, 0.03, (n, -(-k // 64))))
        padded = pad(scales, n, up128(k) // 64, 1)
        fields |= {"qweight": pack_codes((codes % 16).astype(np.uint8)), "wscales": pack_scales(padded, bf16)}
        steps = scales.repeat(64, 1)[:, :k]
    if not lite:
        fields["smooth_factor_orig"] = fields["smooth_factor"].clone()
    return Layer(codes, steps, smooth, down, up, bias, fields, unsigned and not fp4)


def make_modulation(rng, n, k, splits):
    """AWQ: dense weight (N, K) and bias as diffusers wants them, and the packed fields. Rows interleave by `splits`."""
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.integers(1, 4, (n, k // 64)) / 512
    zeros = -scales * rng.integers(5, 10, scales.shape)
    bias = rng.integers(-32, 32, n) / 64
    file_bias = bias.copy()
    order = np.arange(n)
    if splits > 1:
        order = np.array([part * (n // splits) + row for row in range(n // splits) for part in range(splits)])
        for part in {1, splits - 2}:
            file_bias[part * (n // splits) : (part + 1) * (n // splits)] += 1
    fields = {
        "qweight": pack_awq(codes[order]),
        "wscales": torch.from_numpy(scales[order].T.copy()).bfloat16(),
        "wzeros": torch.from_numpy(zeros[order].T.copy()).bfloat16(),
        "bias": torch.from_numpy(file_bias[order]).bfloat16(),
    }
    return codes * scales.repeat(64, 1) + zeros.repeat(64, 1), bias, fields


@torch.no_grad()
def run(model):
    g = torch.Generator().manual_seed(0)
    return model(
        hidden_states=torch.randn(1, 16, 4, generator=g),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=g),
        pooled_projections=torch.randn(1, 32, generator=g),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def put(model, path, weight, bias, columns=slice(None), *, add=False):
    """Numbers of the definition into a 16-bit model."""
    linear = model.get_submodule(path)
    linear.weight.data[:, columns] = torch.from_numpy(weight).float()
    linear.bias.data = (linear.bias.data if add else 0) + torch.from_numpy(bias).float()


def relative(got, want):
    return float((got - want).norm() / want.norm())
