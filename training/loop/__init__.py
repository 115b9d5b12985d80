"""The training loop: trainer, callbacks, checkpoints, and what is counted on the way."""
