"""The way of the data: sources, stores, splits, loaders."""
