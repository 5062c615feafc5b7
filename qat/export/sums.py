"""Whether onnxruntime adds up exactly on this processor: asked of its own kernel, once."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_LENGTH = 64
"""Products in one sum: all kernels then add in their widest registers."""


@functools.cache
def cuts_off_sums() -> bool:
    """Return whether products of uint8 by int8 are added in pairs in int16, which saturates.

    x86 processors with neither AVX-512-VNNI nor AVX-VNNI do so: 255 * 127 + 255 * 127 is 64,770
    there as long as it fits, hence 32,767 (oneDNN, "Nuances of int8 computations"). A kernel is
    asked, not the processor: its flags are not readable everywhere.
    """
    codes = np.full((_LENGTH, _LENGTH), 255, np.uint8)
    session = onnxruntime.InferenceSession(_product(), providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"codes": codes})
    return bool((np.asarray(sums) != 255 * 127 * _LENGTH).any())


def _product() -> bytes:
    """Return a model of one product with int8 weights of 127, whose sums are known."""
    weight = numpy_helper.from_array(np.full((_LENGTH, _LENGTH), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])],
        "sums",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, [_LENGTH, _LENGTH])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [_LENGTH, _LENGTH])],
        [weight],
    )
    opset = [helper.make_opsetid("", 21)]
    proto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()
