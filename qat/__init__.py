"""qat: from a PyTorch float checkpoint to a small, verified integer model."""

__version__ = "0.1.0"
