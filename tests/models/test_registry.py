from urllib.error import URLError

import pytest
import torch
import torchvision
from torchvision.models import _api, googlenet, resnet18

from qat.errors import CheckpointError, ConfigError
from qat.models import build, names

# The smallest of each family; all 86 names were tried once by hand.
FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_torchvision_family_gets_the_number_of_classes(name: str) -> None:
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        model = build(name, 7).train()
        assert model(torch.empty(2, 3, size, size)).shape == (2, 7)


def test_regnet() -> None:
    assert build("regnet_y_400mf", 7).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_names_are_ours_and_those_of_torchvision_classification() -> None:
    found = names()
    assert found == sorted(set(found))
    assert {"linear", "resnet20", "resnet56", "resnet18_cifar", "resnet18", "vit_b_16"} <= set(
        found
    )
    assert not [n for n in found if "rcnn" in n or "deeplab" in n or "quantized" in n]


def test_linear_flattens() -> None:
    model = build("linear", 10, in_features=12)
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    assert model(torch.randn(2, 3, 2, 2)).shape == (2, 10)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"got 'resnet21'; did you mean resnet2?\d"):
        build("resnet21", 10)
    with pytest.raises(ConfigError, match=r"got 'zzz'; --help lists them"):
        build("zzz", 10)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("resnet20", {"depth": 3}), ("resnet18", {"depth": 3}), ("resnet18", {"weights": "BEST"})],
)
def test_argument_that_does_not_fit(name: str, kwargs: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"arguments that {name} accepts, got {{'.*correct"):
        build(name, 10, **kwargs)


def test_linear_needs_its_input_size() -> None:
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'in_features'"):
        build("linear", 10)


def test_pretrained_weights_survive_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    published = resnet18()
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *a, **k: published.state_dict())
    for num_classes in (1000, 7):
        model = build("resnet18", num_classes, weights="DEFAULT")
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, num_classes)
        assert torch.equal(model.get_parameter("conv1.weight"), published.conv1.weight)
        assert torch.equal(model.get_parameter("fc.weight"), published.fc.weight) == (
            num_classes == 1000
        )


def test_pretrained_googlenet_loses_its_auxiliary_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    state = googlenet(init_weights=False).state_dict()
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *a, **k: state)
    model = build("googlenet", 7, weights="DEFAULT").train()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert not [name for name in model.state_dict() if "aux" in name]


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    with pytest.raises(
        CheckpointError, match=r"download the weights DEFAULT of resnet18.*no route"
    ):
        build("resnet18", 10, weights="DEFAULT")


def test_torchvision_still_lists_by_module() -> None:
    assert len(torchvision.models.list_models(module=torchvision.models)) >= 80
