"""Training: settings, the DeepSpeed engine, steps, checkpoints and the Python API; imports no torch."""
