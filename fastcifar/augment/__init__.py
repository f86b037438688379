"""Augmentation: decisions made once, a kernel each for CPU and GPU, and mixing. Import from its modules."""
