"""Quantizers: one paper, one file, one word in a recipe."""

from qat.quantizers.apot import APoT
from qat.quantizers.base import Deployable, Quantizer
from qat.quantizers.dynamic import Dynamic
from qat.quantizers.dynamic_tensor import DynamicTensor
from qat.quantizers.lsq import LSQ
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.power_of_two import PowerOfTwo
from qat.quantizers.table import TableQuantizer
from qat.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "apot": APoT,
    "dynamic": Dynamic,
    "dynamic_tensor": DynamicTensor,
    "lsq": LSQ,
    "power_of_two": PowerOfTwo,
    "lsq_plus": LSQPlus,
    "uniform": Uniform,
}

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "APoT",
    "Deployable",
    "Dynamic",
    "DynamicTensor",
    "LSQPlus",
    "PowerOfTwo",
    "Quantizer",
    "TableQuantizer",
    "Uniform",
]
