"""The decoding loop, and the scoring of given text, over any mixture of sources."""
