"""Training: settings, the DeepSpeed engine, steps, checkpoints and the Python API. Imports no torch by itself."""
