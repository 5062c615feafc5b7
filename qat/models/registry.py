"""Models by name: ours, and every classification model of torchvision."""

import difflib
from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn

from qat.errors import CheckpointError, ConfigError
from qat.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56
from qat.models.gpt import GPT
from qat.models.linear import linear
from qat.models.resnet_cifar_stem import resnet18_cifar

OURS: dict[str, Callable[..., nn.Module]] = {
    "gpt": GPT,
    "linear": linear,
    "resnet18_cifar": resnet18_cifar,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
}
# Their auxiliary classifiers return tuples in training; weights that have them still load.
WITH_AUXILIARY = ("googlenet", "inception_v3")


def names() -> list[str]:
    """Return all model names in alphabetical order."""
    return sorted([*OURS, *torchvision.models.list_models(module=torchvision.models)])


def build(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a float model with logits of shape (B, num_classes).

    Args:
        name: One of :func:`names`.
        num_classes: Classes.
        **kwargs: Arguments of the model, such as ``in_features`` of "linear". For a torchvision
            model ``weights`` names pretrained weights ("DEFAULT" are the best ones); the last layer
            is new where their number of classes differs.

    Raises:
        ConfigError: If the name is unknown or an argument does not fit.
        CheckpointError: If pretrained weights cannot be downloaded.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=3)
        advice = f"did you mean {', '.join(close)}?" if close else "--help lists them."
        raise ConfigError(f"expected the name of a model in model.name, got {name!r}; {advice}")
    try:
        if name in OURS:
            return OURS[name](num_classes=num_classes, **kwargs)
        return _build_torchvision(name, num_classes, **kwargs)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"expected arguments that {name} accepts, got {kwargs} ({error}); correct them "
            f"under model."
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"expected to download the weights {kwargs.get('weights')} of {name}, got "
            f"{type(error).__name__} ({error}); connect, or give a file with ckpt=FILE."
        ) from error


def _build_torchvision(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    if kwargs.get("weights") is None:
        if name in WITH_AUXILIARY:
            kwargs = {"aux_logits": False, "init_weights": True, **kwargs}
        return torchvision.models.get_model(name, num_classes=num_classes, **kwargs)
    model = torchvision.models.get_model(name, **kwargs)
    if name in WITH_AUXILIARY:
        _drop_auxiliary(model)
    replace_head(model, num_classes)
    return model


def _drop_auxiliary(model: Any) -> None:
    """Remove the auxiliary classifiers that pretrained weights insist on."""
    model.aux_logits = False
    for name in ("aux1", "aux2", "AuxLogits"):
        if hasattr(model, name):
            setattr(model, name, None)


def replace_head(model: nn.Module, num_classes: int) -> None:
    """Give a classifier a new last layer, unless its number of classes already fits.

    Args:
        model: A classifier whose last linear layer or 1x1 convolution gives the logits.
        num_classes: Classes.
    """
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    path, head = heads[-1]
    has_bias = head.bias is not None
    if isinstance(head, nn.Linear):
        old, new = head.out_features, nn.Linear(head.in_features, num_classes, bias=has_bias)
    else:
        old, new = head.out_channels, nn.Conv2d(head.in_channels, num_classes, 1, bias=has_bias)
    if old != num_classes:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
