"""Worker process of test_layouts.py: trains one small model under several layouts, rank by rank.

usage: layouts.py SPEC.json OUT.json — a list of layouts in, a list of {"losses", "norms", "checksum"} out.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.presets import preset_config
from training import deepspeed_config
from training.config import TrainingArguments
from training.engine import build_engine, build_model, start_ranks
from training.step import reduce_results, train_step
from training.weights import exported_tensors, initial_weights

VOCAB, LENGTH, ROWS, STEPS = 64, 24, 4, 20


def rows_of_step(step: int) -> dict[str, torch.Tensor]:
    """Four rows, the same for every layout, with padding and targets spread unevenly."""
    generator = torch.Generator().manual_seed(step % 5)
    ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=generator)
    document_ids = torch.ones_like(ids)
    for row in range(ROWS):
        document_ids[row, LENGTH // 2 + row :] = 2 if row % 2 else 0
    labels = torch.where(document_ids > 0, ids, -100)
    labels[0, 4:] = -100
    position_ids = torch.arange(LENGTH).expand(ROWS, -1).clone()
    return {"input_ids": ids, "labels": labels, "document_ids": document_ids, "position_ids": position_ids}


def microbatches(step: int, rank: int, world_size: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    micro = ROWS // world_size // accumulation
    batch = rows_of_step(step)
    starts = range(rank * micro, ROWS, micro * world_size)
    return [{key: value[start : start + micro] for key, value in batch.items()} for start in starts]


def train(layout: dict, ranks) -> dict:
    accumulation = layout.get("accumulation", 1)
    args = TrainingArguments(
        per_device_train_batch_size=ROWS // ranks.world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=3e-3,
        local_learning_rate=3e-3,
        gradient_clip=layout.get("clip", 1.0),
        gradient_checkpointing=layout.get("checkpointing", False),
    )
    zero = {"stage": layout["stage"]}
    placement = layout.get("placement", "resident")
    if placement == "zero3":
        offload = layout["offload"]
        zero |= {"offload_param": offload, "offload_optimizer": offload, "stage3_param_persistence_threshold": 0}
    path = Path(layout["directory"]) / f"ds_{ranks.rank}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    ds_config = deepspeed_config.load(
        str(path), args, placement=placement, precision="fp32", world_size=ranks.world_size
    )
    config = preset_config(
        "tiny", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, moe_intermediate_size=16, head_dim=8,
        router_aux_loss_coef=layout.get("aux", 0.0),
    )  # fmt: skip
    model = build_model(
        config, initial_weights(0, 0.05), ds_config, placement=placement, page_size=layout.get("page_size"),
        device=ranks.device, dtype=torch.float32,
    )  # fmt: skip
    if layout.get("one_expert_on_rank_0"):
        force_router(model, ranks.rank)
    engine = build_engine(model, args, ds_config)
    losses, norms = [], []
    for step in range(layout.get("steps", STEPS)):
        result = train_step(engine, microbatches(step, ranks.rank, ranks.world_size, accumulation))
        sums, _ = reduce_results([result])
        losses.append(sums["loss_sum"] / sums["targets"])
        norms.append(result.grad_norm)
    tensors = {name: tensor.double().sum().item() for name, tensor in exported_tensors(engine.module)}
    engine.destroy()
    return {"losses": losses, "norms": norms, "sums": tensors}


def force_router(model, rank: int) -> None:
    """On rank 0 every token goes to experts 0 and 1, on the others to 2 and 3: the rest sees no token anywhere."""

    def push(_module, _inputs, output):
        routing, statistics = output
        ids = torch.tensor([0, 1] if rank == 0 else [2, 3]).expand_as(routing.ids_TK).contiguous()
        flat = ids.reshape(-1)
        routing.ids_TK, routing.counts_E = ids, torch.bincount(flat, minlength=routing.counts_E.numel())
        routing.order_N = flat.argsort(stable=True)
        return routing, statistics

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(push)


if __name__ == "__main__":
    layouts = json.loads(Path(sys.argv[1]).read_text())
    ranks = start_ranks("cpu")
    torch.set_num_threads(1)
    results = [train(layout, ranks) for layout in layouts]
    if ranks.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
