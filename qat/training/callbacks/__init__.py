"""What happens during training: each trick of time is one callback with its state saved."""

from qat.training.callbacks.anneal import Anneal
from qat.training.callbacks.average import EMA
from qat.training.callbacks.calibrate import Calibrate, CalibrateActivations
from qat.training.callbacks.checkpoint import QuantizedCheckpoint, QuantizedEarlyStopping
from qat.training.callbacks.clock import Clock, EpochLines, PhaseProgressBar
from qat.training.callbacks.distill import Distill
from qat.training.callbacks.freeze import Fold, FreezeBatchNorm, FreezeObservers
from qat.training.callbacks.guard import SeedSteps, StopOnNonFinite
from qat.training.callbacks.lower_bits import LowerBits
from qat.training.callbacks.monitor import Monitor
from qat.training.callbacks.oscillations import Dampen, FreezeOscillations, TrackOscillations
from qat.training.callbacks.probe import ProbeRate
from qat.training.callbacks.prune import Prune
from qat.training.callbacks.reestimate import ReestimateBatchNorm
from qat.training.callbacks.size_penalty import SizePenalty

__all__ = [
    "EMA",
    "Anneal",
    "Calibrate",
    "CalibrateActivations",
    "Clock",
    "Dampen",
    "Distill",
    "EpochLines",
    "Fold",
    "FreezeBatchNorm",
    "FreezeObservers",
    "FreezeOscillations",
    "LowerBits",
    "Monitor",
    "PhaseProgressBar",
    "ProbeRate",
    "Prune",
    "QuantizedCheckpoint",
    "QuantizedEarlyStopping",
    "ReestimateBatchNorm",
    "SeedSteps",
    "SizePenalty",
    "StopOnNonFinite",
    "TrackOscillations",
]
