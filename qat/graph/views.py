"""Functional layers become modules that share their parameters.

``F.linear(x, self.w)`` has a weight like any layer, and a batch-norm written as ``F.batch_norm``
can be folded like any other. A view is a module of torch's own class whose parameters and buffers
*are* those of the model: the optimizer sees them once, and ``state_dict`` leaves them out here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qat.graph.view_calls import BUILDERS, Call

CONTAINER = "views"


class Views:
    """All views of one captured model; both of its graphs share them.

    Args:
        model: The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self.evaluated: set[str] = set()
        """Keys of those that are in eval mode while the model trains."""
        self.known: dict[Any, str] = {}

    def find(self, name: str) -> nn.Module | None:
        """Return the view of a ``call_module`` node's target, ``None`` for the model's modules."""
        container, _, key = name.partition(".")
        return self.modules.get(key) if container == CONTAINER else None

    def record(self, tracer: Any, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a functional layer as a view; ``None`` where ``target`` is no such layer.

        Args:
            tracer: Who records.
            target: A function.
            args: Its arguments; tensors are proxies.
            kwargs: The same, by name.
        """
        builder = BUILDERS.get(target)
        call = None if builder is None else builder(tracer, *args, **kwargs)
        if call is None:
            return None
        view = self._find_or_build(call)
        if call.evaluates and tracer.root.training:
            self.evaluated.add(view)
        y = tracer.create_proxy("call_module", f"{CONTAINER}.{view}", (call.input,), {})
        return y if call.addend is None else y + call.addend

    def _find_or_build(self, call: Call) -> str:
        names = {k: None if v is None else str(v.node.target) for k, v in call.tensors.items()}
        place = (call.kind, tuple(names.items()), repr(sorted(call.options.items())))
        if place not in self.known:
            key = self._key(next(n for n in names.values() if n))
            self.known[place] = key
            self.modules[key] = self._build(call.kind, names, call.options)
        return self.known[place]

    def _key(self, name: str) -> str:
        """Name a view after its layer: ``a.weight`` is of ``a``, ``a.in_weight`` of ``a.in``."""
        owner, _, leaf = name.rpartition(".")
        leaf = leaf.removesuffix("weight").rstrip("_") if "running" not in leaf else ""
        base = "/".join(filter(None, [*owner.split("."), leaf])) or "weight"
        key, number = base, 1
        while key in self.modules:
            number += 1
            key = f"{base}_{number}"
        return key

    def _build(
        self, kind: type[nn.Module], names: dict[str, str | None], options: Any
    ) -> nn.Module:
        view = kind.__new__(kind)
        nn.Module.__init__(view)
        view.__dict__.update(options, shared=frozenset(names))
        for attribute, name in names.items():
            value = None if name is None else self._tensor(name)
            is_parameter = value is None or isinstance(value, nn.Parameter)
            table = view._parameters if is_parameter else view._buffers
            table[attribute] = value  # pyright: ignore[reportArgumentType]
        return view

    def _tensor(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        return {**module._parameters, **module._buffers}[leaf]


def display_name(target: str) -> str:
    """Return how a plan calls a module: a view by the name of the layer that it shows."""
    container, _, key = target.partition(".")
    return key.replace("/", ".") if container == CONTAINER else target


def move_states(state: dict[str, Any], prefix: str, model: nn.Module) -> None:
    """Rename what was saved of layers that were modules of their own, and are views now.

    Args:
        state: Name to value; changed in place.
        prefix: What the names of ``model`` begin with.
        model: A captured model.
    """
    modules = dict(model.named_modules())
    for path in [m for m in modules if m.startswith(f"{CONTAINER}.") and m.count(".") == 1]:
        layer = display_name(path)
        if "weight_quant" in getattr(modules.get(layer), "_modules", {}):
            continue  # both are layers
        for key in [k for k in state if k.startswith(f"{prefix}{layer}.")]:
            name = key.removeprefix(f"{prefix}{layer}.")
            if name.startswith("weight_quant.") or name in ("weight_mask", "_extra_state"):
                state[f"{prefix}{path}.{name}"] = state.pop(key)
