"""A captured model: the user's module tree, unchanged, that runs from one graph for each mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.calls import Call
from qat.errors import GraphError
from qat.graph.pickling import build_graph, flatten_graph
from qat.graph.views import CONTAINER, move_states
from qat.outputs import Outputs
from qat.signature import Signature

MODES = ("train", "eval")


def make_function(graph: fx.Graph) -> Callable[..., Any]:
    """Check ``graph`` and make a Python function of it, of the model and the graph's inputs."""
    graph.lint()
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return names["forward"]


class Captured(nn.Module):
    """A model that runs from its graphs.

    Args:
        model: The user's model; its tree is shared, not copied.
        graphs: Mode to graph, over the names of that tree.
        outputs: Mode to what it returns.
        signature: How it is called.
        example: The call that it was captured with.
    """

    def __init__(
        self,
        model: nn.Module,
        graphs: dict[str, fx.Graph],
        outputs: dict[str, Outputs],
        signature: Signature,
        example: Call,
    ) -> None:
        super().__init__()
        for kind in ("_modules", "_parameters", "_buffers"):
            self.__dict__[kind] = dict(model.__dict__[kind])
        self._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
        self.training = model.training
        self.source = f"{type(model).__module__}.{type(model).__qualname__}"
        self.graphs, self.outputs, self.signature = graphs, outputs, signature
        self.example = example
        self.leaves: list[str] = []
        """Names of modules that could not be traced and run as they are."""
        self.evaluated: list[str] = []
        """Names of modules that the model keeps in eval mode while it trains."""
        self.follows_batch = True
        """Whether any number of samples runs, and not only the example's."""
        self.converted: frozenset[torch.dtype] = frozenset()
        """Types of floats that became float32, and become so where they are inputs."""
        self._forwards: dict[str, Callable[..., Any]] = {}

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``."""
        return "train" if self.training else "eval"

    def train(self, mode: bool = True) -> Captured:
        """Set the mode, but of modules that the model keeps in eval mode."""
        super().train(mode)
        for name in self.evaluated:
            self.get_submodule(name).training = False
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode; arguments and results are the original model's.

        Raises:
            GraphError: If the call has another form than the example.
        """
        return self.call(None, *args, **kwargs)

    def call(self, function: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Run ``function``, made of a graph of the current mode, or that graph, like the model.

        Args:
            function: Takes the model and its input tensors.
            *args: Of the call.
            **kwargs: Of the call.

        Raises:
            GraphError: If the call has another form than the example.
        """
        found = self.run(self.inputs(*args, **kwargs), function)
        return self.outputs[self.mode].build(found)

    def inputs(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return the tensors of a call in the order of the graphs' placeholders.

        Raises:
            GraphError: If the call has another form than the example.
        """
        tensors = self.signature.flatten(args, kwargs)
        return [x.float() if x.dtype in self.converted else x for x in tensors]

    def run(self, tensors: list[Tensor], function: Callable[..., Any] | None = None) -> Any:
        """Return the leaves of what the graph of the current mode makes of ``tensors``.

        Args:
            tensors: In the order of the graphs' placeholders.
            function: What was made of that graph, if it is not to run as it is.

        Raises:
            GraphError: If they have another size than the example, and that size is in the graph.
        """
        if self.mode not in self._forwards:
            self.recompile()
        try:
            return (function or self._forwards[self.mode])(self, *tensors)
        except RuntimeError as error:
            raise self._explain(error, tensors) from error

    def _explain(self, error: RuntimeError, tensors: list[Tensor]) -> Exception:
        known = [x.shape[1:] for x in self.signature.inputs]
        got = [tuple(x.shape[1:]) for x in tensors]
        if known == got:
            return error
        return GraphError(
            f"expected samples of shape {known}, with which the model was captured, got {got}: "
            f"capture it again with an example of that size ({str(error).partition(chr(10))[0]})."
        )

    def recompile(self) -> None:
        """Check the graphs and make Python functions of them; call it after every change."""
        for mode, graph in self.graphs.items():
            self._forwards[mode] = make_function(graph)

    def add_views(self, views: dict[str, nn.Module]) -> None:
        """Give the modules of functional layers a place in the tree.

        Args:
            views: Key to view.
        """
        if views:
            container = nn.Module()
            for key, view in views.items():
                container.add_module(key, view)
            self.add_module(CONTAINER, container)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        move_states(state_dict, prefix, self)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

    def __getstate__(self) -> dict[str, Any]:
        flat = {mode: flatten_graph(graph) for mode, graph in self.graphs.items()}
        return {**self.__dict__, "_forwards": {}, "graphs": flat}

    def __setstate__(self, state: dict[str, Any]) -> None:
        graphs = {mode: build_graph(rows) for mode, rows in state["graphs"].items()}
        super().__setstate__({**state, "graphs": graphs})
