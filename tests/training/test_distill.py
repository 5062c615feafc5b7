import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat.assemble import make as build_node
from qat.compose import compose_plain
from qat.errors import ConfigError
from qat.fake_quant import fake_quants
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.models import build
from qat.models.registry import OURS
from qat.training.callbacks import Calibrate, Distill
from qat.training.compiled import training_forward
from qat.training.distill import Features, Teacher, distillation_loss, feature_loss
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import make_scheme
from tests.training import small


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_value_and_gradient_are_those_of_the_formula(temperature):
    student = torch.randn(7, 4, dtype=torch.float64).float().requires_grad_()
    teacher = torch.randn(7, 4, requires_grad=True)
    loss = distillation_loss(student, teacher, temperature)
    loss.backward()
    p, q = (F.softmax(x.detach().double() / temperature, 1) for x in (teacher, student))
    by_hand = (p * (p / q).log()).sum(1).mean() * temperature**2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad.double(), temperature * (q - p) / 7, rtol=1e-4, atol=1e-6
    )
    assert teacher.grad is None


def test_nothing_to_learn_from_oneself():
    x = torch.randn(5, 3)
    assert distillation_loss(x, x, 1.0).item() == 0.0


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_labels_have_the_rest_of_the_weight(weight):
    x, student, label_loss = torch.randn(4, 3), torch.randn(4, 3), torch.tensor(2.0)
    taught = distillation_loss(student, x, 1.0)
    mixed = Teacher(nn.Identity(), weight, 1.0).mix(label_loss, student, x)
    assert mixed.item() == pytest.approx((1 - weight) * 2.0 + weight * taught.item())


@pytest.mark.parametrize("values", [(-0.1, 1.0), (1.1, 1.0), (0.5, 0.0)])
def test_values_out_of_range(values):
    with pytest.raises(
        ConfigError, match=r"distillation\.(weight|temperature) to be a finite number .* got"
    ):
        Distill(*values)


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(64, 6, generator=generator)
        self.y = torch.randint(0, 3, (64,), generator=generator)

    def loader(self):
        return DataLoader(TensorDataset(self.x, self.y), 8)

    train_dataloader = val_dataloader = test_dataloader = loader

    def calibration_batches(self, num):
        return list(self.x.split(8)[:num])


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    captured, _ = prepare(model, make_scheme(2, 8), torch.randn(4, 6))
    rates = Rates(lr=0.01, qat_lr=0.01)
    schedule = Schedule(float_epochs=0, epochs=2)
    task = QATTask(captured, Plan("test"), schedule, rates, partial(torch.optim.SGD, lr=1.0))
    distill = Distill()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and logging
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[distill, Calibrate(2)],
        )
        trainer.fit(task, datamodule=Data())
    return model.eval(), task, distill


def test_teacher_stays_the_float_model(fitted):
    model, task, _ = fitted
    x = torch.randn(16, 6)
    assert not any(f.active for f in fake_quants(task.teacher.model))
    torch.testing.assert_close(task.teacher.model(x), model(x), rtol=1e-6, atol=1e-6)
    task.model.eval()
    assert not torch.allclose(task.model(x), model(x), atol=1e-3)


def test_teacher_is_no_part_of_the_student(fitted):
    _, task, _ = fitted
    assert not any("teacher" in name for name in task.state_dict())
    ours = {p.data_ptr() for p in task.teacher.model.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in task.parameters())
    assert not any(p.requires_grad for p in task.teacher.model.parameters())


def test_teacher_comes_back_when_a_run_resumes(fitted):
    model, task, distill = fitted
    twin = Distill()
    twin.load_state_dict(distill.state_dict())
    task.teacher = None
    twin.on_fit_start(None, task)
    assert isinstance(task.teacher, Teacher)
    x = torch.randn(16, 6)
    torch.testing.assert_close(task.teacher.model(x), model(x), rtol=1e-6, atol=1e-6)
    assert twin.done


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 4, 4)])
def test_feature_loss_and_its_gradient_are_those_of_the_formula(shape):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = feature_loss(student, teacher)
    loss.backward()
    twin = student.detach().double().flatten(1).requires_grad_()
    theirs = teacher.double().flatten(1)
    cosine = (twin * theirs).sum(1) / (twin.norm(dim=1) * theirs.norm(dim=1))
    by_hand = (2 - 2 * cosine).mean()
    by_hand.backward()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert student.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(student.grad.double().flatten(1), twin.grad, rtol=1e-4, atol=1e-6)
    assert feature_loss(student, student * 3.0).item() == pytest.approx(0.0, abs=1e-6)


def test_features_are_added_to_the_loss_and_taught():
    losses = []
    for weight in (0.0, 3.0):
        task, distill = small.make_task(4), Distill(features="1|4", feature_weight=weight)
        small.fit(task, distill, Calibrate(2))
        x, teacher = small.Data().x, distill.teacher
        assert teacher is not None
        twin = small.make_task(4)
        twin.model.load_state_dict(teacher)
        features = [Features(model, ["1", "4"]) for model in (task.model, twin.model)]
        with torch.no_grad():
            for model in (task.model, twin.model):
                model.train()(x)
        outputs = [f.take() for f in features]
        losses.append(sum(float(feature_loss(a, b)) for a, b in zip(*outputs, strict=True)))
        assert task.teacher is not None
        assert task.teacher.features is not None
        with pytest.raises(ConfigError, match="by themselves"):
            task.teacher.features[0].take()  # hooks are gone, and nothing is held
    assert losses[1] < losses[0] / 2


def test_features_of_both_are_mixed_in():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    features = Features(student, ["0", "1"]), Features(model, ["0", "1"])
    x = torch.randn(4, 3)
    logits = student(x)
    loss = Teacher(model, 0.0, 1.0, features, 0.5).mix(torch.tensor(2.0), logits, x)
    terms = [feature_loss(student[0](x), model[0](x)), feature_loss(logits, model(x))]
    assert loss.item() == pytest.approx(2.0 + 0.25 * sum(t.item() for t in terms))


@pytest.mark.parametrize("path", ["0", "layer*"], ids=["in front of a batch-norm", "unknown"])
def test_modules_that_cannot_be_compared(path):
    with pytest.raises(ConfigError, match=r"distillation\.features=.* correct the patterns"):
        small.fit(small.make_task(2), Distill(features=path), Calibrate(2))


def test_a_block_does_not_run_by_itself():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 3)))
    captured, _ = prepare(model, make_scheme(2, 8), torch.randn(4, 6))
    features = Features(captured, ["0"])
    captured(torch.randn(4, 6))
    with pytest.raises(ConfigError, match=r"run by themselves .*\['0'\]"):
        features.take()


def other(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(100, num_classes))


@pytest.fixture
def another(tmp_path, monkeypatch):
    """Another float model by name, and its checkpoint."""
    monkeypatch.setitem(OURS, "other", other)
    model = other(3)
    torch.save(model.state_dict(), tmp_path / "other.pt")
    return model, tmp_path / "other.pt"


def test_another_model_teaches_and_comes_back_without_its_file(another, tmp_path):
    model, path = another

    def make():
        return [Distill(model="other", ckpt=str(path)), Calibrate(2)]

    whole, resumed, plain = (small.make_task(2) for _ in range(3))
    small.fit(plain, Distill(), Calibrate(2))
    small.fit(whole, *make(), small.Save(tmp_path / "cut.ckpt"))
    assert whole.teacher is not None
    x = torch.randn(8, 4, 5, 5)
    assert torch.equal(whole.teacher.model(x), model(x))
    path.unlink()
    small.fit(resumed, *make(), resume=tmp_path / "cut.ckpt")
    assert small.same(whole.model, resumed.model)
    assert not small.same(whole.model, plain.model)


@pytest.mark.parametrize("values", [{"model": "resnet56"}, {"ckpt": "resnet56.pt"}])
def test_half_of_another_teacher(values):
    with pytest.raises(ConfigError, match=r"distillation\.model and distillation\.ckpt together"):
        Distill(**values)


def test_group_of_features_names_ends_of_blocks():
    config = compose_plain(["recipe=resnet_w4a4", "distillation=features"])
    distill = build_node(config["callbacks"]["distill"])
    model = build("resnet20", 10)
    assert distill._paths(model, model) == [
        f"layer{stage}.{block}.bn2" for stage in (1, 2, 3) for block in range(3)
    ]


def test_features_are_those_of_the_forward_when_layers_run_again():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(4)))
    captured, _ = prepare(model, make_scheme(), torch.randn(2, 3))
    features, forward = Features(captured.train(), ["1.0"]), training_forward(captured, "off", 4)
    y = forward(torch.randn(5, 3))
    (found,) = features.take()
    (y.sum() + found.square().sum()).backward()
    assert not features._outputs  # nothing is held until the next step
