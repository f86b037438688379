"""The training engine for small images: a recipe in; a trained, evaluated and explained model out."""

__version__ = "0.1.0"  # the only place that says it: the build reads it from here
