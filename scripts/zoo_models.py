"""The models of the zoo, with random weights, and pictures for them whose classes are decided.

On white noise all samples look alike to a network with random weights, and its predictions are
near ties that the last bit of a sum turns. So the samples are smooth, as photographs are, and the
last layer is fitted to them.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
SIZES = {"inception_v3": 299, "maxvit_t": 224}
TIMM = [
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convit_tiny",
    "convnext_atto",
    "convnextv2_atto",
    "crossvit_tiny_240",
    "davit_tiny",
    "deit_tiny_patch16_224",
    "densenet121",
    "dla34",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientnet_lite0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_100",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_tiny",
    "levit_128s",
    "mambaout_femto",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s16_224",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "nf_regnet_b0",
    "nf_resnet50",
    "pit_ti_224",
    "poolformer_s12",
    "pvt_v2_b0",
    "regnety_002",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_26w_4s",
    "resmlp_12_224",
    "resnet18",
    "resnetv2_50",
    "rexnet_100",
    "sebotnet33ts_256",
    "selecsls42",
    "sequencer2d_s",
    "skresnet18",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tf_efficientnetv2_b0",
    "tiny_vit_5m_224",
    "twins_svt_small",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "vovnet39a",
    "xception41",
    "xcit_nano_12_p16_224",
]


def names(choice: str) -> list[str]:
    """Return the models of a choice: torchvision, timm, all, or names separated by commas."""
    ours = torchvision.models.list_models(module=torchvision.models)
    theirs = [f"timm/{name}" for name in TIMM]
    groups = {"torchvision": ours, "timm": theirs, "all": [*ours, *theirs]}
    return groups.get(choice) or choice.split(",")


def build(name: str) -> tuple[nn.Module, int]:
    """Return a model with random weights and the side of its images, small where it can be."""
    if name.startswith("timm/"):
        import timm  # optional: the extra named zoo

        model = timm.create_model(name.removeprefix("timm/"), num_classes=CLASSES)
        settings: Any = model.default_cfg
        fixed = settings.get("fixed_input_size", False)
        return model, settings["input_size"][1] if fixed else 96
    options: dict[str, Any] = {"num_classes": CLASSES}
    if name.startswith("vit_"):
        options["image_size"] = 56 if name == "vit_h_14" else 64
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True  # what torchvision does anyway, with a warning
    model = torchvision.models.get_model(name, **options)
    return model, options.get("image_size", SIZES.get(name, 64))


def wake(model: nn.Module, x: Tensor) -> None:
    """Give a network with random weights the state of a trained one, as far as numbers go.

    Linear layers get weights that keep the spread of what they read: zeros hide every difference,
    and with the usual small ones attention is even. Batch-norms get the statistics of ``x``: with
    those of no data, values of deep networks vanish or grow without bounds.

    Args:
        model: The model, changed in place.
        x: Images ``(N, 3, H, W)``.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            least = layer.in_features**-0.5
            if layer.weight.std() < least:
                nn.init.normal_(layer.weight, std=least)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def pictures(count: int, size: int) -> Tensor:
    """Return smooth random images ``(count, 3, size, size)``, real values of about unit spread."""
    layers = [
        F.interpolate(torch.randn(count, 3, side, side), (size, size), mode="bilinear")
        for side in (1, 2, 4, 8)
    ]
    return torch.stack(layers).sum(0) / 2 + torch.randn(count, 3, size, size) / 10


def decide(model: nn.Module, x: Tensor) -> None:
    """Fit the last layer to the samples of ``x``, of which sample ``i`` is of class ``i % 10``.

    Ridge regression on the features in front of it, averaged over positions.

    Args:
        model: The model, changed in place; one with two heads gets both fitted.
        x: Images ``(N, 3, H, W)``.
    """
    classes = F.one_hot(torch.arange(len(x)) % CLASSES, CLASSES).float()
    for head in [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        features = _features(model, head, x) if _gives_classes(head) else None
        if features is None:
            continue
        has_bias = head.bias is not None
        mean, target = features.mean(0) * has_bias, classes - classes.mean(0) * has_bias
        centred = features - mean
        products = centred @ centred.T
        ridge = products.diagonal().mean() / 100 * torch.eye(len(x))
        weight = (centred.T @ torch.linalg.solve(products + ridge, target)).T
        with torch.no_grad():
            head.weight.copy_(weight.view_as(head.weight))
            if head.bias is not None:
                head.bias.copy_(classes.mean(0) - weight @ mean)


def _gives_classes(layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer maps features, position by position, to classes."""
    return layer.weight.shape[0] == CLASSES and layer.weight[0, 0].numel() == 1


@torch.no_grad()
def _features(model: nn.Module, head: nn.Module, x: Tensor) -> Tensor | None:
    """Return what ``head`` reads in eval mode, ``(N, features)``; ``None`` if it does not run."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(x)
    hook.remove()
    if not seen:
        return None
    values = seen[0].movedim(1, -1) if isinstance(head, nn.Conv2d) else seen[0]
    return values.reshape(len(x), -1, values.shape[-1]).mean(1)
