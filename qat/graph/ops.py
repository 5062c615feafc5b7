"""The op table: what each operation means for quantization, one row each.

``op_names.py`` names a node of a graph; the row of that name says what its inputs and its output
want. What no table knows is an op called by its own name that stays float, and is listed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Op:
    """What one kind of operation wants.

    Attributes:
        data: How many of its leading arguments are data. Those behind them never get a grid, nor
            join one: they lend a size, a dtype or a device, choose (an index, a mask), or are
            parameters.
        reads_codes: Its tensor inputs are quantized.
        elementwise: It reads codes where all its inputs come from the data and its result, maybe
            behind a ReLU, is read as codes; a residual stream that only normalisations read stays
            float.
        tabulated: It can read codes and look its results up; it does where the scheme says so.
        passes: Its output holds values of its input: no quantizer between, the scale is shared.
        joins: Like ``passes`` with several inputs: all of them share one scale.
        nonnegative: Its output has no negative value.
        upper: Its output has no value above this one.
        decides: Its result jumps where its input moves a little, as rounding does; so does every
            operation that makes integers or booleans of real values.
    """

    data: int = 1
    reads_codes: bool = False
    elementwise: bool = False
    tabulated: bool = False
    passes: bool = False
    joins: bool = False
    nonnegative: bool = False
    upper: float | None = None
    decides: bool = False


ALL = 1000
UNKNOWN = Op(data=ALL)
"""What is in no table: it stays float."""
_LENT = (
    *("size", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("randint_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "arange"),
    *("zeros", "ones", "empty", "full", "eye", "linspace", "rand", "randn", "randint", "tensor"),
)
"""What takes no more of a tensor than its size, dtype or device."""
_STEPS = (
    *("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "floordiv", "mod"),
    *("floor_divide", "remainder", "fmod", "round_", "floor_", "ceil_", "trunc_", "sign_"),
    *("floor_divide_", "remainder_", "fmod_"),
)
"""What rounds real values to real values."""

OPS: dict[str, Op] = {
    "conv1d": Op(data=2, reads_codes=True),
    "conv2d": Op(data=2, reads_codes=True),
    "conv3d": Op(data=2, reads_codes=True),
    "conv_transpose1d": Op(data=2, reads_codes=True),
    "conv_transpose2d": Op(data=2, reads_codes=True),
    "conv_transpose3d": Op(data=2, reads_codes=True),
    "linear": Op(data=2, reads_codes=True),
    "matmul": Op(data=2, reads_codes=True),
    "einsum": Op(data=ALL),
    "add": Op(data=2, elementwise=True),
    "mul": Op(data=2, elementwise=True),
    "average_pool": Op(reads_codes=True),
    "concat": Op(joins=True),
    "relu": Op(nonnegative=True),
    "relu6": Op(nonnegative=True, upper=6.0),
    "sigmoid": Op(tabulated=True, nonnegative=True, upper=1.0),
    "hardsigmoid": Op(tabulated=True, nonnegative=True, upper=1.0),
    "softmax": Op(tabulated=True, nonnegative=True, upper=1.0),
    "max_pool": Op(passes=True),
    "reshape": Op(passes=True),
    "dropout": Op(passes=True),
    "identity": Op(passes=True),
    "slice": Op(passes=True),
    "pad": Op(passes=True),
    "interpolate": Op(passes=True),
    "batch_norm": Op(),
    "layer_norm": Op(),
    "group_norm": Op(),
    "rms_norm": Op(),
    "silu": Op(tabulated=True),
    "gelu": Op(tabulated=True),
    "hardswish": Op(tabulated=True),
    "tanh": Op(tabulated=True),
    "mean": Op(),
    "embedding": Op(data=2),
    "attention": Op(data=3),
    "cast": Op(),
    "input": Op(data=0),
    "constant": Op(data=0),
    **{name: Op(data=0) for name in _LENT},
    **{name: Op(data=2, decides=True) for name in _STEPS},
}

LAYERS = {name for name in OPS if name.startswith("conv") and name != "concat"} | {"linear"}
WEIGHTED = LAYERS | {"embedding"}
UNCHANGED = {"identity", "dropout"}
"""What does nothing in eval mode."""
