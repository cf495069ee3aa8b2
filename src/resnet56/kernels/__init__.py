"""C kernels for training on a CPU, compiled at run time, and the modules that call them."""
