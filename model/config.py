"""The architecture's hyperparameters and the parameter counts that follow from them."""

from transformers import PretrainedConfig

from model.components import CacheConfig, MemoryConfig


class PragnosiaConfig(PretrainedConfig):
    """A decoder with a Mixture-of-Experts feed-forward in every layer; field names are Qwen3-MoE's.

    routing: token (each token takes its top k of all experts) or step (its top k of a pool of `expert_pool`,
    by default as many experts as a token uses; see `model/step_routing.py`). router_bias: whether token
    routing adds a bias to the choice (see `model/router.py`). memory, cache, tree: the
    components of `model/components.py` that a model has; none of them is Qwen3-MoE.

    Raises:
        ValueError: sizes that do not fit together (names both and the nearest remedy).
    """

    model_type = "pragnosia"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 32768
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    routing: str = "token"
    expert_pool: int | None = None
    router_bias: bool = False
    memory: dict | None = None
    cache: dict | None = None
    tree: dict | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"{self.num_experts_per_tok} active experts cannot be chosen from {self.num_experts}: "
                f"--num-active-experts must be between 1 and --num-experts"
            )
        if self.routing not in ("token", "step"):
            raise ValueError(f"routing {self.routing!r} does not exist: --routing must be token or step")
        if self.routing == "step":
            self.expert_pool = self.num_experts_per_tok if self.expert_pool is None else self.expert_pool
            if not self.num_experts_per_tok <= self.expert_pool <= self.num_experts:
                raise ValueError(
                    f"a pool of {self.expert_pool} of {self.num_experts} experts cannot serve tokens that use "
                    f"{self.num_experts_per_tok}: --expert-pool must be from --num-active-experts to --num-experts"
                )
        elif self.expert_pool is not None:
            raise ValueError(f"--expert-pool {self.expert_pool} needs --routing step")
        if self.router_bias and self.routing == "step":
            raise ValueError(
                "a router with biases needs routing token: step routing balances its pools by itself"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot share {self.num_key_value_heads} key-value "
                f"heads evenly: the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd: rotary embeddings turn pairs, make it even")

    def memory_layers(self) -> list[int]:
        """The decoder layers with a neural memory."""
        return MemoryConfig(**self.memory).layers(self.num_hidden_layers) if self.memory else []

    def check_components(self) -> None:
        """Raises ValueError where a component does not fit the model."""
        if self.memory:
            MemoryConfig(**self.memory).check_depth(self.num_hidden_layers)
        if self.cache and self.routing == "step":
            raise ValueError(
                "cache augmentation needs --routing token: a pool would be chosen by the latents too"
            )

    def layer_params(self) -> int:
        """Parameters of a decoder layer without its experts and memory."""
        width, head_width = self.hidden_size, self.head_dim
        queries, pairs = self.num_attention_heads * head_width, self.num_key_value_heads * head_width
        attention = 2 * width * queries + 2 * width * pairs + 2 * head_width
        return attention + self.num_experts * width + 2 * width  # + router + the two norms

    def _dense_params(self) -> int:
        """Parameters outside the expert banks that a token meets; a coprocessor is not met by each."""
        width, layer = self.hidden_size, self.layer_params()
        embeddings = self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        value_head = (width + 1) ** 2 if self.tree else 0  # two linear layers, to width and to 1, with biases
        return embeddings + self.num_hidden_layers * layer + width + self.memory_params() + value_head

    def memory_params(self) -> int:
        """Parameters of the memories of all layers."""
        return len(self.memory_layers()) * MemoryConfig(**self.memory).num_params() if self.memory else 0

    def expert_params(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def num_params(self) -> int:
        """All parameters of the model."""
        experts = self.num_hidden_layers * self.num_experts * self.expert_params()
        return self._dense_params() + experts + self.coprocessor_params()

    def coprocessor_params(self) -> int:
        """Parameters of the coprocessor."""
        return CacheConfig(**self.cache).num_params(self) if self.cache else 0

    def active_params(self) -> int:
        """Parameters that one token meets."""
        return self._dense_params() + self.num_hidden_layers * self.num_experts_per_tok * self.expert_params()
