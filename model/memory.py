"""Neural memory: a fixed-size associative store beside attention, written and read by the gated delta rule.

A head's state is a matrix S [C, C] that maps keys to values. Token t decays it, replaces what it held under the
token's key by the token's value, and reads it with the token's query (Gated DeltaNet, arXiv 2412.06464, eq. 10;
in parallel to attention as in Titans, arXiv 2501.00663, section 4.2):

    S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ        read_t = S_tᵀ q_t

Training does this in chunks, `chunkwise`, on CUDA in the kernels of flash-linear-attention where it is installed;
generation token by token, `recurrent`, which is also the specification. H are the memory's heads here, and W
counts the chunks of a row, whose length is then S.

Latents of a coprocessor (`model/cache_augmentation.py`) go on from the memory as tokens would, but what they write
is dropped: the state of a text is that of its tokens. In generation a view of the cache drops it. In training each
of the N traces of a row goes on from the memory as it was at its own place.
"""

import functools
import importlib.util
import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import RMSNorm
from model.components import MemoryConfig
from model.config import PragnosiaConfig

# What a projection of 0 gives: exp(−softplus(FORGET_OFFSET)) = 0.993, half of it forgotten in 99 tokens.
FORGET_OFFSET = math.log(math.expm1(-math.log(0.993)))
MOST_HALF_LIFE = 65536  # tokens, in the mean that is logged: a gate that never forgets would make it infinite
STATISTICS = ("beta", "half_life", "read_ratio")


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over the last few tokens of the same document."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.taps = taps  # a partitioned weight has no shape
        self.weight = nn.Parameter(torch.empty(channels, taps))

    @staticmethod
    def first_weight(shape: torch.Size) -> Tensor:
        """The weight before training: a token, and half of the one before it."""
        weight_DK = torch.zeros(shape)
        weight_DK[:, -2:] = torch.tensor([0.5, 1.0])[-shape[1] :]
        return weight_DK

    def forward(self, x_BSD: Tensor, tail_BSD: Tensor, segment_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved channels, and the tail for what comes next.

        tail_BSD [B, taps − 1, D]: the inputs before x_BSD, 0 where of another document. segment_BS: which document
        a token is of, counted from 0, that of the tail.
        """
        length, before = x_BSD.shape[1], tail_BSD.shape[1]
        x_BSD = torch.cat((tail_BSD, x_BSD), dim=1)
        segments_BS = F.pad(segment_BS, (before, 0))
        output_BSD = 0
        for tap in range(before + 1):  # the last one is the token itself
            own_BS = segments_BS[:, tap : tap + length] == segment_BS
            own_BSD = x_BSD[:, tap : tap + length].where(own_BS[..., None], 0)
            output_BSD = output_BSD + self.weight[:, tap] * own_BSD
        ours_BS = segments_BS[:, length:] == segments_BS[:, -1:]
        return output_BSD, x_BSD[:, length:].where(ours_BS[..., None], 0)

    def inputs_at(self, x_BSD: Tensor, segment_BS: Tensor, last_BN: Tensor) -> Tensor:
        """What the outputs of the tokens last_BN are made of, [B, N, taps, D]; nothing stands before x_BSD."""
        before = self.taps - 1
        index_BNK = last_BN[..., None] + torch.arange(self.taps, device=last_BN.device)
        own_BNK = F.pad(segment_BS, (before, 0), value=-1)[:, None].take_along_dim(index_BNK, 2)
        own_BNK = own_BNK == segment_BS.take_along_dim(last_BN, 1)[..., None]
        x_BLD = F.pad(x_BSD, (0, 0, before, 0)).take_along_dim(index_BNK.flatten(1)[..., None], 1)
        return x_BLD.unflatten(1, index_BNK.shape[1:]).where(own_BNK[..., None], 0)


class NeuralMemory(nn.Module):
    """The memory of one layer; its output is added to attention's, and is 0 until `out_proj` is trained.

    `k_proj` begins as `q_proj`, and the convolution adds half of the token before. So from the first step a token
    finds what followed an earlier token like it (the structured start of arXiv 2410.11135); drawn apart, keys and
    queries have nothing in common, and some first weights never learn to recall.
    """

    def __init__(self, config: PragnosiaConfig, layer_idx: int):
        super().__init__()
        memory = MemoryConfig(**config.memory)
        width, self.heads, self.head_dim = memory.memory_size, memory.num_heads, memory.head_dim
        self.layer_idx, self.chunk_size, self.dropout = layer_idx, memory.chunk_size, memory.dropout
        self.num_latents = config.cache["num_latents"] if config.cache else 0
        self.rule = delta_rule  # ablations have another
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.conv = ShortConvolution(3 * width, memory.conv_size)
        self.beta_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.alpha_proj = nn.Linear(config.hidden_size, self.heads)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, input_BSD: Tensor, hidden_BSD: Tensor, documents_BM: Tensor | None = None, cache=None
    ) -> tuple[Tensor, Tensor]:
        """What the memory adds to the residual stream hidden_BSD, of which input_BSD is the normalised form.

        documents_BM: [B, past + S] integers, 0 where a token is padding, whose key is 0, so that it is not
        written; a change resets the memory. None: one document. With a cache, one that `hold_states` has seen,
        the state goes on from it; a first pass also keeps what stands around the tokens `traces` [B, N] that the
        cache names, and a pass over such a cache is over a block for each of them, its latents first.
        Also returns fp32 [3, 2] without gradient, (sum, count) over real tokens for each of `STATISTICS`.
        """
        states = {} if cache is None else cache.layers[self.layer_idx].states
        if "memory_at" not in states:
            return self.go_on(input_BSD, hidden_BSD, documents_BM, states)
        num_traces, before, results = states["memory_at"].shape[1], self.conv.taps - 1, []
        blocks = [x.unflatten(1, (num_traces, -1)) for x in (input_BSD, hidden_BSD)]
        # Latents come after a trace's token; the tokens of its block begin with that token, so come before it.
        for after, part in ((1, slice(self.num_latents)), (0, slice(self.num_latents, None))):
            if blocks[0][:, :, part].numel():
                own = {
                    "memory": states["memory_at"][:, :, after].flatten(0, 1),
                    "memory_tail": states["memory_inputs_at"][:, :, after : after + before].flatten(0, 1),
                }
                results.append(self.go_on(*(x[:, :, part].flatten(0, 1) for x in blocks), None, own))
        added = [part_XSD.unflatten(0, (-1, num_traces)) for part_XSD, _ in results]
        return torch.cat(added, dim=2).flatten(1, 2), sum(statistics_32 for _, statistics_32 in results)

    def go_on(
        self, input_BSD: Tensor, hidden_BSD: Tensor, documents_BM: Tensor | None, states: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`forward` from the states of a layer, which then are those after the last token."""
        batch, length, _ = input_BSD.shape
        valid_BS, segment_BS = places(documents_BM, batch, length, input_BSD.device)
        projected_BSD = torch.cat(
            (self.q_proj(input_BSD), self.k_proj(input_BSD), self.v_proj(input_BSD)), dim=-1
        ).where(valid_BS[..., None], 0)
        tail_BSD = states.get("memory_tail")
        if tail_BSD is None:
            tail_BSD = projected_BSD.new_zeros(batch, self.conv.taps - 1, projected_BSD.shape[2])
        convolved_BSD, tail_BSD = self.conv(projected_BSD, tail_BSD, segment_BS)
        heads = F.silu(convolved_BSD).view(batch, length, 3, self.heads, self.head_dim)
        q_BSHC, k_BSHC, v_BSHC = heads.unbind(2)
        wide = torch.promote_types(input_BSD.dtype, torch.float32)
        beta_BSH = self.beta_proj(input_BSD).to(wide).sigmoid()
        decay_BSH = -F.softplus(self.alpha_proj(input_BSD).to(wide) + FORGET_OFFSET)
        state_BHCC = states.get("memory")
        if state_BHCC is None:
            state_BHCC = beta_BSH.new_zeros(batch, self.heads, self.head_dim, self.head_dim)
        rows = (unit(q_BSHC), unit(k_BSHC), v_BSHC, beta_BSH, decay_BSH, segment_BS)
        if "traces" in states:
            last_BN = states.pop("traces")
            states["memory_inputs_at"] = self.conv.inputs_at(projected_BSD, segment_BS, last_BN)
            read_BSHC, state_BHCC, states["memory_at"] = with_states_at(
                last_BN, self.rule, rows, state_BHCC, self.chunk_size
            )
        else:
            read_BSHC, state_BHCC = self.rule(*rows, state_BHCC, self.chunk_size)
        states.update(memory=state_BHCC, memory_tail=tail_BSD)
        read_BSD = self.norm(read_BSHC.to(input_BSD.dtype)).flatten(2) * F.silu(self.gate_proj(input_BSD))
        learns = self.training and self.out_proj.weight.requires_grad
        added_BSD = self.out_proj(F.dropout(read_BSD, self.dropout, learns))
        with torch.no_grad():
            half_life_BSH = (-math.log(2) / decay_BSH).clamp(max=MOST_HALF_LIFE)
            ratio_BS = added_BSD.norm(dim=-1).float() / hidden_BSD.norm(dim=-1).float().clamp(min=1e-12)
            means_3BS = torch.stack((beta_BSH.mean(-1), half_life_BSH.mean(-1), ratio_BS)).float()
            sums_3 = (means_3BS * valid_BS).flatten(1).sum(1)
            statistics_32 = torch.stack((sums_3, valid_BS.sum().float().expand(3)), dim=1)
        return added_BSD, statistics_32


def memory_sums(statistics: list) -> dict[str, Tensor]:
    """What the memories of a model report in one forward, for `CausalLMOutput.component_sums`.

    statistics: `LayerStatistics` of every layer.
    """
    sums_32 = sum(layer.memory_32.detach() for layer in statistics if layer.memory_32 is not None)
    return {f"neural_memory/{name}": sums_2 for name, sums_2 in zip(STATISTICS, sums_32, strict=True)}


def places(documents_BM: Tensor | None, batch: int, length: int, device) -> tuple[Tensor, Tensor]:
    """Which of a row's last `length` tokens are real [B, S] bool, and their document, counted from 0 for the one
    that the token before them is of, or that the row begins with."""
    if documents_BM is None:
        segment_BS = torch.zeros(batch, length, dtype=torch.int64, device=device)
        return segment_BS == 0, segment_BS
    before_BM = torch.cat((documents_BM[:, :1], documents_BM[:, :-1]), dim=1)
    segment_BS = (documents_BM != before_BM)[:, -length:].cumsum(1)
    return documents_BM[:, -length:] > 0, segment_BS


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖ over the last dimension, computed in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def delta_rule(
    q_BSHC: Tensor,
    k_BSHC: Tensor,
    v_BSHC: Tensor,
    beta_BSH: Tensor,
    decay_BSH: Tensor,
    segment_BS: Tensor,
    state_BHCC: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The reads of all tokens [B, S, H, C], and the state after them.

    decay_BSH: log α. beta_BSH and decay_BSH 0: the token leaves the state as it is. segment_BS: ascending; the
    state that is given is that of segment 0, and a new segment begins with zeros. q, k and v have the model's
    dtype, the rest and what is computed fp32 (fp64 with an fp64 model).
    """
    kernel = (
        fused_delta_rule() if q_BSHC.is_cuda and q_BSHC.dtype in (torch.bfloat16, torch.float16) else None
    )
    if kernel is not None and q_BSHC.shape[1] > 1:
        return fused(kernel, q_BSHC, k_BSHC, v_BSHC, beta_BSH, decay_BSH, segment_BS, state_BHCC)
    q_BHSC, k_BHSC, v_BHSC = (x.transpose(1, 2).to(state_BHCC.dtype) for x in (q_BSHC, k_BSHC, v_BSHC))
    rows = (q_BHSC, k_BHSC, v_BHSC, beta_BSH.transpose(1, 2), decay_BSH.transpose(1, 2), segment_BS)
    if q_BSHC.shape[1] == 1:
        read_BHSC, state_BHCC = recurrent(*rows, state_BHCC)
    else:
        read_BHSC, state_BHCC = chunkwise(*rows, state_BHCC, chunk_size)
    return read_BHSC.transpose(1, 2), state_BHCC


def with_states_at(
    last_BN: Tensor, rule, rows: tuple[Tensor, ...], state_BHCC: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a rule says of rows, and the states [B, N, 2, H, C, C] before and after the tokens last_BN.

    rows: q to segment_BS of `delta_rule`. The states before are read: a token with k, β and log α of 0 leaves the
    state as it is, and with the c-th unit vector as q reads its row c. So a trace costs C tokens more, and of the
    other states none is kept.
    """
    q_BSHC, segment_BS = rows[0], rows[-1]
    (batch, length, heads, size), num_traces, device = q_BSHC.shape, last_BN.shape[1], q_BSHC.device
    # A token's place is 2 t, and that of what reads before it 2 t − 1.
    place_BS = 2 * torch.arange(length, device=device).expand(batch, -1)
    place_BT = torch.cat((place_BS, (2 * last_BN - 1).repeat_interleave(size, 1)), 1)
    order_BT, row_B1 = place_BT.argsort(dim=1, stable=True), torch.arange(batch, device=device)[:, None]
    q_PHC = torch.eye(size, dtype=q_BSHC.dtype, device=device).repeat(num_traces, 1)[:, None]
    readers = [
        q_PHC.expand(batch, -1, heads, -1),
        *(x.new_zeros(batch, len(q_PHC), *x.shape[2:]) for x in rows[1:-1]),
        segment_BS.take_along_dim(last_BN, 1).repeat_interleave(size, 1),
    ]
    ordered = (torch.cat(pair, 1)[row_B1, order_BT] for pair in zip(rows, readers, strict=True))
    read_BTHC, left_BHCC = rule(*ordered, state_BHCC, chunk_size)
    read_BTHC = read_BTHC[row_B1, order_BT.argsort(dim=1)]
    before_BNCHC = read_BTHC[:, length:].to(state_BHCC.dtype).unflatten(1, (num_traces, size))
    before_BNHCC = before_BNCHC.transpose(2, 3)
    own = (x[row_B1, last_BN].flatten(0, 1)[:, None] for x in (*rows[:-1], torch.zeros_like(segment_BS)))
    _, after_XHCC = rule(*own, before_BNHCC.flatten(0, 1), chunk_size)
    at_BN2HCC = torch.stack((before_BNHCC, after_XHCC.view_as(before_BNHCC)), dim=2)
    return read_BTHC[:, :length], left_BHCC, at_BN2HCC


def recurrent(
    q_BHSC: Tensor,
    k_BHSC: Tensor,
    v_BHSC: Tensor,
    beta_BHS: Tensor,
    decay_BHS: Tensor,
    segment_BS: Tensor,
    state_BHCC: Tensor,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` token by token."""
    reads = []
    continues_BS = segment_BS == F.pad(segment_BS, (1, 0))[:, :-1]
    for t in range(q_BHSC.shape[2]):
        k_BHC1 = k_BHSC[:, :, t, :, None]
        state_BHCC = state_BHCC.where(continues_BS[:, t, None, None, None], 0)
        state_BHCC = state_BHCC * decay_BHS[:, :, t, None, None].exp()
        wrong_BH1C = v_BHSC[:, :, t, None] - k_BHC1.mT @ state_BHCC
        state_BHCC = state_BHCC + k_BHC1 * beta_BHS[:, :, t, None, None] * wrong_BH1C
        reads.append(q_BHSC[:, :, t, None] @ state_BHCC)
    return torch.cat(reads, dim=2), state_BHCC


def chunkwise(
    q_BHSC: Tensor,
    k_BHSC: Tensor,
    v_BHSC: Tensor,
    beta_BHS: Tensor,
    decay_BHS: Tensor,
    segment_BS: Tensor,
    state_BHCC: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` a chunk at a time (arXiv 2412.06464, section 3.3).

    Token i of a chunk writes k_i u_iᵀ with u_i = β_i (v_i − S_{i−1}ᵀ α_i k_i). With D_ij the decay from j to i,
    D_i that from the chunk's beginning, and S the state there,

        u_i + β_i Σ_{j<i} D_ij (k_i · k_j) u_j = β_i v_i − β_i D_i Sᵀ k_i,

    one unit lower triangular system a chunk, solved for all chunks at once with the two parts of its right side
    apart, as S is known only chunk after chunk. Decays across the border of two documents are exactly 0, and a
    sum of logarithms never crosses one, so nothing of one document changes a bit of another.
    """
    length = q_BHSC.shape[2]
    size = min(chunk_size, length)
    missing = -length % size
    q_BHWSC, k_BHWSC, v_BHWSC = (
        F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size)) for x in (q_BHSC, k_BHSC, v_BHSC)
    )
    beta_BHWS, decay_BHWS = (F.pad(x, (0, missing)).unflatten(2, (-1, size)) for x in (beta_BHS, decay_BHS))
    last_BS = segment_BS[:, -1:].expand(-1, missing)
    segment_BWS = torch.cat((segment_BS, last_BS), dim=1).unflatten(1, (-1, size))
    entering_BW1 = F.pad(segment_BWS[:, :-1, -1:], (0, 0, 1, 0))
    same_B1WSS = (segment_BWS[..., :, None] == segment_BWS[..., None, :]).tril()[:, None]

    below_SS = torch.ones(size, size, dtype=torch.bool, device=q_BHSC.device).tril(-1)
    logs_BHWSS = (
        decay_BHWS[..., None].where(below_SS, 0).cumsum(-2)
    )  # [i, j]: over the tokens after j up to i
    decay_BHWSS = logs_BHWSS.exp().where(same_B1WSS, 0)
    since_BHWS1 = (decay_BHWS.cumsum(-1).exp() * (segment_BWS == entering_BW1)[:, None])[..., None]
    until_BHWS1 = decay_BHWSS[..., -1, :, None]

    erase_BHWSS = (
        beta_BHWS[..., None] * (k_BHWSC @ k_BHWSC.mT) * decay_BHWSS
    )  # the solve ignores the diagonal
    right_BHWSC = beta_BHWS[..., None] * torch.cat((v_BHWSC, since_BHWS1 * k_BHWSC), dim=-1)
    new_BHWSC, old_BHWSC = torch.linalg.solve_triangular(
        erase_BHWSS, right_BHWSC, upper=False, unitriangular=True
    ).chunk(2, dim=-1)
    within_BHWSS = (q_BHWSC @ k_BHWSC.mT) * decay_BHWSS
    q_BHWSC, k_BHWSC = q_BHWSC * since_BHWS1, k_BHWSC * until_BHWS1
    reads = []
    for w in range(q_BHWSC.shape[2]):
        u_BHSC = new_BHWSC[:, :, w] - old_BHWSC[:, :, w] @ state_BHCC
        reads.append(q_BHWSC[:, :, w] @ state_BHCC + within_BHWSS[:, :, w] @ u_BHSC)
        state_BHCC = since_BHWS1[:, :, w, -1:] * state_BHCC + k_BHWSC[:, :, w].mT @ u_BHSC
    return torch.cat(reads, dim=2)[:, :, :length], state_BHCC


@functools.cache
def fused_delta_rule():
    """`chunk_gated_delta_rule` of flash-linear-attention, or None where it is not installed or cannot train."""
    try:  # by name: an exported model must load without them
        rule = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        triton = importlib.import_module("triton").__version__
    except ImportError:
        return None
    has_tilelang = importlib.util.find_spec("tilelang") is not None
    return None if refuses_backward(torch.cuda.get_device_capability(), triton) and not has_tilelang else rule


def refuses_backward(capability: tuple[int, int], triton: str) -> bool:
    """Whether flash-linear-attention has no right backward without tilelang: on Hopper with Triton 3.4.0 to 3.7.0
    (github.com/fla-org/flash-linear-attention, issue 640)."""
    version = tuple(int(part) for part in re.findall(r"\d+", triton)[:3])
    return capability[0] == 9 and (3, 4, 0) <= version < (3, 7, 1)


def fused(
    kernel, q_BSHC: Tensor, k_BSHC: Tensor, v_BSHC: Tensor, beta_BSH: Tensor, decay_BSH: Tensor,
    segment_BS: Tensor, state_BHCC: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta_rule` in a kernel: all segments of all rows as sequences of one long row, with a state each."""
    batch, length = segment_BS.shape
    rows = torch.arange(batch, device=segment_BS.device)
    first_BS = segment_BS != F.pad(segment_BS, (1, 0))[:, :-1]
    continues_B = ~first_BS[:, 0]
    first_BS[:, 0] = True
    starts_N = first_BS.flatten().nonzero()[:, 0]
    ends = F.pad(starts_N, (0, 1), value=batch * length)
    place_T = first_BS.flatten().cumsum(0) - 1  # the sequence that a token is of
    initial_NHCC = state_BHCC.new_zeros(len(starts_N), *state_BHCC.shape[1:]).index_copy(
        0, place_T[rows * length], state_BHCC * continues_B[:, None, None, None]
    )
    flat = (x.flatten(0, 1)[None] for x in (q_BSHC, k_BSHC, v_BSHC, decay_BSH, beta_BSH))
    read_1TNC, final_NHCC = kernel(
        *flat, scale=1.0, initial_state=initial_NHCC, output_final_state=True, cu_seqlens=ends
    )
    last_BHCC = final_NHCC[place_T[rows * length + length - 1]]
    return read_1TNC[0].unflatten(0, (batch, length)), last_BHCC
