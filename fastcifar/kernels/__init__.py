"""Fused kernels: each with a plain reference, a CPU version and a Triton version."""
