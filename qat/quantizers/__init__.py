"""Quantizers: one paper, one file, one word in a recipe."""

from qat.quantizers.apot import APoT
from qat.quantizers.base import Deployable, Quantizer
from qat.quantizers.binary import Binary
from qat.quantizers.dynamic import Dynamic
from qat.quantizers.dynamic_tensor import DynamicTensor
from qat.quantizers.ir_net import IRNet
from qat.quantizers.lsq import LSQ
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.n2uq import N2UQ
from qat.quantizers.power_of_two import PowerOfTwo
from qat.quantizers.table import TableQuantizer
from qat.quantizers.ternary import Ternary
from qat.quantizers.ternary_learned import TernaryLearned
from qat.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "apot": APoT,
    "binary": Binary,
    "dynamic": Dynamic,
    "dynamic_tensor": DynamicTensor,
    "ir_net": IRNet,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "n2uq": N2UQ,
    "power_of_two": PowerOfTwo,
    "ternary": Ternary,
    "ternary_learned": TernaryLearned,
    "uniform": Uniform,
}

__all__ = [
    "LSQ",
    "N2UQ",
    "QUANTIZERS",
    "APoT",
    "Binary",
    "Deployable",
    "Dynamic",
    "DynamicTensor",
    "IRNet",
    "LSQPlus",
    "PowerOfTwo",
    "Quantizer",
    "TableQuantizer",
    "Ternary",
    "TernaryLearned",
    "Uniform",
]
