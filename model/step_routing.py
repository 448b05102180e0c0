"""Step routing: each layer picks a pool of M experts, and tokens choose within it.

In training one pool serves a whole microbatch on all ranks, so a placement that streams experts moves M of the E.
It is chosen from the router's probabilities of all the microbatch's tokens, and so a token sees a little of what
comes after it. Evaluation and generation must not: there each token has the pool that its own prefix chooses.
`training_choice` measures the difference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from kernels.dispatch import route
from kernels.reference import RouterStatistics, Routing
from model.config import PragnosiaConfig
from model.router import Router

BALANCE_RATE = 0.1
"""Nats that an expert loses in the choice of the pool for each use above the mean.

A higher rate forgets the microbatch's own preferences, a lower one balances late. In two small runs (16 experts, a
pool of 4, 300 and 700 microbatches) the losses at 0.03, 0.1 and 0.3 lay within 0.1 nats of one another, in another
order each time; at 0.1 all counts ended within 2 of the mean, at 0.01 within 16, and at 0 one expert was in almost
every pool.
"""


@dataclass
class PoolChoice:
    """What one layer may choose its pool from in one forward pass, and what it chose.

    batch: B. mask: attention's own, [B, 1, S, past + S], or None for plain causal. cache: one that
    `hold_states` has seen, or None. pool_E (bool): the pool of a training forward. The object goes with the
    layer into activation checkpointing: a recompute finds the pool here, and neither chooses nor counts
    again.
    """

    batch: int
    mask: Tensor | None
    cache: DynamicCache | None
    layer_idx: int
    pool_E: Tensor | None = None


class StepRouter(Router):
    """A router whose tokens take their top k within a pool of M experts.

    Training: score_E = Σ of the softmax probabilities over the real tokens of all ranks, and the pool is the
    M largest of

        log(mean probability) − BALANCE_RATE · (uses_E − mean uses),

    the lowest ids among equals. uses_E counts the microbatches whose pool an expert was in. This is integral
    control: an expert that the router likes less waits until the others are far enough ahead, and over many
    microbatches all are used equally often. There is no gradient through the choice; the router learns from
    the weights of the chosen experts and from the z and balance losses. The balance loss is over all E: in a
    microbatch only experts of the pool have a share, so it lowers the probabilities of those that are in the
    pool and busy, and, as pools take turns, of all that the router prefers.

    Evaluation and generation: the pool of a token is the M largest of Σ of the probabilities over the tokens
    that it attends to: those of its document up to itself, without padding. With a cache the sums so far lie
    in it.

    uses_E (int64) is no part of the state dict: it belongs to a run, not to a model (see `pool_uses`). A
    microbatch without real tokens, or with probabilities that are not numbers, is not counted.
    """

    def __init__(self, config: PragnosiaConfig):
        super().__init__(config)
        self.pool_size = config.expert_pool
        self.as_in_training = False
        self.register_buffer("uses_E", torch.zeros(config.num_experts, dtype=torch.int64), persistent=False)

    def forward(
        self, hidden_TD: Tensor, valid_T: Tensor | None, choice: PoolChoice
    ) -> tuple[Routing, RouterStatistics]:
        """In training every rank must call this equally often: ranks agree on the pool."""
        logits_TE = F.linear(hidden_TD, self.weight)
        with torch.no_grad():
            probs_TE = logits_TE.float().softmax(-1)
            if not (self.training or self.as_in_training):
                allowed = self._pools_of_prefixes(probs_TE, choice)
            else:
                if choice.pool_E is None:
                    choice.pool_E = self._pool_of_microbatch(probs_TE, valid_T)
                allowed = choice.pool_E
        return route(logits_TE, self.num_active, self.renormalise, valid_T, allowed)

    def _pool_of_microbatch(self, probs_TE: Tensor, valid_T: Tensor | None) -> Tensor:
        """The pool [E] bool of all ranks' tokens; counts it in training."""
        if valid_T is not None:
            probs_TE = probs_TE.where(valid_T[:, None], 0)
        score_E = probs_TE.sum(0)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(score_E)
        tokens = score_E.sum()  # a token's probabilities sum to 1
        ahead_E = self.uses_E - self.uses_E.double().mean()
        tiny = torch.finfo(score_E.dtype).tiny
        pool_E = largest((score_E / tokens).clamp(min=tiny).log() - BALANCE_RATE * ahead_E, self.pool_size)
        if self.training:
            self.uses_E += pool_E & (tokens > 0)
        return pool_E

    def _pools_of_prefixes(self, probs_TE: Tensor, choice: PoolChoice) -> Tensor:
        """The pool of each token, [T, E] bool; adds this forward's tokens to the sums in the cache."""
        probs_BSE = probs_TE.view(choice.batch, -1, probs_TE.shape[1])
        length = probs_BSE.shape[1]
        if choice.mask is None:
            sees = torch.ones(length, length, device=probs_TE.device).tril()
        else:
            own = choice.mask[:, 0, :, -length:]
            sees = (own if own.dtype == torch.bool else own == 0).to(probs_TE.dtype)
        sums_BSE = sees @ probs_BSE
        if choice.cache is not None:
            states = choice.cache.layers[choice.layer_idx].states
            if "pool_sums" in states:
                sums_BSE = sums_BSE + states["pool_sums"][:, None]
            states["pool_sums"] = sums_BSE[:, -1]
        return largest(sums_BSE, self.pool_size).flatten(0, 1)


def largest(score: Tensor, count: int) -> Tensor:
    """Bool, where the `count` largest of the last dimension are; the first among equals."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def step_routers(model: nn.Module) -> list[StepRouter]:
    """The routers of a model, or of an engine around one, in order; none with token routing."""
    return [module for module in model.modules() if isinstance(module, StepRouter)]


@contextmanager
def training_choice(model: nn.Module) -> Iterator[None]:
    """Within it an evaluation chooses pools as training does, from the whole microbatch, and counts none.

    Every rank must then call the model equally often.
    """
    for router in step_routers(model):
        router.as_in_training = True
    try:
        yield
    finally:
        for router in step_routers(model):
            router.as_in_training = False


def pool_uses(model: nn.Module) -> list[list[int]]:
    """uses_E of every layer, for a checkpoint; DeepSpeed's own loses buffers where the number of ranks changes."""
    return [router.uses_E.tolist() for router in step_routers(model)]


def restore_pool_uses(model: nn.Module, uses: list[list[int]]) -> None:
    """Undo `pool_uses`."""
    for router, uses_E in zip(step_routers(model), uses, strict=True):
        router.uses_E.copy_(torch.tensor(uses_E))
