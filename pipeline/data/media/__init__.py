"""From a manifest row to its canonical clip: decoded, resized, at the recipe's frame and sample rate.

Everything before the canonical clip is here; everything after it is shared with preprocessed shards.
"""
