"""The training and inference speed of this package against the usual loop."""
