"""Operations that torch's exporter has no valid form for."""

import torch
from torch import nn

from qat.export.runtime import OnnxModel
from qat.reference.run import IntegerRun
from tests.export.conftest import export
from tests.helpers import make_scheme


class Bags(nn.Module):
    """Bags of one size, and a ReLU that is leaky in evaluation."""

    def __init__(self):
        super().__init__()
        self.mean, self.sum = nn.EmbeddingBag(9, 4), nn.EmbeddingBag(9, 4, mode="sum")
        self.max, self.relu = nn.EmbeddingBag(9, 4, mode="max"), nn.RReLU(0.1, 0.6)
        self.end = nn.Linear(4, 3)

    def forward(self, x):
        return self.end(self.relu(self.mean(x) + self.sum(x, None, x.float()) - self.max(x)))


def test_bags_and_random_relus_are_what_they_are_in_evaluation(tmp_path):
    x = torch.randint(0, 9, (8, 3))
    exported = export(Bags().eval(), make_scheme(), x, tmp_path / "model.onnx")
    for batch in (x, x[:1]):
        expected = IntegerRun(exported.model)(batch)
        torch.testing.assert_close(OnnxModel(exported.path)(batch), expected)
