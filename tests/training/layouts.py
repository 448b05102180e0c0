"""Worker process of test_layouts.py: trains one small model under several layouts, rank by rank.

usage: layouts.py LAYOUTS.json OUT.pt — a list of layouts in, a list of results out (see `train`).

A layout is a dictionary: `stage`, and what differs from one rank's plain fp32 run: `placement`, `page_size`,
`slots`, `state`, `offload` (cpu, optimizer, or a directory for nvme), `precision`, `accumulation`, `clip`,
`checkpointing`, `z`, `router`, `pool`, `expert_parallel`, `capacity`, `rows` (how many each rank has), `memory`
(the window of the layer that has one), `segments`, `steps` (numbers of the batches trained on), `poisoned` and
`emptied` (lists of [step, row]); with `plain` it is PyTorch alone.
"""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from transformers import DynamicCache

from experts import canonical, exported_name
from experts.placement import ordinary_placement
from kernels.reference import inverse
from model import PragnosiaForCausalLM
from model.components import MemoryConfig
from model.presets import preset_config
from training import deepspeed_config
from training.config import TrainingArguments
from training.engine import DTYPES, build_engine, build_model, build_placement, start_ranks
from training.estimate import StreamPlan
from training.segments import in_segments
from training.step import count_targets, reduce_results, train_step
from training.weights import exported_tensors, fill, initial_weights, joined

VOCAB, LENGTH, ROWS, STEPS = 64, 24, 4, 20
RATE = 3e-3
DRAWN = initial_weights(0, 0.05)


def SOURCE(name: str, *rest) -> torch.Tensor:
    """Initial weights, but a memory whose output is not 0: all of it has gradients from the first step on."""
    return DRAWN(name.replace("out_proj", "outward"), *rest)


POISON = 1  # a token whose embedding `poison` makes NaN; no batch has it of itself


def rows_of_step(step: int, layout: dict) -> dict[str, torch.Tensor]:
    """Four rows, the same for every layout, with padding and targets spread unevenly."""
    generator = torch.Generator().manual_seed(step % 5)
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
    document_ids = torch.ones_like(ids)
    for row in range(ROWS):
        document_ids[row, LENGTH // 2 + row :] = 2 if row % 2 else 0
    labels = torch.where(document_ids > 0, ids, -100)
    labels[0, 4:] = -100
    position_ids = torch.arange(LENGTH).expand(ROWS, -1).clone()
    for poisoned_step, row in layout.get("poisoned", []):
        if step == poisoned_step:
            ids[row, 0] = POISON
    for emptied_step, row in layout.get("emptied", []):
        if step == emptied_step:
            ids[row], labels[row], document_ids[row] = 0, -100, 0
    return {"input_ids": ids, "labels": labels, "document_ids": document_ids, "position_ids": position_ids}


def microbatches(step: int, layout: dict, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    micro = ROWS // world_size // layout.get("accumulation", 1)
    batch = rows_of_step(step, layout)
    if "rows" in layout:
        return [{key: value.split(layout["rows"])[rank] for key, value in batch.items()}]
    starts = range(rank * micro, ROWS, micro * world_size)
    return [{key: value[start : start + micro] for key, value in batch.items()} for start in starts]


def completed_config(layout: dict, args: TrainingArguments, ranks, directory: Path) -> dict:
    zero = {"stage": layout["stage"]}
    offload = layout.get("offload")
    if offload == "cpu":
        zero |= {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    elif offload == "optimizer":
        zero |= {"offload_optimizer": {"device": "cpu"}}
    elif offload is not None:
        nvme = {"device": "nvme", "nvme_path": offload}
        zero |= {"offload_param": nvme | {"buffer_size": 10**6}, "offload_optimizer": nvme}
    if layout["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    path = directory / f"ds_{ranks.rank}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return deepspeed_config.load(
        path,
        args,
        placement=layout.get("placement", "resident"),
        precision=layout.get("precision", "fp32"),
        world_size=ranks.world_size,
    )


def model_config(layout: dict):
    memory = None
    if "memory" in layout:
        sizes = {"memory_size": 16, "head_dim": 8, "num_memory_layers": 1, "chunk_size": 8, "dropout": 0.0}
        memory = asdict(MemoryConfig(hidden_size=32, window=layout["memory"], **sizes))
    return preset_config(
        "tiny", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, moe_intermediate_size=16, head_dim=8,
        router_aux_loss_coef=0.0, router_z_loss_coef=layout.get("z", 0.01),
        routing="step" if "pool" in layout else "token", expert_pool=layout.get("pool"),
        memory=memory,
    )  # fmt: skip


def place(layout: dict, args: TrainingArguments, ranks):
    name = layout.get("placement", "resident")
    if name != "streamed":
        shared_by = layout.get("expert_parallel", 1)
        capacity = {"capacity_factor": layout.get("capacity")}
        return ordinary_placement(name, layout.get("page_size"), shared_by, **capacity)
    stream = StreamPlan(layout.get("page_size", 3), layout.get("slots", 3), layout.get("state", "fp32"), 0, 0)
    plan = SimpleNamespace(
        config=model_config(layout),
        stream=stream,
        page_size=stream.page_size,
        precision=layout.get("precision", "fp32"),
    )
    return build_placement(plan, args, ranks)


def train_plain(layout: dict) -> dict:
    """The same in PyTorch alone: the whole batch or its segments, mean loss, clipping, AdamW."""
    model = PragnosiaForCausalLM(model_config(layout))
    fill(model, SOURCE)
    groups = {kind: {"params": [], "lr": RATE, "weight_decay": 0.1} for kind in ("dense", "norms", "experts")}
    groups["norms"]["weight_decay"], groups["experts"]["lr"] = 0.0, 2 * RATE
    for parameter in model.parameters():
        kind = {1: "norms", 2: "dense", 3: "experts"}[parameter.dim()]
        groups[kind]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups.values(), betas=(0.9, 0.95), eps=1e-8)
    losses, norms, gradients = [], [], {}
    for step in layout["steps"]:
        parts = in_segments([rows_of_step(step, layout)], layout.get("segments", 1))
        targets, tokens = sum(map(count_targets, parts)), int((parts[-1]["document_ids"] > 0).sum())
        cache, loss = DynamicCache() if len(parts) > 1 else None, 0.0
        for part in parts:
            output = model(**part, past_key_values=cache, num_targets=targets, num_tokens=tokens)
            output.loss.backward()
            loss += output.loss_sum.item()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / targets)
    weights = dict(exported_tensors(model))
    return {"losses": losses, "norms": norms, "weights": weights, "gradients": gradients}


def train(layout: dict, ranks, directory: Path) -> dict:
    """`losses`, gradient `norms` and whether `applied`, a step; exported `weights` after the last one.

    `gradients`, `sums` and router `load` are those of the first step; `updates` how often each streamed expert
    was updated, a list of [E, 1] a layer, and `taken` how many pages were taken in all.
    """
    accumulation = layout.get("accumulation", 1)
    args = TrainingArguments(
        per_device_train_batch_size=ROWS // ranks.world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        segments=layout.get("segments", 1),
        learning_rate=RATE,
        local_learning_rate=2 * RATE,
        gradient_clip=layout.get("clip", 1.0),
        gradient_checkpointing=layout.get("checkpointing", False),
    )
    ds_config = completed_config(layout, args, ranks, directory)
    model = build_model(
        model_config(layout), SOURCE, ds_config, placement=place(layout, args, ranks),
        device=ranks.device, dtype=DTYPES[layout.get("precision", "fp32")],
    )  # fmt: skip
    model.model.embed_tokens.register_forward_hook(poison)
    dropped = (
        drop_choices(model, layout["capacity"]) if "capacity" in layout and ranks.world_size == 1 else []
    )
    if "router" in layout:
        force_router(model, layout["router"][ranks.rank])
    engine = build_engine(model, args, ds_config)
    taken = count_pages(model.placement)
    gradients = record_gradients(engine)
    losses, norms, applied, first = [], [], [], {}
    for step in layout.get("steps", range(STEPS)):
        batches = microbatches(step, layout, ranks.rank, ranks.world_size)
        result = train_step(engine, in_segments(batches, args.segments))
        sums, load = reduce_results([result])
        sums |= {"router/dropped_share": sum(dropped)} if dropped else {}
        first = first or {"sums": sums, "load": load}
        losses.append(sums["loss_sum"] / max(1, sums["targets"]))
        norms.append(result.grad_norm)
        applied.append(result.applied)
    weights = dict(exported_tensors(engine.module))
    updates = [store.arrays["updates"].clone() for store in getattr(model.placement, "stores", ())]
    engine.destroy()
    trained = {"losses": losses, "norms": norms, "applied": applied, "weights": weights, "updates": updates}
    return {**trained, **first, "gradients": gradients, "taken": len(taken)}


def record_gradients(engine) -> dict[str, torch.Tensor]:
    """A dictionary that the engine's first update fills with the gradients it uses, under exported names."""
    gradients: dict[str, torch.Tensor] = {}
    apply_update = engine.step

    def step():
        if engine.is_gradient_accumulation_boundary() and not gradients:
            for name, parameter in engine.module.named_parameters():
                gradient = safe_get_full_grad(parameter).detach().cpu().clone()
                if hasattr(parameter, "owners"):
                    gradients[exported_name(name)] = joined(gradient, parameter.owners)
                    continue
                exported, first = canonical(name, gradient)
                gradients[exported] = torch.cat((gradients[exported], gradient)) if first else gradient
        apply_update()

    engine.step = step
    return gradients


def count_pages(placement) -> list:
    """A list that grows by each page that streamed experts take."""
    taken = []
    if ring := getattr(placement, "ring", None):
        take = ring.take
        ring.take = lambda page: taken.append(page) or take(page)
    return taken


def poison(_embedding, inputs, output):
    return output.masked_fill(inputs[0][..., None] == POISON, float("nan"))


def drop_choices(model, factor: float) -> list[int]:
    """Give choices beyond the capacity of an expert no weight, by a plain loop; the list grows by how many of real
    tokens these are in each layer and microbatch."""
    dropped = []

    def drop(_module, inputs, output):
        (routing, statistics), valid = output, inputs[1].tolist()
        tokens, active = routing.ids_TK.shape
        room = [math.ceil(factor * tokens * active / len(routing.counts_E))] * len(routing.counts_E)
        kept_TK = torch.zeros(tokens, active)
        for token in sorted(range(tokens), key=lambda token: not valid[token]):
            for choice, expert in enumerate(routing.ids_TK[token].tolist()):
                kept_TK[token, choice] = room[expert] > 0
                room[expert] -= 1
        dropped.append(int((kept_TK[inputs[1]] == 0).sum()))
        return routing._replace(weights_TK=routing.weights_TK * kept_TK), statistics

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(drop)
    return dropped


def force_router(model, experts: list[int]) -> None:
    """Every token of this rank goes to the given experts."""

    def push(_module, _inputs, output):
        routing, statistics = output
        ids = torch.tensor(experts).expand_as(routing.ids_TK).contiguous()
        flat = ids.reshape(-1)
        counts = torch.bincount(flat, minlength=routing.counts_E.numel())
        order = flat.argsort(stable=True)
        places = inverse(order).view_as(ids)
        routing = routing._replace(ids_TK=ids, counts_E=counts, order_N=order, places_TK=places)
        return routing, statistics

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(push)


if __name__ == "__main__":
    layouts, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = start_ranks("cpu")
    get_accelerator().is_fp16_supported = lambda: False  # as on most processors: fp32 has to stay fp32
    torch.set_num_threads(1)
    results = [
        train_plain(layout) if "plain" in layout else train(layout, ranks, out.parent) for layout in layouts
    ]
    if ranks.rank == 0:
        torch.save(results, out)
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo can still abort a process in its last moment, when all results are written.
    os._exit(0)
