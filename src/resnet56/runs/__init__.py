"""Run directories, checkpoints, and models from other projects."""
