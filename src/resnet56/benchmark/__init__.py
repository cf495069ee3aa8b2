"""Benchmarks that compare training and inference with a standard PyTorch loop."""
