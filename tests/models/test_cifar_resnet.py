import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx, nn

from qat.models import build, load_checkpoint

SHARED = Path(__file__).parents[3] / "shared"
CHECKPOINT = SHARED / "checkpoints" / "resnet20-12fca82f.th"
IMAGES = SHARED / "data" / "cifar10.npz"

needs_checkpoint = pytest.mark.skipif(not CHECKPOINT.exists(), reason=f"no {CHECKPOINT}")
needs_images = pytest.mark.skipif(not IMAGES.exists(), reason=f"no {IMAGES}")


# Section 4.2 of the paper, table 6: 0.27M, 0.46M, 0.66M and 0.85M.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_the_networks_are_as_large_as_in_the_paper(depth: int, millions: float) -> None:
    model = build(f"resnet{depth}", 10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == depth


@pytest.mark.parametrize("size", [8, 9, 32])
def test_traced_and_copied_networks_compute_the_same(size: int) -> None:
    model = build("resnet20", 7).eval()
    x = torch.randn(2, 3, size, size)
    y = model(x)
    assert y.shape == (2, 7)
    for twin in (fx.symbolic_trace(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)


def test_shortcut_subsamples_and_pads_both_sides() -> None:
    shortcut = build("resnet20", 10).get_submodule("layer2.0.shortcut")
    x = torch.randn(1, 16, 4, 4)
    y = shortcut(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_every_relu_has_its_own_place() -> None:
    calls = [n.target for n in fx.symbolic_trace(build("resnet20", 10)).graph.nodes]
    relus = [target for target in calls if isinstance(target, str) and "relu" in target]
    assert len(relus) == len(set(relus)) == 1 + 9 * 2


@needs_checkpoint
@needs_images
def test_third_party_checkpoint_classifies_cifar10() -> None:
    model = build("resnet20", 10)
    load_checkpoint(model, CHECKPOINT)
    with np.load(IMAGES) as arrays:
        images, labels = (
            arrays["x_test"][:500],
            torch.from_numpy(arrays["y_test"][:500].astype("int64")),
        )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(images).float() / 255 - mean) / std
    with torch.no_grad():
        predicted = model.eval()(x.permute(0, 3, 1, 2)).argmax(1)
    assert (predicted == labels).float().mean() > 0.9


def test_resnet18_with_cifar_stem_keeps_resolution() -> None:
    model = build("resnet18_cifar", 5).eval()
    x = torch.randn(1, 3, 32, 32)
    stem = nn.Sequential(*[model.get_submodule(n) for n in ("conv1", "bn1", "relu", "maxpool")])
    assert stem(x).shape == (1, 64, 32, 32)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    assert model(x).shape == (1, 5)
