"""Hyperparameters of the reasoning components; a model has a component where its configuration has these."""

from dataclasses import dataclass


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


@dataclass
class CacheConfig:
    """A coprocessor that reads the key-value cache and appends latents to it (`model/cache_augmentation.py`)."""

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


@dataclass
class TreeConfig:
    """A value head, and a search over steps of reasoning (`inference/tree_of_thoughts.py`)."""

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
