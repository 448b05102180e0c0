"""Experts shared by ranks: losses, gradients, norms and weights are those of one rank that has them all.

As in test_layouts.py a process group trains all layouts of its rank count; here 2 and 4 ranks on gloo.
"""

import json
import shutil

import pytest
import torch

from tests.training.runs import REPOSITORY, finish, losses, run, start, weights, write_rows
from tests.training.test_layouts import (
    BF16_LOSS_TOLERANCE,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    WEIGHT_TOLERANCE,
    assert_close,
    compile_operations,
    run_worker,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

STEPS, FEW = list(range(20)), list(range(4))
REFERENCES = {
    "whole": {"stage": 0, "steps": STEPS},
    "few": {"stage": 0, "steps": FEW},
    "not clipped": {"stage": 0, "steps": FEW, "clip": 0},
    "step routing": {"stage": 0, "steps": FEW, "pool": 3},
    "forced": {"stage": 0, "steps": STEPS, "router": [[0, 1]]},
    # As many microbatches as ranks, because a capacity is that of a rank's microbatch.
    "capacity": {"stage": 0, "steps": FEW, "capacity": 0.8, "accumulation": 2},
    "capacity of 2 microbatches": {"stage": 0, "steps": FEW, "capacity": 1.0, "accumulation": 4},
}
# name -> ranks, what it must equal, layout; 2 ranks that share nothing are in test_layouts.py
LAYOUTS = {
    f"{ranks} ranks, {size} share, stage {stage}": (
        ranks, reference, {"stage": stage, "expert_parallel": size, "steps": REFERENCES[reference]["steps"]}
    )
    for ranks, size, reference in ((2, 2, "whole"), (4, 1, "whole"), (4, 2, "whole"), (4, 4, "whole"))
    for stage in (0, 1, 2, 3)
} | {
    f"{ranks} ranks, 2 share, {name}": (
        ranks, reference, {"stage": 2, "expert_parallel": 2, "steps": REFERENCES[reference]["steps"], **layout}
    )
    for ranks, name, reference, layout in (
        (2, "recompute", "few", {"checkpointing": True}),
        (4, "recompute, stage 3", "few", {"stage": 3, "checkpointing": True}),
        (2, "offload", "whole", {"offload": "optimizer"}),
        (2, "offload, stage 1", "whole", {"stage": 1, "offload": "optimizer"}),
        (4, "offload, stage 3", "whole", {"stage": 3, "offload": "optimizer"}),
        (2, "uneven rows", "whole", {"rows": [3, 1]}),
        (2, "uneven rows, stage 3", "whole", {"stage": 3, "rows": [1, 3]}),
        (2, "step routing", "step routing", {"pool": 3}),
        (2, "not clipped, stage 0", "not clipped", {"stage": 0, "clip": 0}),
        (2, "2 microbatches, stage 0", "whole", {"stage": 0, "accumulation": 2}),
        (2, "2 microbatches", "whole", {"accumulation": 2}),
        (2, "2 microbatches, stage 3", "whole", {"stage": 3, "accumulation": 2}),
        # All rows to the experts of one rank; those of the other have none.
        (2, "forced router", "forced", {"router": [[0, 1], [0, 1]]}),
        (2, "forced router, stage 3", "forced", {"stage": 3, "router": [[0, 1], [0, 1]]}),
        *((2, f"capacity, stage {n}", "capacity", {"stage": n, "capacity": 0.8}) for n in range(4)),
        (2, "capacity, recompute", "capacity", {"stage": 3, "capacity": 0.8, "checkpointing": True}),
        (2, "capacity, 2 microbatches", "capacity of 2 microbatches", {"capacity": 1.0, "accumulation": 2}),
        (2, "capacity for all", "few", {"capacity": 4.0}),
        (2, "no capacity", "few", {}),
    )
}  # fmt: skip
BF16 = {
    f"{ranks} ranks, bf16, stage {stage}": (
        ranks, "whole", {"stage": stage, "expert_parallel": 2, "precision": "bf16", "steps": STEPS[:10]}
    )
    for ranks, stage in ((2, 0), (2, 1), (4, 3))
}  # fmt: skip


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, dict]:
    compile_operations("CPUAdamBuilder", "ShareMemCommBuilder")
    results = run_worker([*REFERENCES.values()], 1, tmp_path_factory.mktemp("references"))
    return dict(zip(REFERENCES, results, strict=True))


@pytest.fixture(scope="module")
def results(references, tmp_path_factory) -> dict[str, dict]:
    found = {}
    for ranks in (2, 4):
        layouts = {name: layout for name, (n, _, layout) in (LAYOUTS | BF16).items() if n == ranks}
        trained = run_worker([*layouts.values()], ranks, tmp_path_factory.mktemp(f"ranks_{ranks}"))
        found |= dict(zip(layouts, trained, strict=True))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_shared_experts_equal_whole_banks(references, results, name):
    _, reference, layout = LAYOUTS[name]
    found, expected = results[name], references[reference]
    gradients = expected["gradients"]
    if layout["stage"] == 0 and layout["expert_parallel"] > 1 and layout.get("clip") != 0:  # seen clipped
        gradients = {key: value / max(1, expected["norms"][0]) for key, value in gradients.items()}
    used = {key: value for key, value in gradients.items() if value.any()}
    assert_close({key: found["gradients"][key] for key in used}, used, GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
    assert torch.equal(found["load"], expected["load"])


@pytest.mark.parametrize("name", [name for name, (_, _, layout) in LAYOUTS.items() if "capacity" in layout])
def test_drops_are_counted(references, results, name):
    """Of the choices of real tokens, of which a step has 74 with 2 in each of 2 layers."""
    found, (_, reference, _) = results[name]["sums"], LAYOUTS[name]
    assert found["router/dropped_share count"] == 2 * 2 * 74
    expected = references[reference]["sums"].get("router/dropped_share", 0)
    assert found["router/dropped_share"] == expected and (expected > 4 or reference == "few")


def test_a_capacity_for_all_changes_no_bit(results):
    found, expected = (results[f"2 ranks, 2 share, {name}"] for name in ("capacity for all", "no capacity"))
    for key in ("weights", "gradients"):
        assert all(torch.equal(found[key][name], tensor) for name, tensor in expected[key].items())
    assert found["losses"] == expected["losses"] and "router/dropped_share" not in expected["sums"]


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_fp32(references, results, name):
    found = results[name]["losses"]
    expected = references["whole"]["losses"][: len(found)]
    assert found == pytest.approx(expected, rel=BF16_LOSS_TOLERANCE) and found[-1] != expected[-1]


RUN = ("--max-steps", "4", "--save-steps", "2")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_resume_and_change_who_shares(tmp_path, stage):
    """Written by 2 ranks that share experts; read by these to the bit, by 4, by 4 in pairs, and by one alone."""
    data = write_rows(tmp_path / "rows.jsonl")
    json_path = tmp_path / "ds.json"
    json_path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    flags = (*RUN, "--deepspeed-config", str(json_path), "--batch-size")
    whole, text = run(data, tmp_path / "whole", *flags, "2", world_size=2)
    assert "shared by groups of 2 ranks" in text
    changes = {0: [(4, 2)], 2: [(2, 2), (4, 4), (1, 1)], 3: [(4, 2), (2, 1)]}[stage]
    for ranks, size in changes:
        part = tmp_path / f"{ranks}-{size}" / whole.name
        shutil.copytree(whole, part, ignore=shutil.ignore_patterns("final_model", "checkpoint-4"))
        more = (str(4 // ranks), "--expert-parallel-size", str(size), "--resume", str(part))
        run(data, part.parent, *flags, *more, world_size=ranks)
        if (ranks, size) == (2, 2):
            assert weights(part / "final_model") == weights(whole / "final_model")
        found, expected = losses(part), losses(whole)
        assert found.keys() == expected.keys()
        assert [*found.values()] == pytest.approx([*expected.values()], rel=1e-5), (ranks, size)


def test_a_run_with_a_capacity_logs_its_drops(tmp_path):
    """Of a capacity in a YAML file; half of the even share is too little."""
    data = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text("capacity_factor: 0.5\n")
    flags = (*RUN, "--expert-parallel-size", "2", "--config", str(tmp_path / "run.yaml"))
    directory, text = run(data, tmp_path / "out", *flags, world_size=2)
    assert "shared by groups of 2 ranks, capacity factor 0.5" in text
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shares = [line["router/dropped_share"] for line in lines if "loss" in line]
    assert len(shares) == 4 and all(0.1 < share < 1 for share in shares)


def test_a_capacity_is_of_the_pool_with_step_routing(tmp_path):
    """Every token takes both experts of a pool of two: the share of each is all 128 tokens of a rank, and half of
    them are kept."""
    data = write_rows(tmp_path / "rows.jsonl")
    flags = (
        "--expert-parallel-size",
        "2",
        "--routing",
        "step",
        "--capacity-factor",
        "0.5",
        "--max-steps",
        "2",
    )
    directory, text = run(data, tmp_path / "out", *flags, world_size=2)
    assert "2 active of a pool of 2" in text and "capacity factor 0.5" in text
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first, second = [line for line in lines if "loss" in line]
    for line, tokens in ((first, first["tokens"]), (second, second["tokens"] - first["tokens"])):
        assert 128 < tokens <= 256
        assert line["router/dropped_share"] == pytest.approx(1 - 128 / tokens)


def test_a_run_with_a_capacity_goes_on_without_where_none_share(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    flags = ("--deepspeed-config", str(tmp_path / "ds.json"), "--capacity-factor", "0.5", "--save-steps", "1")
    directory, _ = run(data, tmp_path / "out", "--max-steps", "1", *flags, world_size=2)
    resume = [str(REPOSITORY / "train_ds.py"), "--resume", str(directory), "--max-steps", "2"]
    code, text = finish(start(resume))
    assert code == 2 and text.splitlines()[-1].endswith("here none do: use --capacity-factor none"), text
    code, text = finish(start([*resume, "--capacity-factor", "none"]))
    assert code == 0 and "capacity factor" not in text, text
    assert set(losses(directory)) == {1, 2}


def test_weights_go_to_every_placement_and_back(tmp_path):
    """What shared experts export starts a streamed and a paged run, whose exports start shared ones again."""
    data = write_rows(tmp_path / "rows.jsonl")
    sharing = ("--expert-parallel-size", "2")
    shared, _ = run(data, tmp_path / "shared", "--max-steps", "2", *sharing, world_size=2)
    still = ("--max-steps", "1", "--learning-rate", "0", "--local-learning-rate", "0", "--init-from")
    before = weights(shared / "final_model")
    for placement in ("streamed", "zero3"):
        output = tmp_path / placement
        other, _ = run(data, output, "--placement", placement, *still, str(shared))
        back, text = run(data, tmp_path / f"{placement} and back", *still, str(other), *sharing, world_size=2)
        assert "shared by groups of 2" in text
        assert weights(other / "final_model") == weights(back / "final_model") == before


def test_frozen_experts_are_not_shared(tmp_path):
    """DeepSpeed wants an optimizer group of shared experts, and under ZeRO-3 saves none that are frozen."""
    data = write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    base, _ = run(data, tmp_path / "base", "--max-steps", "1")
    words = ("--stage", "cache", "--use-cache-augmentation", "--max-steps", "1", "--init-from", str(base))
    words += ("--deepspeed-config", str(tmp_path / "ds.json"))
    cache, text = run(data, tmp_path / "cache", *words, world_size=2)
    assert (cache / "final_model").is_dir() and "shared by" not in text
    _, text = run(data, tmp_path / "out", *words, "--expert-parallel-size", "2", world_size=2, expect=2)
    assert "--expert-parallel-size 2: DeepSpeed shares only experts that learn" in text
    assert "Traceback" not in text


def test_without_zero_who_shares_cannot_change(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    first, _ = run(data, tmp_path / "out", "--max-steps", "1", "--expert-parallel-size", "2", world_size=2)
    again = ("--max-steps", "2", "--expert-parallel-size", "1", "--resume", str(first))
    _, text = run(data, tmp_path / "out", *again, expect=2)
    assert "--expert-parallel-size 2, this run has 1" in text and "Traceback" not in text


def test_who_cannot_share_is_told(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl")
    _, text = run(data, tmp_path / "out", "--expert-parallel-size", "3", world_size=2, expect=2)
    assert "--expert-parallel-size 3 does not divide both 4 experts and 2 ranks" in text
    assert "Traceback" not in text and not (tmp_path / "out").exists(), text
