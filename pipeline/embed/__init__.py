"""Embeddings of any media as Parquet, nearest items to a text or a file, and pages to look at them."""
