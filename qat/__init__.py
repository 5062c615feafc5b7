"""Quantization-aware training: from a float checkpoint to a small, verified integer model."""

from qat.errors import QatError
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.reference.chip import ChipRun
from qat.reference.run import IntegerRun
from qat.runtimes.packed_model import PackedModel
from qat.spec import QuantSpec, Rule, Scheme

__all__ = [
    "ChipRun",
    "IntegerRun",
    "PackedModel",
    "QatError",
    "QuantSpec",
    "Rule",
    "Scheme",
    "convert",
    "prepare",
]
__version__ = "0.1.0"
