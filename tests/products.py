"""Plans against multiply-accumulates that are counted without asking them."""

from torch import Tensor, nn

from qat.graph.captured import Captured
from qat.graph.insert import insert
from qat.graph.plan import Plan
from qat.graph.planner import make_plan
from qat.graph.sites import Sites
from qat.graph.trace import capture
from qat.layers import fold
from qat.spec import Scheme
from scripts.zoo_products import CountedRun, count_file
from tests.helpers import calibrate, make_scheme

__all__ = ["CountedRun", "assert_true", "count_file", "float_names", "planned"]
CLIPS = ("relu", "relu6")
"""What becomes an end of the range of the quantize behind it."""


def planned(
    model: nn.Module, x: Tensor, scheme: Scheme | None = None
) -> tuple[Captured, Plan, dict[str, str]]:
    """Return the model in its fold stage, its plan and the names of its nodes."""
    captured = capture(model, x)
    plan = make_plan(captured, scheme or make_scheme())
    sites = Sites(captured.graphs["eval"], dict(captured.named_modules()))
    insert(captured, plan)
    calibrate(captured, x)
    fold(captured)
    return captured, plan, {n.name: sites.names[n] for n in sites.nodes}


def float_names(run: CountedRun, names: dict[str, str]) -> set[str]:
    """Return what ran in float of what reads the data, by the names of the plan."""
    of_data = {n.name for n in run.data - run.written} & set(names)
    return {names[k] for k, op in run.float_ops.items() if k in of_data and op not in CLIPS}


def assert_true(
    captured: Captured, plan: Plan, names: dict[str, str], x: Tensor
) -> tuple[int, int]:
    """Compare a plan with a run on ``x``; return its multiply-accumulates, all and in float."""
    counted = CountedRun(captured)
    total, in_float = counted.count(x)
    assert float_names(counted, names) == {f.name for f in plan.floats}
    floats = sum(f.macs for f in plan.floats)
    assert (plan.macs * len(x), floats * len(x)) == (total, in_float)
    return total, in_float
