"""BranchedLinear against plain matrices: every base, several branches, and that what comes off leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mm.core.errors import UserError
from mm.kernels import quantize_weight
from mm.layers.linear import ActivationRule, Branch, BranchedLinear, token_split
from mm.layers.surgery import branched

N, K, R = 24, 100, 5


def branch(name: str = "a", rank: int = R, scale: float = 1.0, scope=None) -> Branch:
    return Branch(name=name, down=torch.randn(rank, K) / 10, up=torch.randn(N, rank), scale=scale, scope=scope)


def quantized(bits: int = 4, activation: ActivationRule | None = None, svd: bool = True) -> BranchedLinear:
    layer = BranchedLinear.from_linear(nn.Linear(K, N))
    smooth = torch.rand(K) + 0.5
    down, up = (torch.randn(3, K) / 10, torch.randn(N, 3)) if svd else (None, None)
    packed, scales = quantize_weight(layer.weight.detach() * smooth, torch.float32)
    if bits == 8:
        packed = torch.randint(-127, 128, (N, 128), dtype=torch.int8)
        scales = scales / 16
    layer.quantize_(packed, scales, smooth=smooth, down=down, up=up, activation=activation)
    return layer


LAYERS = {
    "16 bits": lambda: BranchedLinear.from_linear(nn.Linear(K, N)),
    "4 bits": quantized,
    "4 bits, 16-bit inputs": lambda: quantized(activation=ActivationRule(bits=16)),
    "4 bits, 4-bit inputs": lambda: quantized(activation=ActivationRule(bits=4, group=64)),
    "8 bits": lambda: quantized(bits=8),
    "4 bits without a branch": lambda: quantized(svd=False),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request) -> BranchedLinear:
    torch.manual_seed(0)
    return LAYERS[request.param]().requires_grad_(False)


@torch.no_grad()
def test_a_branch_adds_its_product_to_whatever_the_base_gives(layer):
    x, one, two = torch.randn(3, 7, K), branch("one"), branch("two", 30, -0.7)
    before = layer(x)
    layer.attach(one)
    layer.attach(two)
    added = x @ one.down.T @ one.up.T - 0.7 * (x @ two.down.T @ two.up.T)
    torch.testing.assert_close(layer(x), before + added, atol=2e-4, rtol=1e-4)
    assert [b.name for b in layer.branches] == ["one", "two"]


@torch.no_grad()
def test_scales_move_live_and_detaching_leaves_no_trace(layer):
    x, first = torch.randn(7, K), branch("first")
    before, names = layer(x), set(layer.state_dict())
    layer.attach(first)
    layer.attach(branch("second"))
    layer.set_scale("first", 0.25)
    layer.detach("second")
    torch.testing.assert_close(layer(x), before + 0.25 * (x @ first.down.T @ first.up.T), atol=2e-4, rtol=1e-4)
    assert set(layer.state_dict()) == names  # a model saved with an adapter on it is the model
    layer.detach("first")
    assert torch.equal(layer(x), before)


def test_the_effective_weight_is_what_the_layer_does(layer):
    layer.attach(branch("one", scale=0.5))
    bias = layer.bias
    with torch.no_grad():
        eye = layer(torch.eye(K)) - bias
    exact = 16 in (layer.bits, layer.activation.bits)
    torch.testing.assert_close(layer.effective_weight().T, eye, atol=1e-4 if exact else 0.03, rtol=1e-3)


def test_gradients_reach_inputs_and_branches(layer):
    x = torch.randn(4, K, requires_grad=True)
    learned = Branch(name="new", down=nn.Parameter(torch.randn(2, K)), up=nn.Parameter(torch.randn(N, 2)))
    layer.attach(learned)
    layer(x).square().sum().backward()
    y = (x.detach() @ layer.effective_weight().T + layer.bias).detach()
    torch.testing.assert_close(x.grad, 2 * y @ layer.effective_weight().detach(), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(
        learned.up.grad, (2 * y).T @ (x.detach() @ learned.down.detach().T), atol=1e-2, rtol=1e-3
    )
    assert learned.down.grad.abs().max() > 0


def test_inputs_rounded_without_a_sign_give_the_same_sum_with_gradients():
    """Kernels shift such inputs and the bias has the shift's part taken off; plain torch shifts nothing."""
    torch.manual_seed(0)
    packed, scales = quantize_weight(torch.rand(N, K) + 0.5, torch.float32)
    made = BranchedLinear(K, N)
    rule = ActivationRule(bits=4, group=64, unsigned=True, shift=0.17)
    made.quantize_(packed, scales, smooth=torch.rand(K) + 0.5, bias=torch.randn(N), activation=rule)
    x = nn.functional.gelu(torch.randn(5, K))
    with torch.no_grad():
        want = made(x)
    assert (made(x.requires_grad_()) - want).norm() < 0.05 * want.norm()


@torch.no_grad()
def test_a_state_dict_makes_the_same_layer(layer):
    x = torch.randn(9, K)
    if layer.bits == 16:
        made = BranchedLinear(K, N)
    else:
        made = BranchedLinear.empty(
            K, N, bias=True, bits=layer.bits, rank=0 if layer.down is None else 3, smooth=True, dtype=torch.float32,
            activation=layer.activation,
        )  # fmt: skip
    made.load_state_dict(layer.state_dict())
    assert torch.equal(made(x), layer(x))


@torch.no_grad()
def test_copies_and_other_types(layer):
    layer.attach(branch())
    x = torch.randn(5, K)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.detach("a")
    assert layer.branches
    half = copy.deepcopy(layer).to(torch.bfloat16)
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=0.15, rtol=0.08)


@torch.no_grad()
def test_scoped_branches_act_on_their_tokens_only(layer):
    x, text, picture = torch.randn(2, 8, K), branch("t", scope="text"), branch("p", scope="picture")
    before = layer(x)
    layer.attach(text)
    with pytest.raises(UserError, match="token_split"):
        layer(x)
    layer.attach(picture)
    with token_split(3):
        after = layer(x)
    want = before.clone()
    want[:, :3] += x[:, :3] @ text.down.T @ text.up.T
    want[:, 3:] += x[:, 3:] @ picture.down.T @ picture.up.T
    torch.testing.assert_close(after, want, atol=2e-4, rtol=1e-4)
    with pytest.raises(UserError, match="text tokens only"):
        layer.effective_weight()


@torch.no_grad()
def test_one_graph_serves_every_scale(layer):
    layer.attach(branch())
    x, runs = torch.randn(4, K), []

    def count(graph, _inputs):
        runs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: layer(x), backend=count, fullgraph=True)
    for scale in (1.0, 0.3, -2.0):
        layer.set_scale("a", scale)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(runs) == 1


def test_what_does_not_fit_is_named(layer):
    layer.attach(branch("a"))
    with pytest.raises(UserError, match="'a' is attached already"):
        layer.attach(branch("a"))
    with pytest.raises(UserError, match=r"made for a layer of \(3, 100\)"):
        layer.attach(Branch(name="b", down=torch.randn(2, K), up=torch.randn(3, 2)))
    with pytest.raises(UserError, match="no branch 'z' is attached here; there are: a"):
        layer.set_scale("z", 1.0)
    with pytest.raises(ValueError, match="make no product"):
        Branch(name="c", down=torch.randn(2, K), up=torch.randn(N, 3))
    if layer.bits != 16:
        with pytest.raises(ValueError, match="bit weights already"):
            layer.quantize_(layer.qweight, layer.weight_scales)


def test_a_linear_in_a_model_is_swapped_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"x": nn.Linear(4, 2)}))
    weight = model[0].weight
    made = branched(model, "0")
    assert made is model[0]
    assert made.weight is weight
    assert branched(model, "0") is made
    assert branched(model, "1.x") is model[1]["x"]
    with pytest.raises(UserError, match="1 is a ModuleDict"):
        branched(model, "1")
