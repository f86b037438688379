"""Trained runs as one prediction, from their saved logits alone: voting and stacking."""

from fastcifar.combine.run import combine_run, run_combine

__all__ = ["combine_run", "run_combine"]
