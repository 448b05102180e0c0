"""Keep `transformers` from taking this repository's `kernels/` for Hugging Face's package of the same name.

`transformers` asks for the *distribution* `kernels`, then imports the *module* `kernels`. With Hugging Face's
distribution installed and this repository first on `sys.path`, the two answers disagree and every model import
breaks. Answering "not available" is right whenever the module that would be imported is ours.
"""

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def shield() -> None:
    """Make `transformers` answer that hub kernels are absent if `import kernels` would find this repository's."""
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None or REPOSITORY not in Path(spec.origin).resolve().parents:
        return
    import transformers.utils
    import transformers.utils.import_utils

    def is_kernels_available(*_args, **_kwargs) -> bool:
        return False

    transformers.utils.is_kernels_available = is_kernels_available
    transformers.utils.import_utils.is_kernels_available = is_kernels_available
