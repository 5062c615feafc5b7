"""Arithmetic on tensors: no state, no modules, no configuration."""
