"""Trained runs as one prediction, from their saved logits alone: voting and stacking."""

from fastcifar.combine.run import run_combine

__all__ = ["run_combine"]
