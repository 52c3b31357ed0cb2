"""The way in: one file a stage. Only this folder knows Hydra; everything below takes typed settings."""
