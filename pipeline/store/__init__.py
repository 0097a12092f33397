"""Run directories on object stores: the paths, logs and lock of a run in a bucket."""
