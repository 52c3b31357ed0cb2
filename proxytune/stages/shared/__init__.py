"""What stages share: how they start, what they load, where memory gets tight, and what was done before."""
