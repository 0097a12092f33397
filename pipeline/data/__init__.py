"""From manifests and media files to batches of tokens, without JAX and Ray."""
