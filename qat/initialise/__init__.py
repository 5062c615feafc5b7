"""What prepares weights and biases for their grids at calibration; one file for each method."""

from qat.initialise.base import Initialiser, check_order
from qat.initialise.equalise import Equalise

__all__ = ["Equalise", "Initialiser", "check_order"]
