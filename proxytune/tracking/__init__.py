"""What a run leaves behind: the local record under `outputs/runs/`, which is the truth, and its mirror in W&B."""
