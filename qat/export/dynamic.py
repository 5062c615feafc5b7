"""Linear layers that read DynamicQuantizeLinear, in the form that runtimes compute on integers.

onnxruntime 1.32 makes one operator, DynamicQuantizeMatMul, of DynamicQuantizeLinear,
DequantizeLinear and a MatMul with dequantized weights where these stand right behind each other; a
Gemm there, or a Transpose between them, leaves the product in float. No real value changes.
"""

from __future__ import annotations

from onnxscript import ir

_REARRANGES = ("Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def suit_dynamic_kernels(graph: ir.Graph) -> None:
    """Rewrite what reads dynamic codes, in place.

    Args:
        graph: What the exporter wrote, with a DequantizeLinear behind each DynamicQuantizeLinear.
    """
    quantizes = [node for node in graph if node.op_type == "DynamicQuantizeLinear"]
    dequantizes = [reader for node in quantizes for reader, _ in node.outputs[0].uses()]
    for dequantize in dequantizes:
        while _step_behind(graph, dequantize):
            pass
        for reader, _ in list(dequantize.outputs[0].uses()):
            if reader.op_type == "Gemm" and reader.attributes.get_int("transB", 0) == 1:
                _split_gemm(graph, reader)


def _step_behind(graph: ir.Graph, dequantize: ir.Node) -> bool:
    """Put ``dequantize`` behind its only reader, if that one moves values and no more."""
    values, codes = dequantize.outputs[0], dequantize.inputs[0]
    readers = list(values.uses())
    if len(readers) != 1 or readers[0][0].op_type not in _REARRANGES or codes is None:
        return False
    move = readers[0][0]
    moved = move.outputs[0]
    moved.replace_all_uses_with(values)
    move.replace_input_with(0, codes)
    dequantize.replace_input_with(0, moved)
    values.shape, moved.type = moved.shape, codes.type
    graph.remove(dequantize)
    graph.insert_after(move, dequantize)
    return True


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    """Put a product and a sum in place of a linear layer ``x @ w.T + b``.

    The sum is no Add, which onnxruntime would join with the product to a Gemm again.
    """
    x, weight, *bias = gemm.inputs
    turn = ir.node("Transpose", [weight], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turn.outputs[0]])
    nodes = [turn, product, *(ir.node("Sum", [product.outputs[0], b]) for b in bias)]
    graph.insert_before(gemm, nodes)
    old, new = gemm.outputs[0], nodes[-1].outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(gemm, safe=True)
