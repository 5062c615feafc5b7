"""What the tests of initialisers on data share: layers of all kinds, and a network that learnt."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.data import DigitsData
from qat.fake_quant import weight_quants
from qat.graph.captured import Captured
from qat.graph.insert import prepare
from qat.spec import Scheme
from qat.training.callbacks.calibrate import observe
from tests.helpers import smooth_images, warm_up


def conv_norm_relu(*shape: int, **options: int) -> list[nn.Module]:
    """A convolution without bias, batch-norm, ReLU."""
    return [nn.Conv2d(*shape, bias=False, **options), nn.BatchNorm2d(shape[1]), nn.ReLU()]  # pyright: ignore[reportArgumentType]


def chain() -> nn.Sequential:
    """Every kind of layer that can be rounded, with a bias, a batch-norm, or groups."""
    return nn.Sequential(
        *conv_norm_relu(3, 6, 3),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.ReLU6(),
        nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2),
        *conv_norm_relu(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(288, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    )


CHAIN_LAYERS = ["0", "3", "5", "6", "10", "12"]


def quantized(model: nn.Module, scheme: Scheme, x: Tensor) -> tuple[Captured, Captured]:
    """Return ``model`` with quantized weights and activations that pass, and the same in float."""
    captured, _ = prepare(model, scheme, x[:2])
    reference = deepcopy(captured.eval())
    observe(captured, weight_quants(captured), [x])
    return captured, reference.eval()


def images(count: int) -> Tensor:
    """Images of 8 by 8 pixels, mostly positive, whose neighbours are alike."""
    return smooth_images(count, 8) + 1


def warm_chain(x: Tensor) -> nn.Module:
    """A chain whose batch-norms know ``x``."""
    return warm_up(chain(), x)


def train_on_digits() -> tuple[nn.Module, DigitsData]:
    """Return a network that reads digits, about 97 %, with depthwise layers; trained in 2 s."""
    data = DigitsData(batch_size=128)
    data.setup()
    model = nn.Sequential(
        *conv_norm_relu(3, 16, 3, padding=1),
        *conv_norm_relu(16, 16, 3, padding=1, groups=16),
        *conv_norm_relu(16, 32, 1),
        nn.MaxPool2d(2),
        *conv_norm_relu(32, 32, 3, padding=1, groups=32),
        *conv_norm_relu(32, 32, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    epochs, adam = 15, torch.optim.Adam(model.parameters())
    for epoch in range(epochs):
        adam.param_groups[0]["lr"] = 0.01 * (1 - epoch / epochs)
        for x, y in data.train_dataloader():
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()
    return model.eval(), data
