"""Training and inference speed of this package, compared with a standard PyTorch loop."""
