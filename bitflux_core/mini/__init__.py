"""The embedded mini FLUX: its world, its models, its training."""
