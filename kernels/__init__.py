"""Operations of the model: a plain PyTorch specification of each (`reference.py`) and its faster versions.

Hugging Face publishes a package of this name and `transformers` looks for it, so this file must import nothing
and carry a version below every release of theirs; `model/hub_shield.py` closes the remaining gap.
"""

__version__ = "0.0.0"
