"""Losses, schedules, and optimizers that work on one flat arena."""
