"""C kernels for training on a CPU, and the modules that compile and call them."""
