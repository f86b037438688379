"""The training engine for small images: a recipe in; a trained, evaluated and explained model out."""
