import pytest
import torch

from qat.assemble import set_up
from qat.compose import compose_plain
from qat.errors import CheckpointError, DataError
from qat.fake_quant import fake_quants
from qat.restore import finish, read_checkpoint, restore
from qat.training.callbacks.calibrate import observe
from qat.training.evaluate import Score
from qat.training.phases import phase_of


@pytest.fixture
def save(tmp_path):
    """Save a calibrated model as its run would, with changes of the config that it ran with."""

    def write(*overrides, **changes):
        config = compose_plain(["trainer.accelerator=cpu", *overrides])
        setup = set_up(config)
        model = setup.captured
        for layer in model.modules():
            if "weight_mask" in layer._buffers:
                layer.get_buffer("weight_mask").bernoulli_()
        observe(model, list(fake_quants(model)), setup.data.calibration_batches(1))
        content = {
            "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
            "hyper_parameters": {"config": {**config, **changes}},
            "callbacks": {
                "Calibrate": {"baseline": [91.5, 90.0], "scores": {"float": [91.5, 1.25]}},
                "Clock": {"seconds": {"a": 1.0}},
            },
        }
        torch.save(content, path := tmp_path / "last.ckpt")
        return path, setup

    return write


def read(path):
    checkpoint = read_checkpoint(path)
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=tabular_w8a8"],
        ["recipe=resnet_w8a8_pruned", "scheme=w4a4", "scheme.batch_norm=folded"],
        ["recipe=resnet_w4a8", "quantizer=uniform", "observer=percentile"],
    ],
    ids=["table", "pruned", "uniform"],
)
def test_the_model_comes_back(overrides, save):
    path, before = save(*overrides)
    checkpoint = read(path)
    after = restore(checkpoint)
    x = before.data.calibration_batches(1)[0]
    torch.testing.assert_close(after.captured(x), before.captured.eval()(x), rtol=0, atol=0)
    assert after.plan == before.plan
    assert after.float_bytes == before.float_bytes
    assert (checkpoint.float_accuracy, checkpoint.seconds) == (91.5, {"a": 1.0})
    assert checkpoint.scores == {"float": Score(91.5, 1.25)}


def test_what_the_run_started_from_is_not_needed(save):
    trainer = {"_target_": "pytorch_lightning.Trainer", "max_epochs": 2}  # below float_epochs
    path, _ = save("recipe=tabular_w8a8", ckpt="gone.pt", trainer=trainer)
    assert phase_of(restore(read(path)).captured) == "quantize"


def test_finish_folds_once(save):
    path, _ = save("recipe=tabular_w8a8")
    model = restore(read(path)).captured
    assert [finish(model), finish(model)] == ["quantize", "fold"]


def test_other_data(save):
    path, _ = save("recipe=tabular_w8a8")
    checkpoint = read(path)
    with pytest.raises(DataError, match=r"with the 10 classes that .* got 7: choose other data"):
        restore(checkpoint, {"data": {**checkpoint.config["data"], "num_classes": 7}})
    with pytest.raises(CheckpointError, match=r"\(10, 4\) instead of \(10, 6\)"):
        restore(checkpoint, {"data": {**checkpoint.config["data"], "num_features": 6}})
    with pytest.raises(CheckpointError, match="names that differ"):
        restore(
            checkpoint, {"model": {"name": "resnet20"}, "data": {"_target_": "qat.data.DigitsData"}}
        )
