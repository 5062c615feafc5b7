"""Quantizers: one paper, one file, one word in a recipe."""

from collections.abc import Callable

from qat.extensions import register_word
from qat.quantizers.apot import APoT
from qat.quantizers.base import Deployable, Quantizer
from qat.quantizers.binary import Binary
from qat.quantizers.dorefa import DoReFa
from qat.quantizers.dsq import DSQ
from qat.quantizers.dynamic import Dynamic
from qat.quantizers.dynamic_tensor import DynamicTensor
from qat.quantizers.ewgs import EWGS
from qat.quantizers.fp4 import FP4
from qat.quantizers.fp8 import FP8
from qat.quantizers.ir_net import IRNet
from qat.quantizers.learned_bits import LearnedBits
from qat.quantizers.lsq import LSQ
from qat.quantizers.lsq_plus import LSQPlus
from qat.quantizers.mx import MX
from qat.quantizers.n2uq import N2UQ
from qat.quantizers.nvfp4 import NVFP4
from qat.quantizers.pact import PACT
from qat.quantizers.power_of_two import PowerOfTwo
from qat.quantizers.table import TableQuantizer
from qat.quantizers.ternary import Ternary
from qat.quantizers.ternary_learned import TernaryLearned
from qat.quantizers.tqt import TQT
from qat.quantizers.uniform import Uniform

QUANTIZERS: dict[str, type[Quantizer]] = {
    "apot": APoT,
    "binary": Binary,
    "dorefa": DoReFa,
    "dsq": DSQ,
    "dynamic": Dynamic,
    "dynamic_tensor": DynamicTensor,
    "ewgs": EWGS,
    "fp4": FP4,
    "fp8": FP8,
    "ir_net": IRNet,
    "learned_bits": LearnedBits,
    "lsq": LSQ,
    "lsq_plus": LSQPlus,
    "mx": MX,
    "n2uq": N2UQ,
    "nvfp4": NVFP4,
    "pact": PACT,
    "power_of_two": PowerOfTwo,
    "ternary": Ternary,
    "ternary_learned": TernaryLearned,
    "tqt": TQT,
    "uniform": Uniform,
}


def register(word: str) -> Callable[[type[Quantizer]], type[Quantizer]]:
    """Return a decorator that gives a quantizer of the user's own a word for recipes.

    Args:
        word: What stands in a recipe; the module that registers it stands under ``imports``.

    Raises:
        ConfigError: If the word is taken, or the class is no quantizer.
    """
    return register_word(QUANTIZERS, word, Quantizer)


__all__ = [
    "DSQ",
    "EWGS",
    "FP4",
    "FP8",
    "LSQ",
    "MX",
    "N2UQ",
    "NVFP4",
    "PACT",
    "QUANTIZERS",
    "TQT",
    "APoT",
    "Binary",
    "Deployable",
    "DoReFa",
    "Dynamic",
    "DynamicTensor",
    "IRNet",
    "LSQPlus",
    "LearnedBits",
    "PowerOfTwo",
    "Quantizer",
    "TableQuantizer",
    "Ternary",
    "TernaryLearned",
    "Uniform",
    "register",
]
