"""The loop and what it stands on: run folders, checkpoints, optimizers, evaluation. It does not know Ray."""
