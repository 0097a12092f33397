"""The model: its layers, losses and training step on JAX, free of files, recipes and Ray."""
