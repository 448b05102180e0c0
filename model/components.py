"""Hyperparameters of the reasoning components; a model has a component where its configuration has these."""

from dataclasses import dataclass

PATH_SCORES = ("product", "min", "last")
LORA_RANK = 16
COPROCESSORS = ("light", "copy", "lora", "soft", "pause")
SEARCHES = ("bfs", "dfs", "best_of_n")


@dataclass
class MemoryConfig:
    """A neural memory beside attention (`model/memory.py`).

    memory_size: slots, heads times head_dim; a head holds head_dim independent associations. num_memory_layers:
    decoder layers with a memory, evenly spread. window: tokens that attention sees in those layers (None: all);
    at least one layer in four keeps the whole context.

    Raises:
        ValueError: sizes that do not fit together.
    """

    hidden_size: int
    memory_size: int = 2048
    num_memory_layers: int = 3
    dropout: float = 0.1
    head_dim: int | None = None
    conv_size: int = 4
    chunk_size: int = 64
    window: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = 128 if self.hidden_size >= 1024 else 64
        if self.memory_size % self.head_dim:
            raise ValueError(
                f"a memory of {self.memory_size} slots cannot be cut into heads of {self.head_dim}: "
                f"make --memory-size a multiple of it"
            )

    @property
    def num_heads(self) -> int:
        """Heads of a memory."""
        return self.memory_size // self.head_dim

    def layers(self, num_hidden_layers: int) -> list[int]:
        """The decoder layers that have a memory: the middles of as many equal parts."""
        count = self.num_memory_layers
        return [(2 * part + 1) * num_hidden_layers // (2 * count) for part in range(count)]

    def num_params(self) -> int:
        """Parameters of one layer's memory."""
        width, size = self.hidden_size, self.memory_size
        gates = (2 * width + 1) * self.num_heads
        return 5 * width * size + 3 * size * self.conv_size + gates + self.head_dim

    def check_depth(self, num_hidden_layers: int) -> None:
        """Raises ValueError where a decoder of that many layers cannot have this memory."""
        count = self.num_memory_layers
        if not 1 <= count <= num_hidden_layers:
            raise ValueError(
                f"{count} memory layers in a model of {num_hidden_layers}: "
                f"--memory-layers must be from 1 to {num_hidden_layers}"
            )
        most = num_hidden_layers - -(-num_hidden_layers // 4)
        if self.window is not None and count > most:
            remedy = f"use --memory-layers {most} or leave out --memory-window" if most else "leave it out"
            raise ValueError(
                f"a window of {self.window} tokens in {count} of {num_hidden_layers} layers: at least one layer "
                f"in four must see the whole context, {remedy}"
            )


@dataclass
class CacheConfig:
    """A coprocessor that reads the key-value cache and appends latents to it (`model/cache_augmentation.py`).

    coprocessor: light (cross-attention over the cache; num_heads heads, coprocessor_layers layers), copy (the
    model itself with weights of its own) or lora (the model with a low-rank update); to compare with, soft (the
    model as it is, with learnt queries) or pause (latents that are learnt and read nothing). max_cache_length:
    newest entries that it reads. retrieval_factor: weight of the latents in the model's attention, 0 is the model
    without them. update_freq: generated tokens between its runs, 0: once, at the end of the prompt. num_traces
    places in a row and num_ahead_tokens tokens after each are what it learns from.

    Raises:
        ValueError: a number out of its range, heads that do not fit the width, or an unknown coprocessor.
    """

    hidden_size: int
    num_heads: int = 8
    max_cache_length: int = 65536
    dropout: float = 0.1
    retrieval_factor: float = 1.0
    num_latents: int = 16
    num_ahead_tokens: int = 16
    num_traces: int = 8
    coprocessor: str = "light"
    coprocessor_layers: int = 2
    update_freq: int = 0

    def __post_init__(self) -> None:
        positive = ("max_cache_length", "num_latents", "num_ahead_tokens", "num_traces", "coprocessor_layers")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} of a cache augmentation must be at least 1")
        if min(self.retrieval_factor, self.update_freq) < 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"retrieval_factor {self.retrieval_factor} and update_freq {self.update_freq} must be at least 0, "
                f"dropout {self.dropout} from 0 to below 1"
            )
        if self.coprocessor not in COPROCESSORS:
            raise ValueError(
                f"coprocessor {self.coprocessor!r} does not exist: use {', '.join(COPROCESSORS)}"
            )
        if self.coprocessor == "light" and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"a width of {self.hidden_size} cannot be cut into {self.num_heads} heads of even size: "
                f"choose other --cache-heads"
            )

    def num_params(self, config) -> int:
        """Parameters of the coprocessor in a model of this `PragnosiaConfig`."""
        width, depth = config.hidden_size, config.num_hidden_layers
        queries = config.num_attention_heads * config.head_dim
        pairs = config.num_key_value_heads * config.head_dim
        if self.coprocessor == "pause":
            return self.num_latents * width
        total = self.num_latents * width + width + width**2  # queries, norm and projection
        if self.coprocessor == "light":
            entries = 2 * depth * pairs * width + width + width**2
            return total + entries + self.coprocessor_layers * (12 * width**2 + 2 * width)
        if self.coprocessor == "lora":
            return total + depth * 2 * LORA_RANK * (2 * width + queries + pairs)
        if self.coprocessor == "soft":
            return total
        layer = config.layer_params() + config.num_experts * config.expert_params()
        return total + width + depth * layer + config.memory_params()


@dataclass
class TreeConfig:
    """A value head, and a search over steps of reasoning (`inference/tree_of_thoughts.py`).

    beam_width: partial solutions that are kept. branching: steps proposed for each (None: twice beam_width).
    max_depth: steps that are searched; what comes after them is written without a choice. path_score: how the
    values of a path's steps make its score. search: bfs, dfs or best_of_n (beam_width times branching whole
    solutions). temperature and top_k are of the proposals alone; pruning_threshold is a value.

    Raises:
        ValueError: a number out of its range, or a name that does not exist.
    """

    hidden_size: int
    beam_width: int = 4
    max_depth: int = 3
    temperature: float = 0.7
    pruning_threshold: float = 0.1
    top_k: int = 50
    branching: int | None = None
    path_score: str = "product"
    search: str = "bfs"
    max_thought_tokens: int = 64
    value_loss_weight: float = 0.5

    def __post_init__(self) -> None:
        if self.branching is None:
            self.branching = 2 * self.beam_width
        for name in ("beam_width", "branching", "max_depth", "top_k", "max_thought_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} of a tree of thoughts must be at least 1")
        if self.temperature < 0 or not 0 <= self.pruning_threshold <= 1:
            raise ValueError(
                f"temperature {self.temperature} must be at least 0 and pruning_threshold "
                f"{self.pruning_threshold} between 0 and 1"
            )
        for name, known in (("path_score", PATH_SCORES), ("search", SEARCHES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} does not exist: use {', '.join(known)}")
