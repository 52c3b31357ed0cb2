"""The method itself: the steering equation and the choice of a token. Tensors in, tensors out."""
