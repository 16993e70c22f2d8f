"""The 4-bit layers of other libraries, for `benchmarks/linear.py`; none is a dependency of mm.

They are installed apart, where wanted:

    pip install --no-deps sdnq optimum-quanto torchao bitsandbytes ggml-py
    pip install openvino nncf

Every maker takes a linear layer in the baseline's type and returns what is called on (M, K) inputs of that type.
Weights are int4 in groups of 64 where a library has a choice; ggml's blocks are 32 (Q4_0) or 256 (Q4_K) by definition.
ggml-py's library is compiled for one instruction set and ignores the variables that cap the others.
"""

from __future__ import annotations

import ctypes
import io
import logging
from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import nn

Step = Callable[[torch.Tensor], object]
Maker = Callable[[nn.Linear], Step]


def sdnq(linear: nn.Linear, **settings: object) -> Step:
    """sdnq's 4-bit layer."""
    from sdnq.quantizer import sdnq_post_load_quant  # type: ignore[import-not-found]

    return sdnq_post_load_quant(nn.Sequential(linear), weights_dtype="int4", **settings)


def quanto(linear: nn.Linear) -> Step:
    """optimum-quanto's 4-bit layer."""
    from optimum.quanto import freeze, qint4, quantize  # type: ignore[import-not-found]

    model = nn.Sequential(linear)
    quantize(model, weights=qint4)
    freeze(model)
    return model


def torchao(linear: nn.Linear, *, dynamic: bool) -> Step:
    """torchao's 4-bit weights, inputs as they are or dynamically in 8 bits."""
    import torchao.quantization as q  # type: ignore[import-not-found]

    model, group = nn.Sequential(linear), q.PerGroup(64)
    if dynamic:
        settings = q.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)
    else:
        settings = q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    q.quantize_(model, settings)
    return model


def bitsandbytes(linear: nn.Linear) -> Step:
    """bitsandbytes' NF4 layer."""
    import bitsandbytes as bnb  # type: ignore[import-not-found]

    outputs, inputs = linear.weight.shape
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def openvino(linear: nn.Linear, *, bits: int, dynamic_group: int = 0) -> Step:
    """OpenVINO's layer: fp32 (16 bits), or int4 through nncf, inputs as they are or rounded by groups.

    Args:
        linear: the layer.
        bits: 4, or 32 for OpenVINO's own fp32.
        dynamic_group: inputs that share a scale when they are rounded to 8 bits at run time; 0 does not round them.
    """
    import nncf  # type: ignore[import-not-found]
    import openvino as ov  # type: ignore[import-not-found]

    nncf.set_log_level(logging.ERROR)
    dtype, plain = linear.weight.dtype, linear.float()
    model = ov.convert_model(plain, example_input=torch.randn(2, plain.in_features))
    if bits == 4:
        mode = nncf.CompressWeightsMode.INT4_SYM
        with redirect_stdout(io.StringIO()):  # its progress bars would stand between the rows of the table
            model = nncf.compress_weights(model, mode=mode, group_size=64, ratio=1.0, all_layers=True)
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(dynamic_group),
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x.float().numpy()}, share_inputs=True, share_outputs=True)


def ggml(linear: nn.Linear, *, kind: str) -> Step:
    """ggml's layer with weights of type `Q4_0` or `Q4_K`, fp32 in and out, through ggml-py's bindings."""
    import ggml as g  # type: ignore[import-not-found]

    outputs, inputs = linear.weight.shape
    type_ = {"Q4_0": g.GGML_TYPE_Q4_0, "Q4_K": g.GGML_TYPE_Q4_K}[kind]
    weight = linear.weight.float().contiguous()
    own = g.ggml_init(g.ggml_init_params(mem_size=outputs * inputs + (1 << 20), mem_buffer=None, no_alloc=False))
    packed = g.ggml_new_tensor_2d(own, type_, inputs, outputs)
    source = ctypes.cast(weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
    g.ggml_quantize_chunk(type_, source, g.ggml_get_data(packed), 0, outputs, inputs, None)
    prepared: dict[int, tuple[object, object, object, object]] = {}

    def graph_for(tokens: int) -> tuple[object, object, object, object]:
        if tokens not in prepared:
            size = 4 * tokens * (inputs + outputs) + 8 * tokens * inputs + (16 << 20)
            context = g.ggml_init(g.ggml_init_params(mem_size=size, mem_buffer=None, no_alloc=False))
            x = g.ggml_new_tensor_2d(context, g.GGML_TYPE_F32, inputs, tokens)
            y = g.ggml_mul_mat(context, packed, x)
            graph = g.ggml_new_graph(context)
            g.ggml_build_forward_expand(graph, y)
            prepared[tokens] = (context, x, y, graph)
        return prepared[tokens]

    def run(x_MK: torch.Tensor) -> torch.Tensor:
        context, x, y, graph = graph_for(len(x_MK))
        values = x_MK.float().contiguous()
        ctypes.memmove(g.ggml_get_data(x), values.data_ptr(), values.numel() * 4)
        g.ggml_graph_compute_with_ctx(context, graph, torch.get_num_threads())
        out = (ctypes.c_float * (len(x_MK) * outputs)).from_address(g.ggml_get_data(y))
        return torch.frombuffer(out, dtype=torch.float32).view(len(x_MK), outputs)

    return run


PEERS: dict[str, Maker] = {
    "OpenVINO fp32": lambda linear: openvino(linear, bits=32),
    "OpenVINO int4": lambda linear: openvino(linear, bits=4),
    "OpenVINO int4, 8-bit inputs": lambda linear: openvino(linear, bits=4, dynamic_group=64),
    "ggml Q4_0": lambda linear: ggml(linear, kind="Q4_0"),
    "ggml Q4_K": lambda linear: ggml(linear, kind="Q4_K"),
    "sdnq int4": sdnq,
    "sdnq int4, 8-bit products": lambda linear: sdnq(linear, use_quantized_matmul=True),
    "sdnq int4, SVD": lambda linear: sdnq(linear, use_svd=True),
    "sdnq int4, SVD, 8-bit products": lambda linear: sdnq(linear, use_svd=True, use_quantized_matmul=True),
    "optimum-quanto int4": quanto,
    "torchao int4": lambda linear: torchao(linear, dynamic=False),
    "torchao int4, 8-bit inputs": lambda linear: torchao(linear, dynamic=True),
    "bitsandbytes NF4": bitsandbytes,
}
