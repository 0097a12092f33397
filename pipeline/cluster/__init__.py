"""Ray: starting or joining it, the streams of batches, and the workers. No other package imports it."""
