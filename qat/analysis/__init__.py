"""Plain tables about a model: noise by site, sparsity, size."""
