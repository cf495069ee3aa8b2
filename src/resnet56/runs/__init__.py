"""Run directories, checkpoints, and models of other projects."""
