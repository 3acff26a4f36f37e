"""Flax (NNX) modules on top of the kernels."""
