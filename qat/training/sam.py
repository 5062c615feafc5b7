"""SAM: an optimizer that steps by the gradient at the worst point nearby.

Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
ICLR 2021, arXiv:2010.01412, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qat.errors import ConfigError
from qat.kinds import Kind, number, require


class SAM(Optimizer):
    """Climb by ``rho`` along the gradient, take the gradient there, and step from where it was.

    Every step runs forward and backward twice; batch-norms and observers see both passes. Learned
    scales are not moved by the climb, as a code that flips is no small step; their gradient is the
    second one, too. Gradients must come from the step's closure: accumulated ones, and those of
    float16 with its loss scaling, do not.

    Args:
        params: Parameter groups; the one named ``scales`` does not climb.
        base: Makes the optimizer that steps.
        rho: Length of the climb, in the units of the parameters.

    Raises:
        ConfigError: If ``rho`` is not positive, or ``base`` makes nothing.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        base: Callable[[Iterable[dict[str, Any]]], Optimizer],
        rho: float = 0.05,
    ) -> None:
        require("optimizer.factory.rho", rho, number(above=0))
        require("optimizer.factory.base", base, Kind("what makes an optimizer", callable))
        self.base, self.rho = base(params), rho
        super().__init__(self.base.param_groups, dict(self.base.defaults))
        self._share()

    def _share(self) -> None:
        """Let schedulers and loggers see and set what the base optimizer has."""
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, and return what the first call of ``closure`` returned.

        Args:
            closure: Clears gradients, runs forward and backward.

        Raises:
            ConfigError: If there is none.
        """
        if closure is None:
            raise ConfigError(
                "expected a closure for SAM's two passes, got none: set trainer.precision=32-true "
                "or bf16-mixed, or choose another optimizer."
            )
        with torch.enable_grad():
            loss = closure()
        before = self._climb()
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        self.base.step()
        return loss

    @torch.no_grad()
    def _climb(self) -> list[tuple[Tensor, Tensor]]:
        """Move to the worst point nearby; return the parameters that moved, and from where."""
        groups = [g for g in self.param_groups if g.get("name") != "scales"]
        moved = [p for g in groups for p in g["params"] if p.grad is not None]
        before = [(p, p.clone()) for p in moved]
        if moved:
            norms = torch.stack([p.grad.norm() for p in moved])
            for parameter in moved:
                parameter.add_(parameter.grad * (self.rho / (norms.norm() + 1e-12)))
        return before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer: a step leaves nothing else behind."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.base.load_state_dict(state_dict)
        self._share()
