"""Run directories, checkpoints, and models converted from other programs."""
