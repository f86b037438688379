"""Training: the run, the step, evaluation, checkpoints, clocks."""
