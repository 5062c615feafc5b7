"""What takes seconds to import, for processes of tests that fork from one that has done it."""

import contextlib
import importlib
import sys

import torch

SLOW = (
    "torch.distributed.nn.functional", "torch.onnx", "torch.export", "torchvision",
    "torch.utils.tensorboard", "torch.ao.quantization", "pytorch_lightning", "torchmetrics",
    "onnx", "onnx_ir.passes.common", "onnxscript.optimizer", "onnxruntime", "sklearn.datasets",
    "hydra", "omegaconf", "hypothesis", "rich",
)  # fmt: skip

for name in SLOW:
    importlib.import_module(name)
with contextlib.redirect_stdout(sys.stderr):  # imports the exporter
    layer = torch.nn.Linear(1, 1).eval()
    torch.onnx.export(layer, (torch.ones(2, 1),), dynamo=True, verbose=False)
