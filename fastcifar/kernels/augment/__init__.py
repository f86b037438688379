"""Augmentation of a batch: gather, transform, normalize, in one kernel."""
