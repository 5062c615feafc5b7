"""The networks of the training benchmarks, and a training step of each in every mode."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

from others import OTHERS

if TYPE_CHECKING:
    from torch import Tensor, nn


class Network(NamedTuple):
    """What is trained.

    Attributes:
        build: Makes the float model.
        batch: Samples in a step.
        size: Height and width of an image.
    """

    build: Callable[[], nn.Module]
    batch: int
    size: int


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(num_classes=10)


def _cifar_stem() -> nn.Module:
    from qat.models import build

    return build("resnet18_cifar", 10)


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 8, 6, 3, 192, 768, num_classes=10)


NETWORKS = {
    "resnet18_cifar": Network(_cifar_stem, 64, 32),
    "resnet18": Network(lambda: _torchvision("resnet18"), 16, 64),
    "mobilenet_v2": Network(lambda: _torchvision("mobilenet_v2"), 16, 64),
    "vit": Network(_vit, 16, 64),
}
Step = Callable[[], None]
LEARNED = {"bits": 8, "quantizer": "lsq", "observer": "min_max"}


def prepared(model: nn.Module, x: Tensor) -> Any:
    """Return ``model`` with learned scales of 8 bits on weights and activations, calibrated."""
    import torch

    from qat.fake_quant import Phase, fake_quants
    from qat.graph.insert import prepare
    from qat.spec import Rule, Scheme

    weight = {**LEARNED, "axis": 0, "narrow": True}
    captured, _ = prepare(model, Scheme("w8a8", {"all": Rule("*", weight, LEARNED)}), x[:2])
    captured.train()
    for phase in (Phase.OBSERVE, Phase.QUANTIZE):
        for fake_quant in fake_quants(captured):
            fake_quant.set_phase(phase)
        if phase is Phase.OBSERVE:
            with torch.no_grad():
                captured(x)
            for fake_quant in fake_quants(captured):
                fake_quant.finish_calibration()
    return captured


def _float(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    del x
    return model, model


def _float_compiled(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
    import torch

    del x
    return model, torch.compile(model, dynamic=False)


def _ours(
    compile_mode: Any, checkpointing: Any = "off", *, channels_last: bool = True
) -> Callable[..., Any]:
    def make(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
        from qat.graph.memory_format import use_channels_last
        from qat.training.compiled import training_forward

        captured = prepared(model, x)
        if channels_last:
            use_channels_last(captured, len(x) if compile_mode == "regional" else None)
        return captured, training_forward(captured, compile_mode, checkpointing)

    return make


def _other(name: str) -> Callable[..., Any]:
    def make(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[..., Any]]:
        made = OTHERS[name][0](model, x)
        return made, made

    return make


MODES: dict[str, Callable[[nn.Module, Tensor], tuple[nn.Module, Callable[..., Any]]]] = {
    "float": _float,
    "float compiled": _float_compiled,
    "qat off": _ours("off", channels_last=False),
    "qat regional": _ours("regional"),
    "qat checkpointing": _ours("regional", "auto"),
    "qat step": _ours("step"),
    **{name: _other(name) for name in OTHERS},
}


def make_step(network: str, mode: str, device: str) -> Step:
    """Return a training step: forward, backward and SGD on one batch of noise.

    Args:
        network: A name in ``NETWORKS``.
        mode: A name in ``MODES``.
        device: ``"cpu"`` or ``"cuda"``.
    """
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    made = NETWORKS[network]
    x = torch.randn(made.batch, 3, made.size, made.size, device=device)
    y = torch.arange(made.batch, device=device) % 10
    model, forward = MODES[mode](deepcopy(made.build()).to(device).train(), x)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step
