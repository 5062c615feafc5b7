"""Where a model will run, as facts in one table.

A target says what a runtime does with the formats of ``model.onnx``: unsigned activations, those
with negative values moved up by 128; weights int8; codes of fewer bits stored in 8. Where a fact
is not certain the table has no limit: a finding should never be wrong.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from qat.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """One runtime; the defaults set no limit.

    Attributes:
        name: Its name in ``target=...``.
        runtime: What messages call it.
        bits: Width of its integer kernels: narrower codes are stored in it, wider ones have none.
        refuses: It refuses a format without a kernel; otherwise it computes there in float.
        group_weights: It has integer kernels for several scales inside one output channel.
        affine_weights: Weights may have another zero point than 0.
        affine_activations: Activations may have another zero point than 0.
        int8_only: Activations and weights must be signed where they are stored.
        pair_limit: Highest sum of two products of an activation's and a weight's stored code;
            what is above is cut off.
        opset: The newest ONNX opset that it reads.
        exports: Files are made for it; otherwise a run ends with what its model predicts.
    """

    name: str
    runtime: str
    bits: int | None = None
    refuses: bool = False
    group_weights: bool = True
    affine_weights: bool = True
    affine_activations: bool = True
    int8_only: bool = False
    pair_limit: int | None = None
    opset: int | None = None
    exports: bool = True


_ALL = (
    Target("generic", "any runtime"),
    Target("simulation", "no runtime", exports=False),
    # onnxruntime 1.32, optimised graphs: affine and unsigned weights become QLinearConv and QGemm,
    # grouped ones and 16 bits stay DequantizeLinear and Conv. Its int4 kernels are for MatMul with
    # float activations (microsoft/onnxruntime#25378).
    Target("onnxruntime_cpu", "onnxruntime", bits=8, group_weights=False, opset=21),
    # VPMADDUBSW adds two products of uint8 and int8 in int16 (microsoft/onnxruntime#5849, #6004).
    Target(
        "onnxruntime_cpu_no_vnni",
        "onnxruntime without VNNI",
        bits=8,
        group_weights=False,
        pair_limit=2**15 - 1,
        opset=21,
    ),
    # Working with Quantized Types, docs.nvidia.com/deeplearning/tensorrt: symmetric; int8 for
    # activations and weights; blocks for int4 weights alone. onnx-tensorrt docs/operators.md: INT8,
    # "zero_point must be 0". ONNX Opset Guide, TensorRT 11: up to 25.
    Target(
        "tensorrt",
        "TensorRT",
        bits=8,
        refuses=True,
        group_weights=False,
        affine_weights=False,
        affine_activations=False,
        int8_only=True,
        opset=25,
    ),
    # Low Precision Transformations, docs.openvino.ai: 8 bits, signed or unsigned. NNCF's hardware
    # configuration for CPUs: weights symmetric. int4 is compression under float activations.
    Target("openvino", "OpenVINO", bits=8, group_weights=False, affine_weights=False, opset=21),
    # ExecuTorch, XNNPACK quantization: 8-bit symmetric weights, 8-bit affine activations, signed;
    # 4-bit and grouped weights under activations that are quantized at run time. Reads no ONNX.
    Target(
        "xnnpack",
        "XNNPACK",
        bits=8,
        group_weights=False,
        affine_weights=False,
        int8_only=True,
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """Return the target called ``name``.

    Raises:
        ConfigError: If there is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(str(name), TARGETS, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"choose one of {', '.join(TARGETS)}."
    raise ConfigError(f"expected the name of a target, got target={name}: {hint}")
