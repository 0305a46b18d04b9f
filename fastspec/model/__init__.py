"""A whole model: what of it is adapted, its adapter on disk, its parameter groups and checkpoints."""
