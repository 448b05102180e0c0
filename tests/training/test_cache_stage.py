"""The stage that trains a coprocessor: its traces, what is refused, its exactness, and whole runs.

As a script it is the worker of the exactness test: test_cache_stage.py LAYOUTS.json OUT.pt.
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tokenizer_asset import load_tokenizer
from inference.generation import Sampling
from model import PragnosiaForCausalLM
from model.components import CacheConfig, MemoryConfig, TreeConfig
from model.presets import preset_config
from tests.training import layouts as base_layouts
from tests.training.runs import REPOSITORY, finish, run, start, write_rows
from training.cache_stage import check_stage, with_traces
from training.config import TrainingArguments, UserError
from training.engine import build_engine, build_model, freeze, parameter_groups, start_ranks
from training.step import count_targets, empty_like, reduce_results, train_step
from training.weights import exported_tensors, initial_weights, model_weights

CACHE = CacheConfig(32, num_heads=4, dropout=0.0, num_latents=3, num_traces=4, num_ahead_tokens=5)
SPLITS = {
    "4 microbatches, stage 2": {"ranks": 1, "stage": 2, "accumulation": 4},
    "zero3": {
        "ranks": 1,
        "stage": 3,
        "placement": "zero3",
        "offload": "cpu",
        "page_size": 2,
        "checkpointing": True,
    },
    "streamed": {"ranks": 1, "stage": 2, "placement": "streamed", "accumulation": 2},
    "2 ranks, stage 1": {"ranks": 2, "stage": 1},
    "2 ranks, streamed": {"ranks": 2, "stage": 0, "placement": "streamed"},
    "2 ranks, zero3": {"ranks": 2, "stage": 3, "placement": "zero3", "offload": "cpu", "page_size": 4},
}
REFERENCES = {
    name: {"ranks": 1, "stage": 0, **more}
    for name, more in {
        "light": {"coprocessor": "light"},
        "lora": {"coprocessor": "lora"},
        "copy": {"coprocessor": "copy"},
        "soft": {"coprocessor": "soft"},
        "joint": {"coprocessor": "light", "joint": True},
        "memory": {"coprocessor": "light", "memory": 6},
    }.items()
}
EQUAL = {f"light, {name}": ({**REFERENCES["light"], **split}, "light") for name, split in SPLITS.items()}
EQUAL |= {
    f"{reference}, {name}": ({**REFERENCES[reference], **SPLITS[name]}, reference)
    for reference, name in (
        ("lora", "streamed"),
        ("soft", "streamed"),
        ("copy", "zero3"),
        ("joint", "4 microbatches, stage 2"),
        ("joint", "2 ranks, stage 1"),
        ("memory", "zero3"),
    )
}
STEPS = 3


def cache_batch(step: int, layout: dict) -> dict[str, torch.Tensor]:
    return with_traces(base_layouts.rows_of_step(step, {}), CACHE, step)


def train(layout: dict, ranks, directory: Path) -> dict:
    """Losses of a few steps, exported weights before and after, what the optimizer has."""
    args = TrainingArguments(
        stage="cache",
        cache_joint=layout.get("joint", False),
        per_device_train_batch_size=base_layouts.ROWS // ranks.world_size // layout.get("accumulation", 1),
        gradient_accumulation_steps=layout.get("accumulation", 1),
        learning_rate=3e-3,
        gradient_checkpointing=layout.get("checkpointing", False),
    )
    config = base_layouts.model_config(layout)
    config.cache = dataclasses.asdict(dataclasses.replace(CACHE, coprocessor=layout["coprocessor"]))
    ds_config = base_layouts.completed_config(layout, args, ranks, directory)
    model = build_model(
        config, base_layouts.SOURCE, ds_config, placement=base_layouts.place(layout, args, ranks),
        device=ranks.device, dtype=torch.float32,
    )  # fmt: skip
    before = dict(exported_tensors(model))
    engine = build_engine(model, args, ds_config)
    results = []
    for step in range(STEPS):
        split = [
            with_traces(batch, CACHE, step)
            for batch in base_layouts.microbatches(step, layout, ranks.rank, ranks.world_size)
        ]
        results.append(reduce_results([train_step(engine, split)])[0])
    weights = dict(exported_tensors(engine.module))
    stores = getattr(model.placement, "stores", [])
    kept = [name for store in stores[:1] for name in store.arrays]
    engine.destroy()
    return {"sums": results, "before": before, "weights": weights, "kept": kept}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name of a layout -> what `train` returns."""
    results = {}
    cases = REFERENCES | {name: layout for name, (layout, _) in EQUAL.items()}
    for world_size in (1, 2):
        directory = tmp_path_factory.mktemp(f"ranks{world_size}")
        names = [name for name, layout in cases.items() if layout["ranks"] == world_size]
        (directory / "layouts.json").write_text(json.dumps([cases[name] for name in names]))
        words = [__file__, str(directory / "layouts.json"), str(directory / "out.pt")]
        code, text = finish(start(words, world_size))
        assert code == 0, text
        results |= zip(names, torch.load(directory / "out.pt"), strict=True)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", EQUAL)
def test_the_same_whatever_the_split(trained, name):
    found, expected = trained[name], trained[EQUAL[name][1]]
    for step, (ours, theirs) in enumerate(zip(found["sums"], expected["sums"], strict=True)):
        assert ours["targets"] == theirs["targets"] == count_targets(cache_batch(step, {})) > 0
        for key in ("loss_sum", "cache/ahead_loss", "cache/readout_loss", "cache/readout_loss count"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    for key, tensor in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REFERENCES, *EQUAL])
def test_who_learns(trained, name):
    before, after = trained[name]["before"], trained[name]["weights"]
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        learns = key.startswith("cache.") or "joint" in name
        assert torch.equal(tensor, before[key]) != learns, key
    if "streamed" in name:
        assert trained[name]["kept"] == ["weight"]


def test_a_frozen_model_has_no_place_in_the_optimizer():
    config = preset_config("tiny", vocab_size=64)
    config.cache = dataclasses.asdict(CacheConfig(128))
    config.tree = {"hidden_size": 128, "value_loss_weight": 0.5}
    model = PragnosiaForCausalLM(config)
    own = {id(parameter) for parameter in model.cache.parameters()}
    head = {id(parameter) for parameter in model.value_head.parameters()}
    everything = {id(parameter) for parameter in model.parameters()}
    for args, expected in (
        (TrainingArguments(stage="cache"), own),
        (TrainingArguments(stage="cache", cache_joint=True), everything - head),
        (TrainingArguments(), everything - own),
    ):
        model.requires_grad_(True)
        freeze(model, args)
        groups = parameter_groups(model, args)
        assert {id(parameter) for group in groups for parameter in group["params"]} == expected


def test_traces_stand_before_targets_and_stay_in_their_document():
    batch = base_layouts.rows_of_step(0, {})
    found = with_traces(batch, CACHE, "a")
    again = with_traces(batch, CACHE, "a")
    other = with_traces(batch, CACHE, "b")
    assert torch.equal(found["traces"], again["traces"]) and not torch.equal(found["traces"], other["traces"])
    others = with_traces({**batch, "input_ids": batch["input_ids"] + 1}, CACHE, "a")
    assert not torch.equal(others["traces"], found["traces"])  # by what stands in a row
    for row, (traces, labels) in enumerate(zip(found["traces"], found["ahead_labels"], strict=True)):
        alone = with_traces({name: x[row : row + 1] for name, x in batch.items()}, CACHE, "a")
        assert torch.equal(alone["traces"][0], traces) and torch.equal(alone["ahead_labels"][0], labels)
        used = traces[labels[:, 0] != -100].tolist()
        documents, is_target = batch["document_ids"][row], batch["labels"][row, 1:] != -100
        places = is_target & (documents[1:] == documents[:-1])
        assert len(set(used)) == len(used) == min(4, int(places.sum()))
        for trace, targets in zip(traces.tolist(), labels.tolist(), strict=True):
            document = batch["document_ids"][row, trace]
            for ahead, target in enumerate(targets, 1):
                inside = trace + ahead < base_layouts.LENGTH
                inside = inside and batch["document_ids"][row, trace + ahead] == document
                is_used = targets[0] != -100
                assert target == (batch["labels"][row, trace + ahead] if inside and is_used else -100)


def test_a_batch_that_takes_the_place_of_another_has_no_ahead_targets():
    batch = with_traces(base_layouts.rows_of_step(0, {}), CACHE, 0)
    assert count_targets(batch) > 0 and count_targets(empty_like(batch)) == 0


def config_with(**settings):
    config = preset_config("tiny")
    config.cache = dataclasses.asdict(CacheConfig(128, **settings))
    return config


def with_memory():
    config = config_with()
    config.memory = dataclasses.asdict(MemoryConfig(128))
    return config


def with_head():
    config = config_with()
    config.tree = dataclasses.asdict(TreeConfig(128))
    return config


@pytest.mark.parametrize(
    ("config", "args", "more", "message"),
    [
        (
            config_with(),
            {},
            {"given": preset_config("tiny")},
            "--use-cache-augmentation: .* then --stage cache --init-from",
        ),
        (config_with(), {"stage": "cache"}, {"is_trained": False}, "give a trained one with --init-from"),
        (
            with_head(),
            {"stage": "cache", "value_refresh": 5},
            {},
            "--value-refresh has no effect in --stage cache",
        ),
        (preset_config("tiny"), {"value_refresh": 5}, {}, "--value-refresh needs a value head"),
        (
            with_memory(),
            {"stage": "cache"},
            {"given": config_with()},
            "--use-neural-memory .* or add --cache-joint",
        ),
        (
            with_head(),
            {"stage": "cache", "cache_joint": True},
            {"given": config_with()},
            "--use-tree-of-thoughts .*: train it in stage base, or leave it out",
        ),
        (config_with(retrieval_factor=0.0), {"stage": "cache"}, {}, "--retrieval-factor 0 .*: use 1"),
        (
            config_with(coprocessor="copy"),
            {"stage": "cache"},
            {"placement": "streamed"},
            "--coprocessor copy .* --placement resident or zero3",
        ),
        (
            config_with(coprocessor="copy"),
            {},
            {"placement": "streamed"},
            "--coprocessor copy .* --placement resident or zero3",
        ),
        (
            config_with(),
            {"stage": "cache", "cache_joint": True},
            {"placement": "streamed"},
            "--cache-joint .* use --placement resident or zero3",
        ),
    ],
)
def test_one_line_for_what_cannot_be(config, args, more, message):
    facts = {"placement": "resident", "is_trained": True, "given": config} | more
    with pytest.raises(UserError, match=message):
        check_stage(config, TrainingArguments(**args), facts.pop("placement"), **facts)


def test_flags_that_contradict_each_other():
    with pytest.raises(UserError, match="--cache-joint needs --stage cache"):
        TrainingArguments(cache_joint=True)
    with pytest.raises(UserError, match=r"--cache-joint .*: use --no-gradient-checkpointing"):
        TrainingArguments(stage="cache", cache_joint=True, gradient_checkpointing=True)


@pytest.mark.parametrize("source", ["seed", "memory"])
def test_a_copy_begins_as_the_model(source):
    config = preset_config("tiny", vocab_size=64, hidden_size=32, head_dim=8)
    fresh = initial_weights(3, 0.1)
    weights = fresh if source == "seed" else model_weights(PragnosiaForCausalLM(config), fresh)
    for name, shape in (
        ("layers.1.mlp.experts.up_proj", (8, 256, 32)),
        ("layers.0.self_attn.k_proj.weight", (16, 32)),
        ("norm.weight", (32,)),
    ):
        first = 0 if "experts" in name else None
        own, model = (
            weights(f"{prefix}.{name}", torch.Size(shape), first) for prefix in ("cache.copy", "model")
        )
        assert torch.equal(own, model), name
    assert weights("cache.queries.weight", torch.Size((4, 32)), None).std() > 0.05


@pytest.mark.slow
def test_a_run_on_a_frozen_model_resumed_and_the_way_back(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", 60)

    def train(name: str, *flags: str) -> tuple[Path, dict]:
        steps = ("--max-steps", "2", "--save-steps", "1", "--placement", "streamed")
        directory, _ = run(data, tmp_path / name, *steps, *flags)
        return directory, tensors_of(directory)

    def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
        return load_file(next((directory / "final_model").glob("*.safetensors")))

    memory = ("--use-neural-memory", "--memory-layers", "1", "--memory-size", "32", "--memory-head-dim", "16")
    first, before = train("base", "--save-strategy", "no", *memory)
    cache = ("--use-cache-augmentation", "--num-latents", "2", "--num-traces", "3")
    second, after = train("cache", "--init-from", str(first), "--stage", "cache", *cache)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"cache"}
    assert after["model.layers.1.memory.out_proj.weight"].any()
    rows = [json.loads(line) for line in (second / "metrics.jsonl").read_text().splitlines()]
    logged = {name: value for row in rows for name, value in row.items()}
    assert logged["loss"] == pytest.approx(logged["cache/ahead_loss"], rel=1e-5)
    assert logged["cache/readout_loss"] > 0
    for place in (1, 2, 4, 8, 16):
        assert {f"validation/overall/{name}_at_{place}" for name in ("loss", "base_loss")} <= set(logged)
    assert logged["validation/overall/loss"] != logged["validation/overall/base_loss"]
    both = PragnosiaForCausalLM.from_pretrained(second / "final_model")
    assert len(both.generate_with_cache(load_tokenizer(), ["What is 2 + 2?"], Sampling.greedy(3))) == 1

    for name in ("final_model", "checkpoint-2"):
        shutil.rmtree(second / name)
    code, text = finish(start([str(REPOSITORY / "train_ds.py"), "--resume", str(second)]))
    assert code == 0, text
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors_of(second).items())

    _, back = train(
        "back", "--init-from", str(second), "--save-strategy", "no", "--no-use-cache-augmentation"
    )
    assert back.keys() == before.keys()


if __name__ == "__main__":
    layouts, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    ranks = start_ranks("cpu")
    torch.set_num_threads(1)
    results = [train(layout, ranks, out.parent) for layout in layouts]
    if ranks.rank == 0:
        torch.save(results, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)
