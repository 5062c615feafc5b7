"""What prepares weights and biases for their grids at calibration; one file for each method."""

from qat.initialise.adaround import AdaRound
from qat.initialise.base import Initialiser, check_order
from qat.initialise.bias_correction import BiasCorrection
from qat.initialise.equalise import Equalise

__all__ = ["AdaRound", "BiasCorrection", "Equalise", "Initialiser", "check_order"]
