"""`streamed`: banks in host memory, passed through a ring of GPU slots page by page, and updated on the way.

Forward fetches a page's weights, computes with them and forgets them. Backward fetches weights and optimizer
state, recomputes what lies inside the experts, and runs the optimizer at once: weights and state go back, and
gradients never leave the GPU. What autograd keeps of a bank is its input, in token order, and the routing.

So the update of experts differs from that of dense parameters in three ways. Gradients are clipped expert by
expert, for the global norm is not known when they are used. An expert without a gradient in a step is left as it
is: no weight decay, no decay of its moments (a lazy update), and its own count of updates for Adam's bias
correction. An expert whose gradient is not finite is refused alone.

Over several ranks each holds a slice of every expert: a fetch is the slice and an all-gather, gradients are
reduce-scattered, and each rank updates its slice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experts.host_memory import near, return_free_memory
from experts.nvme_store import Disk, NvmeStore
from experts.page import Groups, grouped_matmul, grouped_outer
from experts.placement import Placement
from experts.ring import Slot, SlotRing, gather_rows, make_slot
from experts.store import PROJECTIONS, BankStore, Page, RowLayout, accumulator, quantities
from kernels.adamw import AdamW, accumulate_rows, clip_factors, sum_of_squares, update_rows
from kernels.dispatch import combine, unpermute
from kernels.reference import Routing, inverse, swiglu


@dataclass(frozen=True)
class StreamSettings:
    """How experts are streamed and updated; sizes as `training.plan` chose them."""

    page_size: int
    num_slots: int
    state: str
    """fp32, bf16 or int8: how moments are kept."""
    accumulate: bool
    """Whether an update has several microbatches."""
    fetch_all: bool
    """Whether forward fetches every expert, which can begin before the router has chosen."""
    max_norm: float
    """Gradient norm at which an expert is clipped; 0: never."""
    adamw: AdamW
    """As it begins: learning rate and weight decay are those of `Placement.groups` later."""
    seed: int
    disk_layers: int = 0
    """How many layers lie in files under `nvme_path`, the others in memory."""
    nvme_path: str | None = None
    frozen: bool = False
    """Whether experts stay as they are: backward only passes through them, and there is no optimizer state."""


class StreamedBank(nn.Module):
    """One layer's experts: no parameters, only a place in the stream."""

    recomputes = True

    def __init__(self, experts: StreamedExperts, layer: int):
        super().__init__()
        self.stream, self.layer = experts, layer

    def forward(self, hidden_TD: Tensor, routing: Routing, first=None) -> Tensor:
        """first: where a checkpointed layer's first pass leaves its visit; the second makes the graph alone."""
        return StreamedFunction.apply(self.stream, self.layer, hidden_TD, routing.weights_TK, routing, first)


@dataclass
class Visit:
    """One microbatch's passage through a layer: first forward, then `pages` are those of backward.

    starts: where each expert's rows begin on this rank, and where the last end. used: experts with rows on any
    rank. boundary: backward updates the weights, and does not only add up gradients.
    """

    layer: int
    order_N: Tensor
    starts: list[int]
    used: list[int]
    pages: list[Page]
    boundary: bool = True


@dataclass
class VisitedPage:
    """A page in its slot, the rows of its experts, and what goes back to the store. X is 2 F: gate above up."""

    slot: Slot
    rows: slice
    groups: Groups
    gate_up_RXD: Tensor
    down_RDF: Tensor
    changed: tuple[str, ...] = ()


class StreamedFunction(torch.autograd.Function):
    """A bank's output; its backward also updates the bank."""

    @staticmethod
    def forward(ctx, stream, layer: int, hidden_TD: Tensor, weights_TK: Tensor, routing: Routing, first):
        second = getattr(first, "visit", None)
        ctx.stream, ctx.visit = stream, second or stream.begin(layer, routing)
        ctx.save_for_backward(hidden_TD, weights_TK, ctx.visit.order_N)
        if second:
            return torch.zeros_like(hidden_TD)
        token_N = routing.order_N // weights_TK.shape[1]
        rows_ND = hidden_TD.new_empty(len(token_N), hidden_TD.shape[1])
        for page in stream.visited(ctx.visit):
            if page.rows.stop > page.rows.start:
                middle_NF = swiglu(*gate_and_up(hidden_TD[token_N[page.rows]], page))
                rows_ND[page.rows] = grouped_matmul(middle_NF, page.down_RDF.transpose(1, 2), page.groups)
        if first is not None:
            first.visit = ctx.visit
        if first is not None or ctx.needs_input_grad[2]:
            stream.expect_backward(ctx.visit)
        return combine(rows_ND, routing)

    @staticmethod
    def backward(ctx, grad_TD: Tensor):
        hidden_TD, weights_TK, order_N = ctx.saved_tensors
        stream, frozen = ctx.stream, ctx.stream.settings.frozen
        token_N = order_N // weights_TK.shape[1]
        weight_N = weights_TK.flatten()[order_N].to(hidden_TD.dtype)
        grad_rows_ND = hidden_TD.new_zeros(len(token_N), hidden_TD.shape[1])
        grad_weight_N = torch.zeros_like(weight_N, dtype=torch.float32)
        for page in stream.visited(ctx.visit):
            rows, gradients = page.rows, None
            if rows.stop > rows.start:
                tokens = token_N[rows]
                grad_rows_ND[rows], grad_weight_N[rows], *gradients = page_backward(
                    hidden_TD[tokens], grad_TD[tokens], weight_N[rows], page, frozen
                )
            if not frozen:
                stream.use_gradients(ctx.visit, page, gradients)
        stream.end_backward(ctx.visit)
        places_TK = inverse(order_N).view_as(weights_TK)
        grad_weights_TK = grad_weight_N[places_TK].to(weights_TK.dtype)
        return None, None, unpermute(grad_rows_ND, places_TK), grad_weights_TK, None, None


def gate_and_up(input_ND: Tensor, page: VisitedPage) -> tuple[Tensor, Tensor]:
    """Both projections of each row, in one product."""
    return grouped_matmul(input_ND, page.gate_up_RXD.transpose(1, 2), page.groups).chunk(2, dim=1)


def page_backward(
    input_ND: Tensor, grad_ND: Tensor, weight_N: Tensor, page: VisitedPage, frozen: bool
) -> tuple[Tensor, ...]:
    """Gradients of a page's rows, of their routing weights and, unless `frozen`, of the two weight arrays.

    grad_ND is that of the combined output, before the routing weight of a row. The weight of row n has gradient
    ⟨output, grad⟩ = ⟨middle, downᵀ grad⟩, so the down projection is not computed again.
    """
    gate_NF, up_NF = gate_and_up(input_ND, page)
    silu_NF = torch.nn.functional.silu(gate_NF)
    middle_NF = silu_NF * up_NF
    grad_middle_NF = grouped_matmul(grad_ND, page.down_RDF, page.groups)
    grad_weight_N = (middle_NF * grad_middle_NF).sum(1, dtype=torch.float32)
    grad_middle_NF *= weight_N[:, None]
    if not frozen:
        grad_down_RDF = grouped_outer(grad_ND, middle_NF.mul_(weight_N[:, None]), page.groups)
    grad_gate_NF = torch.ops.aten.silu_backward(grad_middle_NF * up_NF, gate_NF)
    grad_gate_up_NX = torch.cat([grad_gate_NF, grad_middle_NF.mul_(silu_NF)], dim=1)
    grad_rows_ND = grouped_matmul(grad_gate_up_NX, page.gate_up_RXD, page.groups)
    if frozen:
        return grad_rows_ND, grad_weight_N
    return grad_rows_ND, grad_weight_N, grouped_outer(grad_gate_up_NX, input_ND, page.groups), grad_down_RDF


class StreamedExperts(Placement):
    """All banks of a model: their stores, the ring they pass through, and the optimizer."""

    def __init__(
        self, config, settings: StreamSettings, device: torch.device, dtype: torch.dtype, groups=None
    ):
        """`groups`: two process groups of the ranks that share every expert (None: this one alone), so that
        collectives of the computation, on the second, need not queue behind those that gather pages ahead."""
        gathering, group = groups or (None, None)
        self.settings, self.device, self.group = settings, device, group
        self.num_experts, self.layers = config.num_experts, config.num_hidden_layers
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.layout = RowLayout(config.moe_intermediate_size, config.hidden_size, rank, ranks)
        size, frozen, layers = self.layout.slice_size, settings.frozen, range(self.layers)
        self.kept = {"weight": (dtype, size)} if frozen else quantities(settings.state, dtype, size)
        kept = self.kept | (accumulator(settings.state, size) if settings.accumulate and not frozen else {})
        bank, lock = (self.num_experts, self.layout, kept), device.type == "cuda"
        # In files up to each layer: spread evenly, so that the disk works all the time.
        in_files = [layer * settings.disk_layers // self.layers for layer in range(self.layers + 1)]
        with near(device):
            if settings.disk_layers:
                self.disk = Disk(settings.nvme_path, kept, settings.page_size, settings.num_slots + 1, lock)
            self.stores = [
                BankStore(*bank, lock) if before == after else NvmeStore(*bank, self.disk, layer)
                for layer, (before, after) in enumerate(pairwise(in_files))
            ]
        slots = [make_slot(settings.page_size, self.stores[0], device) for _ in range(settings.num_slots)]
        self.ring = SlotRing(self.stores, slots, gathering)
        rows = 0 if frozen else settings.page_size
        self.gradient_RP = torch.zeros(rows, self.layout.row_size, dtype=dtype, device=device)
        self.squares_LE = torch.zeros(self.layers, self.num_experts, device=device)  # of the step's gradients
        adamw = settings.adamw
        self.groups = ({"name": "experts", "lr": adamw.lr, "weight_decay": adamw.weight_decay},)
        self.accumulated: list[set[int]] = [set() for _ in layers]
        self.all_pages = [page for layer in layers for page in self._light(layer, range(self.num_experts))]
        self.planned: list[Page] = []  # by this forward, for its backward
        self.passes = 0  # backward passes so far: each rounds with random bits of its own
        self.unbuilt = iter(layers)
        self.is_boundary: Callable[[], bool] = lambda: True

    def build_bank(self, config) -> StreamedBank:
        """The banks in the order of the layers."""
        layer = next(self.unbuilt, None)
        assert layer is not None, "one bank a layer"
        return StreamedBank(self, layer)

    def attach(self, engine) -> None:
        self.is_boundary = engine.is_gradient_accumulation_boundary

    def take_refused(self) -> int:
        self.updating = False  # whoever asks has finished the step
        squares_LE, self.squares_LE = self.squares_LE, torch.zeros_like(self.squares_LE)
        return int((~squares_LE.isfinite()).sum())

    def begin(self, layer: int, routing: Routing) -> Visit:
        """Learn how many rows each expert has; before that, send the pages on their way if all are fetched."""
        counts_2E = routing.counts_E.repeat(2, 1)
        if self.group is not None:
            dist.all_reduce(counts_2E[1], group=self.group)
        if self.settings.fetch_all:
            self.ring.announce(self.all_pages[layer * len(self.all_pages) // self.layers :])
        counts, total = counts_2E.tolist()  # waits for the router
        used = [expert for expert, count in enumerate(total) if count]
        pages = self._light(layer, range(self.num_experts) if self.settings.fetch_all else used)
        return Visit(layer, routing.order_N, list(accumulate(counts, initial=0)), used, pages)

    def expect_backward(self, visit: Visit) -> None:
        """Plan the layer's pages of backward, and after the last layer send them all on their way."""
        visit.boundary = self.is_boundary() or self.settings.frozen
        accumulated = self.accumulated[visit.layer]
        experts = sorted(accumulated.union(visit.used)) if visit.boundary else visit.used
        needed = tuple(self.kept) if visit.boundary else ("weight",)
        visit.pages = [
            Page(visit.layer, chunk, needed if accumulated.isdisjoint(chunk) else (*needed, "accumulator"))
            for chunk in reversed(self._chunks(experts))
        ]
        self.planned = visit.pages + (self.planned if visit.layer else [])
        if visit.layer == self.layers - 1:
            self.ring.announce(self.planned)

    def visited(self, visit: Visit) -> Iterator[VisitedPage]:
        """Each page in its slot; when the caller comes back for the next, the slot is released."""
        pages, starts = visit.pages, visit.starts
        self.ring.announce(pages)
        ends = [starts[e + 1] - starts[page.experts[0]] for page in pages for e in page.experts]
        ends_N = torch.tensor(ends, dtype=torch.int32).to(self.device, non_blocking=True)
        for page, ends_R in zip(pages, ends_N.split([len(page.experts) for page in pages]), strict=True):
            rows = slice(starts[page.experts[0]], starts[page.experts[-1] + 1])
            groups = Groups()
            groups.sizes, groups.ends_R = [starts[e + 1] - starts[e] for e in page.experts], ends_R
            slot = self.ring.take(page)
            visited = VisitedPage(slot, rows, groups, *self.layout.weights(slot.weight_RP[: len(ends_R)]))
            yield visited
            self.ring.release(slot, visited.changed)

    def use_gradients(self, visit: Visit, page: VisitedPage, gradients: list[Tensor] | None) -> None:
        """Add a page's gradients to the accumulator, or update its weights with all there are.

        gradients: those of gate and up [R, 2 F, D] and of down [R, D, F]; None where this rank has no rows.
        """
        experts, accumulated = page.slot.page.experts, self.accumulated[visit.layer]
        buffers = {name: buffer[: len(experts)] for name, buffer in page.slot.buffers.items()}
        seed = 0
        for number in (self.settings.seed, self.passes, visit.layer, experts[0], self.layout.rank):
            seed = (seed + number) * 1_000_003
        gradient_RP = self._gradient_rows(len(experts), gradients)
        if accumulated or not visit.boundary:
            for row, expert in enumerate(experts):
                if expert not in accumulated:
                    buffers["accumulator"][row].zero_()
            accumulate_rows(buffers["accumulator"], gradient_RP, ~seed)
            gradient_RP = buffers["accumulator"]
        page.changed = tuple(self.kept) if visit.boundary else ("accumulator",)
        if not visit.boundary:
            return
        squares_R = sum_of_squares(gradient_RP)
        if self.group is not None:
            dist.all_reduce(squares_R, group=self.group)
        self.squares_LE[visit.layer, experts[0] :][: len(experts)] = squares_R  # apart from other pages'
        factor_R = clip_factors(squares_R, self.settings.max_norm, 1 / self.layout.ranks)
        rules = self.settings.adamw._replace(**{key: self.groups[0][key] for key in ("lr", "weight_decay")})
        update_rows({name: buffers[name] for name in self.kept}, gradient_RP, factor_R, rules, seed)
        self.updating = True

    def end_backward(self, visit: Visit) -> None:
        """Note what the layer has accumulated; after the first layer, begin to fetch for the next microbatch."""
        held = set() if visit.boundary else self.accumulated[visit.layer].union(visit.used)
        self.accumulated[visit.layer] = held
        if visit.layer == 0:
            self.passes += 1
            if self.settings.fetch_all:
                self.ring.announce(self.all_pages)

    def _chunks(self, experts: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.settings.page_size
        return [tuple(experts[i : i + size]) for i in range(0, len(experts), size)]

    def _light(self, layer: int, experts: Sequence[int]) -> list[Page]:
        return [Page(layer, chunk, ("weight",), is_light=True) for chunk in self._chunks(experts)]

    def _gradient_rows(self, rows: int, gradients: list[Tensor] | None) -> Tensor:
        """This rank's slice of the summed gradient rows [rows, P / W]."""
        whole_RP = self.gradient_RP[:rows]
        if gradients is None:
            whole_RP.zero_()
        else:
            for place, gradient in zip(self.layout.weights(whole_RP), gradients, strict=True):
                place.copy_(gradient)
        if self.group is None:
            return whole_RP
        by_rank_WRP = whole_RP.unflatten(1, (self.layout.ranks, -1)).transpose(0, 1).contiguous()
        own_RP = whole_RP.new_empty(rows, self.layout.slice_size)
        dist.reduce_scatter_tensor(own_RP, by_rank_WRP.flatten(0, 1), group=self.group)
        return own_RP

    def fill(self, source: Callable[..., Tensor]) -> None:
        self.ring.cancel()
        width, size = self.layout.expert_width, self.layout.hidden_size
        shapes = dict.fromkeys(PROJECTIONS, (1, width, size)) | {"down_proj": (1, size, width)}

        def fill_expert(place: tuple[int, int]) -> None:
            layer, expert = place
            weights = {
                name: source(export_name(layer, name), torch.Size(shape), expert)
                for name, shape in shapes.items()
            }
            self.stores[layer].write(expert, weights)

        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // ranks_here)) as pool:
            list(pool.map(fill_expert, product(range(self.layers), range(self.num_experts))))
        return_free_memory()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        self.ring.synchronize()
        for layer, store in enumerate(self.stores):
            gate_up_EXD, down_EDF = self.layout.weights(self._gathered(store.rows()["weight"]))
            for name, values in zip(PROJECTIONS, (*gate_up_EXD.chunk(2, dim=1), down_EDF), strict=True):
                yield export_name(layer, name), values.contiguous()

    def save(self, directory: Path) -> None:
        self.ring.synchronize()
        metadata = {"ranks": str(self.layout.ranks), "passes": str(self.passes)}
        for layer, store in enumerate(self.stores):
            store.save(directory / f"experts-{layer:03}-rank-{self.layout.rank}.safetensors", metadata)

    def load(self, directory: Path) -> None:
        self.ring.cancel()
        for layer, store in enumerate(self.stores):
            ranks = len(list(directory.glob(f"experts-{layer:03}-rank-*.safetensors")))
            paths = [directory / f"experts-{layer:03}-rank-{rank}.safetensors" for rank in range(ranks)]
            metadata = store.load(paths)
            assert int(metadata["ranks"]) == ranks, directory
        self.passes = int(metadata["passes"])

    def _gathered(self, part_EP: Tensor) -> Tensor:
        """A layer's whole rows [E, P] on the host, from all ranks' slices, page by page over the device."""
        if self.group is None:
            return part_EP
        size, whole_EP = self.settings.page_size, part_EP.new_empty(self.num_experts, self.layout.row_size)
        for part_RP, whole_RP in zip(part_EP.split(size), whole_EP.split(size), strict=True):
            gathered_RP = torch.empty_like(whole_RP, device=self.device)
            gather_rows(part_RP.to(self.device), gathered_RP, self.group)
            whole_RP.copy_(gathered_RP)
        return whole_EP


def export_name(layer: int, projection: str) -> str:
    """The name of a bank's weights in an exported checkpoint."""
    return f"model.layers.{layer}.mlp.experts.{projection}"
