"""Weights in and out: official checkpoints in, the formats of other libraries out.

Each format is checked by the library that it is for: what is written is loaded back, and its
features are compared with ours. What a format cannot hold is refused, never approximated.
"""
