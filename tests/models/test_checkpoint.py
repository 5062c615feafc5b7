import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.errors import CheckpointError
from qat.graph.insert import prepare
from qat.models import build, load_checkpoint, read_state_dict
from qat.spec import Rule, Scheme
from tests.campaigns.start_weights import WEIGHT, files, good

FORM = {"bits": 8, "quantizer": "lsq", "observer": "min_max"}


class Payload:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def make(num_classes: int = 10) -> nn.Module:
    return build("resnet20", num_classes)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


WRAPPINGS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "best_prec1": 91.7},
    "model": lambda s: {"model": s, "epoch": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {}}},
    "net": lambda s: {"net": s, "acc": 0.9},
    "twice nested": lambda s: {"model": {"state_dict": s, "epoch": 1}},
    "data parallel": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled in Lightning": lambda s: {
        "state_dict": {f"model._orig_mod.{k}": v for k, v in s.items()}
    },
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_every_wrapping_comes_off(tmp_path: Path, wrap: Any) -> None:
    source, target = make(), make()
    torch.save(wrap(source.state_dict()), path := tmp_path / "model.pt")
    load_checkpoint(target, path)
    assert equal(target.state_dict(), source.state_dict())
    assert equal(read_state_dict(path), source.state_dict())


def test_safetensors(tmp_path: Path) -> None:
    source, target = make(), make()
    save_file(source.state_dict(), path := tmp_path / "model.safetensors")
    load_checkpoint(target, path)
    assert equal(target.state_dict(), source.state_dict())


def test_lightning_checkpoint(tmp_path: Path) -> None:
    module = pl.LightningModule()
    module.model = make()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path := tmp_path / "last.ckpt")
    assert equal(read_state_dict(path), module.model.state_dict())


def test_prefix_stays_where_it_belongs_to_the_model_or_not_to_all_names(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("net", nn.Linear(2, 3))
    torch.save(model.state_dict(), path := tmp_path / "model.pt")
    load_checkpoint(model, path)
    torch.save({"net.weight": torch.ones(2), "head.weight": torch.ones(2)}, path)
    assert list(read_state_dict(path)) == ["net.weight", "head.weight"]


def test_batch_counters_may_be_missing(tmp_path: Path) -> None:
    state = {k: v for k, v in make().state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path := tmp_path / "model.pt")
    load_checkpoint(make(), path)


def test_other_number_of_classes(tmp_path: Path) -> None:
    torch.save(make(100).state_dict(), path := tmp_path / "model.pt")
    model = make(10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = (
        r"\d+ fit, and found 2 of another shape: linear\.weight \(100, 64\) instead of \(10, 64\), "
        r"linear\.bias \(100,\) instead of \(10,\); the number of classes differs \(100, not 10\): "
        r"ckpt_new_head=true"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(model, path)
    assert equal(model.state_dict(), before)  # Nothing was copied, not even what would fit.


def test_other_architecture_lists_all_kinds_of_misfit(tmp_path: Path) -> None:
    state = build("resnet56", 10).state_dict()
    state["classifier.weight"] = state.pop("linear.weight")
    state["conv1.weight"] = torch.zeros(3)
    torch.save(state, path := tmp_path / "model.pt")
    expected = (
        r"1 missing: linear\.weight; \d+ unexpected: layer1\.3\.conv1\.weight, .* \d+ more; "
        r"1 of another shape: conv1\.weight \(3,\) instead of \(16, 3, 3, 3\); .*model\.name"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(make(), path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a checkpoint file at .*no\.pt, got: nothing"):
        read_state_dict(tmp_path / "no.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 50, b"PK\x03\x04 half a zip"])
def test_corrupt_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.+\); the file is cut off"):
        read_state_dict(tmp_path / name)


def test_truncated_file(tmp_path: Path) -> None:
    torch.save(make().state_dict(), path := tmp_path / "model.pt")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"cannot be read \(.+\); the file is cut off"):
        read_state_dict(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, new_format: bool) -> None:
    victim = tmp_path / "pwned"
    content = {"state_dict": make().state_dict(), "extra": Payload(victim)}
    torch.save(content, path := tmp_path / "model.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"contains Python code .*state_dict alone"):
        read_state_dict(path)
    assert not victim.exists()
    torch.load(path, weights_only=False)  # The payload does work where nobody takes care.
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "a dict with nothing in it"),
        ({"state_dict": {}}, "a dict with state_dict"),
        ({"epoch": 3, "lr": 0.1}, "a dict with epoch, lr"),
        ([1, 2], "list"),
        (torch.ones(3), "Tensor"),
    ],
)
def test_no_tensors_by_name(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, path := tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=rf"tensors by name in .* it holds {what}; save model"
    ):
        read_state_dict(path)


def test_checkpoint_of_a_quantized_training_brings_its_float_weights(tmp_path: Path) -> None:
    """Scales, phases and masks stay behind; a pruned weight comes as it was in use."""
    float_model = build("resnet20", 10)
    scheme = Scheme("w8a8", {"body": Rule("*", weight=FORM, activation=FORM)})
    prepared, _ = prepare(float_model, scheme, torch.randn(2, 3, 8, 8))
    mask = torch.ones(16, 3, 3, 3)
    mask[0] = 0
    prepared.get_submodule("conv1").register_buffer("weight_mask", mask)
    state = {f"model.{k}": v for k, v in prepared.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {}}, tmp_path / "own.ckpt")
    other = build("resnet20", 10)
    load_checkpoint(other, tmp_path / "own.ckpt")
    expected = float_model.state_dict()
    expected["conv1.weight"][0] = 0
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())


KINDS = [
    "code",
    "a class",
    "whole module",
    "NumPy arrays",
    "2**40 bytes",
    "pickle: calls a function",
    "pickle: builds bytes",
    "archive: bomb",
    "archive: sizes lie",
    "safetensors header: offsets overlap",
    "safetensors header: huge shape",
    "TorchScript as .pt",
    "tar as .pt",
    "zeros as .pt",
    "LFS pointer as .pt",
    "npz as .pt",
    "pipe",
    "pipe as .safetensors",
    "device",
    "link to itself",
    "name with NUL",
    "NaN",
    "too large for float32",
    "negative variance",
    "int8 weight",
    "complex weight",
    "sparse weight",
    "quantized weight",
    "meta weight",
    "nested tensor",
    "huge view of one number",
    "huge mask",
    "nested 300 times",
    "a circle",
    "keys are tensors",
    "key with escapes",
    "optimizer only",
    "number for a tensor",
]


@pytest.fixture(scope="module")
def hostile() -> dict[str, tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the formats that are written
        return files()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_says_why_and_never_how_to_load_it_all_the_same(
    hostile: dict[str, tuple[str, Any]], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, path = make(), hostile[kind][1](tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    message = str(caught.value)
    assert message.startswith("expected")
    assert message.isprintable()
    assert path.name[:5] in message or kind == "name with NUL"
    assert not any(word in message for word in ("weights_only", "safe_globals", "disk"))
    assert not (tmp_path / "code-was-run").exists()
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    "kind", ["requires grad", "half", "bfloat16", "double", "expanded bias", "shadowed methods"]
)
def test_every_dense_float_is_taken(
    hostile: dict[str, tuple[str, Any]], kind: str, tmp_path: Path
) -> None:
    load_checkpoint(model := make(), hostile[kind][1](tmp_path))
    weight, expected = model.state_dict()[WEIGHT], good()[WEIGHT]
    torch.testing.assert_close(weight, expected, atol=2e-3, rtol=1e-2)
    assert weight.dtype == torch.float32


def test_a_flipped_bit_of_an_archive_is_noticed(tmp_path: Path) -> None:
    torch.save(make().state_dict(), path := tmp_path / "model.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # inside a tensor
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Bad CRC-32"):
        load_checkpoint(make(), path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(make().state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(make(), path)  # has no checksums


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    source, target = make(), make()
    save_file(source.state_dict(), path := tmp_path / "model.ckpt")
    load_checkpoint(target, path)
    assert equal(target.state_dict(), source.state_dict())
