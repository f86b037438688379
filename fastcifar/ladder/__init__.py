"""The whole ladder of recipes: what to run in which order, running it, and its metrics. Torch is not imported here."""
