"""The training step on a CPU: kernels in C, compiled where they run, and what calls them."""
