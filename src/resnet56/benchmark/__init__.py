"""Benchmarks of training and inference, compared with a standard PyTorch loop."""
