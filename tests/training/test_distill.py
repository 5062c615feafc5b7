import warnings
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat.errors import ConfigError
from qat.fake_quant import fake_quants
from qat.graph.insert import prepare
from qat.graph.plan import Plan
from qat.training.callbacks import Calibrate, Distill
from qat.training.distill import Teacher, distillation_loss
from qat.training.optim import Rates
from qat.training.schedule import Schedule
from qat.training.task import QATTask
from tests.helpers import make_scheme


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
    with pytest.raises(ConfigError, match=r"distillation\.weight from 0 to 1 .* correct them"):
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
