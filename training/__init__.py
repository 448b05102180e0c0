"""Everything that depends on the number of devices: settings, DeepSpeed, steps, checkpoints, runs.

`Pretrainer` and `TrainingArguments` are the Python API; `Pretrainer` is imported when it is first asked for, so
that settings can be read without torch.
"""

from training.config import DataArguments, ModelArguments, TrainingArguments

__all__ = ["DataArguments", "ModelArguments", "Pretrainer", "TrainingArguments"]


def __getattr__(name: str):
    if name == "Pretrainer":
        from training.pretrainer import Pretrainer

        return Pretrainer
    raise AttributeError(f"module 'training' has no attribute {name!r}")
