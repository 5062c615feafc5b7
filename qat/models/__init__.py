"""Float models by name, and the checkpoints that fill them."""

from qat.models.checkpoint import load_checkpoint, read_state_dict
from qat.models.registry import build, names

__all__ = ["build", "load_checkpoint", "names", "read_state_dict"]
