"""The training loop, its optimiser, checkpoints and run folder."""
