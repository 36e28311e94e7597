"""The layer, its metadata, and the models that are built with it."""
