"""The integer reference: a model on codes, exact accumulators, rounded as kernels round."""
