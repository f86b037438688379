"""A search over the keys of a recipe: what is tried next is Optuna's decision, each trial is an ordinary run."""
