"""Training: the step, what it is made of, evaluation, checkpoints, and the run that joins them."""
