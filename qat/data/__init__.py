"""Data sets as Lightning data modules whose batches are a pure function of (seed, epoch, sample).

``source`` says what a data set is, ``sampler`` in which order it is read, ``loader`` how a killed
run finds its place again, ``base`` what every data module offers; the rest are the data sets.
"""

from qat.data.arrays import ArraysData
from qat.data.base import DataModule
from qat.data.cifar10 import Cifar10Data
from qat.data.digits import DigitsData
from qat.data.folder import FolderData
from qat.data.tabular import TabularData
from qat.data.text import TextData

__all__ = [
    "ArraysData",
    "Cifar10Data",
    "DataModule",
    "DigitsData",
    "FolderData",
    "TabularData",
    "TextData",
]
