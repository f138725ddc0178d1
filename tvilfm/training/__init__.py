"""Training of both stages: optimizer, step, loop and checkpoints."""
