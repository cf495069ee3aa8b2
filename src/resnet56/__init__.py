"""ResNet-56 on CIFAR-10: build it, train it, test it, explain it."""
