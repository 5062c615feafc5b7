"""A small model in the form of an exported one; scripts/predict.py without a new process."""

import importlib.util
import io
import json
import signal
import traceback
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SCRIPT = Path(__file__).parents[1] / "scripts" / "predict.py"
SHAPE = (3, 8, 8)
CLASSES = ("cat", "dog", "=1+1", "\x1b[2J")
FACTS = {"classes": list(CLASSES), "mean": [0.5], "std": [0.25]}


@dataclass
class Result:
    """How a call ended."""

    status: int | str
    out: str
    error: str

    @property
    def is_fine(self):
        """Whether it ended as commands of ours end: no traceback, no hang, one last sentence."""
        return self.status in (0, 1, 2) and "Traceback" not in self.error


def make_model(path, facts=FACTS, shape=SHAPE, outputs=1, inputs=1, scale=1.0, kind=None):
    """Write a linear model of images with ``facts`` as metadata."""
    size = int(np.prod([axis for axis in shape if isinstance(axis, int)]))
    weight = np.random.default_rng(0).normal(size=(size, len(CLASSES))).astype(np.float32)
    kind = kind or TensorProto.FLOAT
    sources = [helper.make_tensor_value_info(f"x{i}", kind, ["N", *shape]) for i in range(inputs)]
    sinks = [
        helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["N", len(CLASSES)])
        for i in range(outputs)
    ]
    nodes = [helper.make_node("Cast", ["x0"], ["f"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Flatten", ["f"], ["flat"]))
    nodes += [helper.make_node("MatMul", ["flat", "w"], [f"y{i}"]) for i in range(outputs)]
    start = [numpy_helper.from_array(weight * np.float32(scale), "w")]
    graph = helper.make_graph(nodes, "g", sources, sinks, start)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in facts.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, path)
    return path


def load_predict():
    """Import scripts/predict.py."""
    spec = importlib.util.spec_from_file_location("script_predict", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Hang(BaseException):
    """A call that takes too long; no handler of errors catches it."""


@contextmanager
def at_most(seconds):
    """Raise in a block that takes longer."""

    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Stopping(io.StringIO):
    """A standard output at which somebody presses Ctrl-C after some lines."""

    def __init__(self, lines):
        super().__init__()
        self.left = lines

    def write(self, text):
        self.left -= text.count("\n")
        if self.left < 0:
            raise KeyboardInterrupt
        return super().write(text)


def predict(*arguments, seconds=30, stop_after=None):
    """Call the script; an exception that a user would see is a traceback in ``error``."""
    out = io.StringIO() if stop_after is None else Stopping(stop_after)
    error = io.StringIO()
    with redirect_stdout(out), redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with at_most(seconds):
                status = load_predict().main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            status = "raised"
            traceback.print_exc(file=error)
    return Result(status, out.getvalue(), error.getvalue())
