import torch

from qat.analysis.codes import used_codes
from qat.spec import QuantSpec


def test_share_of_the_grid_that_occurs():
    codes = torch.tensor([[-1.0, 0.0], [-1.0, 1.0]])
    assert used_codes(codes, QuantSpec(2, narrow=True)) == 1.0
    assert used_codes(codes, QuantSpec(2)) == 0.75
    assert used_codes(codes[:1], QuantSpec(4, narrow=True)) == 2 / 15
    assert used_codes(torch.arange(16.0), QuantSpec(4, signed=False)) == 1.0
