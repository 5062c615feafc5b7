"""Quantizers: one paper, one file, one word in a recipe."""

from qat.quantizers.base import Deployable, Quantizer
from qat.quantizers.dynamic import Dynamic
from qat.quantizers.dynamic_tensor import DynamicTensor
from qat.quantizers.fp4 import FP4
from qat.quantizers.fp8 import FP8
from qat.quantizers.learned_bits import LearnedBits
from qat.quantizers.lsq import LSQ
from qat.quantizers.mx import MX
from qat.quantizers.nvfp4 import NVFP4
from qat.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "dynamic": Dynamic,
    "dynamic_tensor": DynamicTensor,
    "fp4": FP4,
    "fp8": FP8,
    "learned_bits": LearnedBits,
    "lsq": LSQ,
    "mx": MX,
    "nvfp4": NVFP4,
    "uniform": Uniform,
}

__all__ = [
    "FP4",
    "FP8",
    "LSQ",
    "MX",
    "NVFP4",
    "QUANTIZERS",
    "Deployable",
    "Dynamic",
    "DynamicTensor",
    "LearnedBits",
    "Quantizer",
    "Uniform",
]
