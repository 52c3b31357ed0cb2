"""How experts are made and kept: training, the registry, and the embedded family's pre-training."""
