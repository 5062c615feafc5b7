"""Quantizers: one paper, one file, one word in a recipe."""

from qat.quantizers.apot import APoT
from qat.quantizers.base import Deployable, Quantizer
from qat.quantizers.dorefa import DoReFa
from qat.quantizers.dsq import DSQ
from qat.quantizers.dynamic import Dynamic
from qat.quantizers.dynamic_tensor import DynamicTensor
from qat.quantizers.ewgs import EWGS
from qat.quantizers.lsq import LSQ
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.pact import PACT
from qat.quantizers.power_of_two import PowerOfTwo
from qat.quantizers.table import TableQuantizer
from qat.quantizers.tqt import TQT
from qat.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "apot": APoT,
    "dorefa": DoReFa,
    "dsq": DSQ,
    "dynamic": Dynamic,
    "dynamic_tensor": DynamicTensor,
    "ewgs": EWGS,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "pact": PACT,
    "power_of_two": PowerOfTwo,
    "tqt": TQT,
    "uniform": Uniform,
}

__all__ = [
    "DSQ",
    "EWGS",
    "LSQ",
    "PACT",
    "QUANTIZERS",
    "TQT",
    "APoT",
    "Deployable",
    "DoReFa",
    "Dynamic",
    "DynamicTensor",
    "LSQPlus",
    "PowerOfTwo",
    "Quantizer",
    "TableQuantizer",
    "Uniform",
]
