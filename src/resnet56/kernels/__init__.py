"""Kernels for training on CPUs (C) and GPUs (Triton), and the modules that call them."""
