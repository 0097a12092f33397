"""The training of one rank: feed, compiled steps, loop, checkpoints. Knows nothing of Ray."""
