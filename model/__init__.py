"""The network as single-device maths; how it is spread over devices is decided elsewhere.

Tensor names carry their shape, one letter a dimension, in the whole project:

    B batch                H query heads          E experts            N routed rows = T·K
    S sequence             G key-value heads      K experts a token    M memory or cache entries
    T tokens = B·S         C head size            R experts in a page  V vocabulary
    D model width          F expert hidden width  W ranks that share a layer's experts

Importing this package registers the model with the Auto classes of `transformers`.
"""

from model.hub_shield import shield

shield()  # must precede the first import of a transformers model

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from model.causal_lm import PragnosiaForCausalLM  # noqa: E402
from model.config import PragnosiaConfig  # noqa: E402

AutoConfig.register("pragnosia", PragnosiaConfig, exist_ok=True)
AutoModelForCausalLM.register(PragnosiaConfig, PragnosiaForCausalLM, exist_ok=True)

__all__ = ["PragnosiaConfig", "PragnosiaForCausalLM"]
