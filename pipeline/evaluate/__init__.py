"""Evaluation of a trained model on held-out data, from its run directory alone."""
