"""Exported models are made once for all tests of this folder; exporting takes seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from qat.export.onnx import export_onnx
from qat.graph.captured import Captured
from qat.graph.convert import convert
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.layers import fold
from qat.models import build
from qat.reference.run import IntegerRun
from qat.spec import Rule, Scheme
from tests.helpers import calibrate, make_scheme, smooth_images, warm_up

LEARNED = {"quantizer": "lsq", "observer": "mse"}


@dataclass(frozen=True)
class Exported:
    """A model in its fold stage and converted, its file, its calibration data and their logits."""

    captured: Captured
    model: fx.GraphModule
    plan: Plan
    path: Path
    sites: list[str]
    x: Tensor
    logits: Tensor


def fit_head(model: nn.Module, head: nn.Module, x: Tensor) -> None:
    """Set the last layer by ridge regression, so that predictions have margins."""
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, args, y: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        features = seen[0] - seen[0].mean(0)
        targets = nn.functional.one_hot(torch.arange(len(x)) % 10, 10) - 0.1
        gram = features.T @ features
        gram += 1e-1 * gram.trace() / len(gram) * torch.eye(len(gram))
        weight = torch.linalg.solve(gram, features.T @ targets).T
        head.get_parameter("bias").copy_(-weight @ seen[0].mean(0))
        head._parameters["weight"].copy_(weight)  # pyright: ignore[reportOptionalMemberAccess]


def export(model: nn.Module, scheme: Scheme, x: Tensor, path: Path) -> Exported:
    """Bring a float model to an ONNX file; heads of ten classes learn something to predict."""
    captured, plan = prepare(warm_up(model, x), scheme, x[:2])
    calibrate(captured, x)
    head = captured.get_submodule(list(plan.weights)[-1])
    if plan.weights[list(plan.weights)[-1]].shape[0] == 10:
        fit_head(captured, head, x)
        calibrate(captured, x)
    fold(captured)
    converted = convert(captured)
    sites = export_onnx(converted, x[:1], path, metadata={"classes": ["a", "b"], "seed": 3})
    return Exported(captured, converted, plan, path, sites, x, IntegerRun(converted)(x))


@pytest.fixture(scope="session")
def exported_resnet20(tmp_path_factory) -> Callable[[int, int], Exported]:
    """resnet20 at some widths, on smooth images, each exported once."""

    @cache
    def make(weight_bits: int, activation_bits: int) -> Exported:
        torch.manual_seed(0)
        x = smooth_images(64)
        rules = {"ends": Rule("@first|@last", {"bits": 8}, {"bits": 8})}
        scheme = make_scheme(
            weight_bits, activation_bits, weight=LEARNED, activation=LEARNED, rules=rules
        )
        path = tmp_path_factory.mktemp("onnx") / f"w{weight_bits}a{activation_bits}.onnx"
        return export(build("resnet20", 10), scheme, x, path)

    return make
