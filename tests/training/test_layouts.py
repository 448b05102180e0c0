"""One model, one order of batches, many layouts: losses, gradients and weights are those of one plain rank.

`LAYOUTS` is the matrix. A process group trains all layouts of its rank count one after the other, so that
DeepSpeed starts twice and not a hundred times.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.preloaded import python
from tests.training.runs import REPOSITORY, start
from training.weights import initial_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

WORKER = Path(__file__).with_name("layouts.py")
TIMEOUT = 450  # seconds for all layouts of one rank count: a rank that waits for another never ends

SOURCE = initial_weights(0, 0.05)  # that of layouts.py

PAGED = {"stage": 3, "placement": "zero3", "offload": "cpu"}
PLACED = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "zero3": {**PAGED, "page_size": 2},
}
FOUR = {name: PLACED[name] for name in ("stage 0", "stage 2", "stage 3", "zero3")}

# With every step clipped hard, and no loss over tokens beside the one over targets, a step does not depend on
# the number of targets it is divided by, which counts those of a microbatch that was left out.
SCALE_FREE = {"z": 0.0, "clip": 1e-3, "steps": [0, 1, 2, 3]}
# Rows of microbatches, in order: on one rank accumulating four times 0, 1, 2, 3; on two ranks accumulating
# twice 0 and 1, then 2 and 3.
POISON_FIRST, POISON_LAST = {"poisoned": [[2, 0]]}, {"poisoned": [[2, 3]]}
POISON_ALL = {"poisoned": [[2, row] for row in range(4)]}

REFERENCE, SHORT_REFERENCE = "1 rank, stage 0", "1 rank, stage 0, short"
EQUAL = {
    **{f"1 rank, {name}": {"ranks": 1, **layout} for name, layout in PLACED.items()},
    **{f"2 ranks, {name}": {"ranks": 2, **layout} for name, layout in PLACED.items()},
}
SHORT = {  # the same for fewer steps
    SHORT_REFERENCE: {"ranks": 1, "stage": 0},
    "1 rank, pages of 1": {"ranks": 1, **PAGED, "page_size": 1},
    "1 rank, one page": {"ranks": 1, **PAGED, "page_size": 8},
    **{
        f"1 rank, 4 microbatches, {name}": {"ranks": 1, "accumulation": 4, **PLACED[name]}
        for name in ("stage 0", "stage 2", "zero3")
    },
    **{f"2 ranks, 2 microbatches, {n}": {"ranks": 2, "accumulation": 2, **x} for n, x in PLACED.items()},
    "1 rank, recompute, zero3": {"ranks": 1, "checkpointing": True, **PLACED["zero3"]},
    **{f"2 ranks, recompute, {name}": {"ranks": 2, "checkpointing": True, **x} for name, x in FOUR.items()},
}
SHORT = {name: {"steps": [0, 1, 2, 3], **layout} for name, layout in SHORT.items()}
STEP_REFERENCE = "1 rank, step routing, stage 0"
STEP_ROUTING = {  # a pool of 3 of the 8 experts, which the ranks choose together
    f"{ranks} rank, step routing, {name}": {"ranks": ranks, "pool": 3, "steps": [0, 1, 2, 3], **layout}
    for ranks, names in (
        (1, ("stage 0", "recompute")),
        (2, ("stage 0", "stage 2", "stage 3", "zero3", "recompute")),
    )
    for name, layout in (*FOUR.items(), ("recompute", {**FOUR["zero3"], "checkpointing": True}))
    if name in names
}
MEMORY_REFERENCE = "1 rank, memory, stage 0"
MEMORY = {  # in one of the two layers, whose attention sees 5 tokens
    f"{ranks} rank, memory, {name}": {"ranks": ranks, "memory": 5, "steps": [0, 1, 2, 3], **layout}
    for ranks, names in ((1, ("stage 0", "stage 3")), (2, ("stage 0", "stage 1", "stage 2", "stage 3")))
    for name, layout in (
        *((name, PLACED[name]) for name in names),
        ("zero3", {**PLACED["zero3"], "checkpointing": True}),
    )
}
PLAIN = {"plain PyTorch": {"ranks": 1, "plain": True, "steps": list(range(20))}}
BF16 = {
    f"{ranks} rank, bf16, {name}": {"ranks": ranks, "precision": "bf16", "steps": list(range(10)), **layout}
    for ranks, names in ((1, ("stage 0", "stage 3")), (2, ("stage 1", "stage 2", "zero3")))
    for name, layout in PLACED.items()
    if name in names
}
FORCED = {  # experts 4 to 7 get no token, 0 and 1 none on rank 1, 2 and 3 none on rank 0
    f"2 ranks, forced router, {name}": {
        "ranks": 2, "router": [[0, 1], [2, 3]], "steps": [0, 1], **layout
    }
    for name, layout in (*PLACED.items(), ("recompute", {**PLACED["zero3"], "checkpointing": True}))
}  # fmt: skip
SEGMENTS_REFERENCE = "plain PyTorch, segments"
SEGMENTS = {
    SEGMENTS_REFERENCE: {"ranks": 1, "plain": True},
    "1 rank, segments, stage 0": {"ranks": 1, "stage": 0},
    "1 rank, segments of 2 microbatches, zero3": {"ranks": 1, "accumulation": 2, **PLACED["zero3"]},
    "2 ranks, segments, stage 3": {"ranks": 2, "stage": 3},
}
SEGMENTS_MEMORY_REFERENCE = "1 rank, segments, memory, not clipped"
SEGMENTS_MEMORY = {
    SEGMENTS_MEMORY_REFERENCE: {"ranks": 1, "stage": 0, "memory": 5, "clip": 0},
    "1 rank, segments, memory, streamed": {
        "ranks": 1, "stage": 1, "memory": 5, "clip": 0, "placement": "streamed",
    },
    "2 ranks, segments, memory, streamed": {
        "ranks": 2, "stage": 2, "memory": 5, "clip": 0, "placement": "streamed", "accumulation": 2,
    },
}  # fmt: skip
SEGMENTS, SEGMENTS_MEMORY = (
    {name: {"segments": 3, "steps": [0, 1, 2, 3], **layout} for name, layout in cases.items()}
    for cases in (SEGMENTS, SEGMENTS_MEMORY)
)
# A poisoned layout and the undisturbed one it must equal: the step left out, or the microbatch emptied.
NAN_REFERENCES = {
    "step left out": {**SCALE_FREE, "ranks": 1, "stage": 0, "steps": [0, 1, 3]},
    "row 0 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 0]]},
    "row 3 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 3]]},
    "rows 0 and 1 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 0], [2, 1]]},
    "rows 2 and 3 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 2], [2, 3]]},
}
NAN = {}
SEGMENTS_NAN = {  # the keys of the first segment make all of its row NaN
    f"1 rank, segments, NaN in row {row}": (
        {**SCALE_FREE, "ranks": 1, "stage": 0, "accumulation": 4, "segments": 2, "poisoned": [[2, row]]},
        {**SCALE_FREE, "ranks": 1, "stage": 0, "segments": 2, "emptied": [[2, row]]},
    )
    for row in (0, 3)
}
for name, layout in FOUR.items():
    for ranks, accumulation, poison, reference in (
        (1, 4, POISON_ALL, "step left out"),
        (1, 1, POISON_LAST, "step left out"),
        (2, 1, POISON_LAST, "step left out"),
        (1, 4, POISON_FIRST, "row 0 emptied"),
        (1, 4, POISON_LAST, "row 3 emptied"),
        (2, 2, POISON_FIRST, "rows 0 and 1 emptied"),
        (2, 2, POISON_LAST, "rows 2 and 3 emptied"),
    ):
        if ranks == 1 and poison is not POISON_ALL and name not in ("stage 0", "zero3"):
            continue
        rows = "".join(str(row) for _, row in poison["poisoned"])
        case = f"{ranks} rank, NaN in row {rows} of {accumulation} microbatches, {name}"
        fields = {**SCALE_FREE, "ranks": ranks, "accumulation": accumulation, **poison, **layout}
        NAN[case] = (fields, reference)
# Streamed experts are clipped one by one, so they are compared with others where nothing is clipped, or with
# each other.
STREAMED = {"placement": "streamed", "clip": 0, "steps": list(range(6))}
STREAMED_REFERENCE = "1 rank, stage 0, not clipped"
STREAMED_STEP_REFERENCE, STREAMED_FORCED_REFERENCE = (
    "1 rank, streamed, step routing, stage 0",
    "2 ranks, forced",
)
PLACED_STREAMS = {
    "stage 0": {"stage": 0},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "dense offload": {"stage": 2, "offload": "optimizer"},
    "dense in host memory": {"stage": 3, "offload": "cpu"},
    "recompute": {"stage": 2, "checkpointing": True},
    "pages of 1": {"stage": 0, "page_size": 1, "slots": 2},
    "one page": {"stage": 1, "page_size": 8, "slots": 2},
    "2 microbatches": {"stage": 0, "accumulation": 2, "slots": 2},
    "2 microbatches, stage 2": {"stage": 2, "accumulation": 2, "page_size": 1},
    "2 microbatches, dense offload": {"stage": 2, "offload": "optimizer", "accumulation": 2},
    "2 microbatches, recompute": {"stage": 3, "accumulation": 2, "checkpointing": True},
}
STREAMED_EQUAL = {
    STREAMED_REFERENCE: {"ranks": 1, **STREAMED, "placement": "resident", "stage": 0},
    "1 rank, streamed, 4 microbatches": {"ranks": 1, **STREAMED, "stage": 0, "accumulation": 4},
} | {
    f"{ranks} rank, streamed, {name}": {"ranks": ranks, **STREAMED, **layout}
    for ranks in (1, 2)
    for name, layout in PLACED_STREAMS.items()
    if ranks == 2 or name in ("stage 0", "dense offload", "recompute", "pages of 1", "2 microbatches")
}
STREAMED_STEP_ROUTING = {
    f"{ranks} rank, streamed, step routing, {name}": {
        "ranks": ranks, "pool": 3, **STREAMED, **PLACED_STREAMS[name]
    }
    for ranks, names in ((1, ("stage 0", "one page")), (2, ("stage 0", "stage 3", "recompute", "one page")))
    for name in names
}  # fmt: skip
STREAMED_MEMORY_REFERENCE = "1 rank, memory, stage 0, not clipped"
STREAMED_MEMORY = {
    STREAMED_MEMORY_REFERENCE: {"ranks": 1, **STREAMED, "placement": "resident", "stage": 0},
    "2 ranks, streamed, memory, recompute": {"ranks": 2, **STREAMED, **PLACED_STREAMS["recompute"]},
}
STREAMED_MEMORY = {
    name: {**layout, "memory": 5, "steps": [0, 1, 2, 3]} for name, layout in STREAMED_MEMORY.items()
}
STREAMED_CLIPPED_REFERENCE = "1 rank, streamed, some experts clipped"
STREAMED_CLIPPED = {  # without clipping Adam would forgive gradients that are too large by a factor
    STREAMED_CLIPPED_REFERENCE: {"ranks": 1, **STREAMED, "stage": 0, "clip": 0.1},
    "2 ranks, streamed, some experts clipped": {"ranks": 2, **STREAMED, "stage": 2, "clip": 0.1},
}
STREAMED_BF16 = {
    f"{ranks} rank, streamed, bf16, {name}": {"ranks": ranks, **STREAMED, "precision": "bf16", **layout}
    for ranks in (1, 2)
    for name, layout in (
        ("fp32 state", {"stage": 0, "state": "fp32"}),
        ("bf16 state", {"stage": 1, "state": "bf16"}),
        ("int8 state", {"stage": 3, "state": "int8"}),
        (
            "int8 state, dense offload",
            {"stage": 2, "offload": "optimizer", "state": "int8", "accumulation": 2},
        ),
    )
    if ranks == 2 or name == "fp32 state"
}
STREAMED_FORCED = {
    STREAMED_FORCED_REFERENCE: {**STREAMED, "placement": "resident", "stage": 0},
    **{
        f"2 ranks, streamed, forced router, {name}": {**STREAMED, **PLACED_STREAMS[name]}
        for name in ("stage 0", "stage 3", "recompute", "one page")
    },
}
STREAMED_FORCED = {
    name: {"ranks": 2, "router": [[0, 1], [2, 3]], **layout} for name, layout in STREAMED_FORCED.items()
}
STREAMED_NAN_REFERENCES = {
    f"streamed, {name}": {**layout, "placement": "streamed"} for name, layout in NAN_REFERENCES.items()
}
STREAMED_NAN = {
    f"{case}, streamed": ({**layout, "placement": "streamed"}, f"streamed, {reference}")
    for case, (layout, reference) in NAN.items()
    if case.endswith(("stage 0", "stage 2"))
}
NAN |= STREAMED_NAN
POISONED = {case: fields for case, (fields, _) in NAN.items()}
LAYOUTS = {
    **PLAIN, **EQUAL, **SHORT, **STEP_ROUTING, **MEMORY, **BF16, **FORCED, **NAN_REFERENCES, **POISONED,
    **STREAMED_EQUAL, **STREAMED_CLIPPED, **STREAMED_STEP_ROUTING, **STREAMED_MEMORY, **STREAMED_BF16,
    **STREAMED_FORCED, **STREAMED_NAN_REFERENCES, **SEGMENTS, **SEGMENTS_MEMORY,
    **{name: layout for name, (layout, _) in SEGMENTS_NAN.items()},
    **{f"{name}, emptied": layout for name, (_, layout) in SEGMENTS_NAN.items()},
}  # fmt: skip

GRADIENT_TOLERANCE = 1e-5  # relative, a tensor: sums in another order
LOSS_TOLERANCE = 1e-5  # relative, every step
WEIGHT_TOLERANCE = 1e-5  # relative, a tensor: Adam divides gradients near zero by themselves
BF16_LOSS_TOLERANCE = 2e-3  # relative, against fp32


def run_worker(layouts: list[dict], ranks: int, directory: Path) -> list[dict]:
    """Results of the layouts, trained by `ranks` processes."""
    (directory / "layouts.json").write_text(json.dumps(layouts))
    processes = start(
        [str(WORKER), str(directory / "layouts.json"), str(directory / "out.pt")],
        ranks,
        LOCAL_SIZE=str(ranks),
    )
    try:
        outputs = [process.communicate(TIMEOUT)[-3000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [0] * ranks, "\n".join([str(codes), *outputs])
    return torch.load(directory / "out.pt")


def compile_operations(*builders: str) -> None:
    """Before any clock runs: a build that is killed leaves a lock behind, on which all later ones wait."""
    code = (
        "import sys, kernels.deepspeed_ops\nfrom deepspeed.accelerator import get_accelerator\n"
        "for builder in sys.argv[1:]: get_accelerator().create_op_builder(builder).load(verbose=False)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([python(), "-c", code, *builders], env=environment, cwd=REPOSITORY, check=True)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_operations("CPUAdamBuilder", "ShareMemCommBuilder")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict[str, dict]:
    return results_of(1, tmp_path_factory.mktemp("one_rank"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, dict]:
    return results_of(2, tmp_path_factory.mktemp("two_ranks"))


def results_of(ranks: int, directory: Path) -> dict[str, dict]:
    layouts = {name: layout for name, layout in LAYOUTS.items() if layout["ranks"] == ranks}
    return dict(zip(layouts, run_worker(list(layouts.values()), ranks, directory), strict=True))


@pytest.fixture(scope="module")
def results(one_rank, two_ranks) -> dict[str, dict]:
    return one_rank | two_ranks


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        name: ((found[name].float() - expected[name].float()).norm() / expected[name].float().norm()).item()
        for name in expected
    }


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    errors = relative_errors(found, expected)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"


REFERENCES = (REFERENCE, SHORT_REFERENCE, STEP_REFERENCE, MEMORY_REFERENCE)
MATRICES = (EQUAL, SHORT, STEP_ROUTING, MEMORY)


@pytest.mark.parametrize("name", [name for cases in MATRICES for name in cases if name not in REFERENCES])
def test_layouts_are_equal(results, name):
    matrix = next(index for index, cases in enumerate(MATRICES) if name in cases)
    found, expected = results[name], results[REFERENCES[matrix]]
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
    sums, expected_sums = ({k: v for k, v in r["sums"].items() if k != "balance"} for r in (found, expected))
    assert sums == pytest.approx(expected_sums, rel=LOSS_TOLERANCE)
    assert torch.equal(found["load"], expected["load"])


def test_the_reference_is_plain_pytorch(results):
    found, expected = results[REFERENCE], results["plain PyTorch"]
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SEGMENTS if name != SEGMENTS_REFERENCE])
def test_segments_are_those_of_plain_pytorch(results, name):
    found, expected = results[name], results[SEGMENTS_REFERENCE]
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
    assert found["sums"]["tokens"] == results[REFERENCE]["sums"]["tokens"]
    # Rows 1 and 3 have the first tokens of two more segments, row 2 of one and row 0, whose targets end, of none.
    assert found["sums"]["targets"] == results[REFERENCE]["sums"]["targets"] - 5
    assert found["losses"] != pytest.approx(results[SHORT_REFERENCE]["losses"], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in SEGMENTS_MEMORY if name != SEGMENTS_MEMORY_REFERENCE])
def test_streamed_segments_equal_resident_ones(results, name):
    assert_streamed_close(results[name], results[SEGMENTS_MEMORY_REFERENCE], num_always=7)


@pytest.mark.parametrize("name", SEGMENTS_NAN)
def test_a_segment_with_a_loss_of_nan_takes_its_row_along(results, name):
    found, expected = results[name], results[f"{name}, emptied"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)


def test_the_sums_of_a_step(results):
    """Of 4 rows of 24 places: real tokens and, first ones aside, targets, as `rows_of_step` lays them out."""
    found = results[REFERENCE]
    assert found["sums"]["tokens"] == 12 + 24 + 14 + 24
    assert found["sums"]["targets"] == 3 + 23 + 13 + 23
    assert found["load"].sum(1).tolist() == [2 * 74.0, 2 * 74.0]
    tokens = found["sums"]["tokens"]
    assert 1.9 < found["sums"]["balance"] / tokens < 2.5  # k when experts are used evenly
    assert 0 < found["sums"]["entropy"] / tokens < 2.0795 and found["sums"]["z"] / tokens > 4


def test_a_step_uses_its_pool_alone(results):
    """Of every layer 3 experts have rows and gradients; token routing used more."""
    found = results[STEP_REFERENCE]
    assert ((found["load"] > 0).sum(1) == 3).all() and ((results[REFERENCE]["load"] > 0).sum(1) > 3).all()
    for tensor, gradient in found["gradients"].items():
        if ".experts." in tensor:
            assert gradient.flatten(1).any(1).sum() == 3, tensor


def test_the_reference_learns(results):
    """Equality of models that stand still would prove nothing."""
    losses = results[REFERENCE]["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) and all(results[REFERENCE]["applied"])


@pytest.mark.parametrize("name", [*BF16, *STREAMED_BF16])
def test_bf16_layouts_follow_fp32(results, name):
    found = results[name]["losses"]
    expected = results[STREAMED_REFERENCE if name in STREAMED_BF16 else REFERENCE]["losses"][: len(found)]
    assert found == pytest.approx(expected, rel=BF16_LOSS_TOLERANCE)
    assert found[-1] != expected[-1], "this was not bf16"


@pytest.mark.parametrize("name", FORCED)
def test_ranks_that_use_other_experts_agree(results, name):
    found, expected = results[name], results["2 ranks, forced router, stage 0"]
    for tensor, gradient in found["gradients"].items():
        if ".experts." in tensor:
            assert gradient[:4].flatten(1).any(1).all(), f"{tensor}: an expert in use without a gradient"
            assert not gradient[4:].any(), f"{tensor}: a gradient of an expert without tokens"
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)


def assert_streamed_close(found: dict, expected: dict, num_always: int) -> None:
    """Losses, dense gradients and weights; of experts those that had gradients in all steps, or in none.

    Streamed experts without a gradient are left as they are, ordinary ones decay. `num_always`: of 8 experts a
    layer, how many at least must have been updated in all steps.
    """
    dense = {name: value for name, value in expected["gradients"].items() if ".experts." not in name}
    assert_close(found["gradients"], dense, GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert torch.equal(found["load"], expected["load"])
    weights, oracle = dict(found["weights"]), dict(expected["weights"])
    for name in [name for name in weights if ".experts." in name]:
        updates_E = found["updates"][int(name.split(".")[2])][:, 0]
        always, never = updates_E == len(found["losses"]), updates_E == 0
        assert always.sum() >= num_always
        assert torch.equal(weights[name][never], SOURCE(name, weights[name].shape, None)[never])
        weights[name], oracle[name] = weights[name][always], oracle[name][always]
    assert_close(weights, oracle, WEIGHT_TOLERANCE)


@pytest.mark.parametrize("name", [name for name in STREAMED_EQUAL if name != STREAMED_REFERENCE])
def test_streamed_experts_equal_resident_ones(results, name):
    assert_streamed_close(results[name], results[STREAMED_REFERENCE], num_always=7)


@pytest.mark.parametrize(
    ("recomputed", "plain"),
    [
        ("2 rank, streamed, recompute", "2 rank, streamed, stage 2"),
        ("2 rank, streamed, 2 microbatches, recompute", "2 rank, streamed, 2 microbatches"),
        ("2 rank, streamed, step routing, recompute", "2 rank, streamed, step routing, stage 0"),
    ],
)
def test_a_recompute_takes_no_page_again(results, recomputed, plain):
    """Under ZeRO-3 too, which hands on copies of what a module is called with."""
    assert results[recomputed]["taken"] == results[plain]["taken"] > 0


def test_streamed_experts_beside_a_memory_equal_resident_ones(results):
    found = results["2 ranks, streamed, memory, recompute"]
    assert_streamed_close(found, results[STREAMED_MEMORY_REFERENCE], num_always=7)


def test_ranks_clip_the_sum_of_their_gradients(results):
    reference, unclipped = results[STREAMED_CLIPPED_REFERENCE], results[STREAMED_REFERENCE]
    found = results["2 ranks, streamed, some experts clipped"]
    assert_streamed_close(found, reference, num_always=7)
    assert found["losses"][-1] != pytest.approx(unclipped["losses"][-1], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in STREAMED_FORCED if name != STREAMED_FORCED_REFERENCE])
def test_ranks_that_stream_other_experts_agree(results, name):
    """Experts 4 to 7 are used by no rank and stay what they were."""
    assert_streamed_close(results[name], results[STREAMED_FORCED_REFERENCE], num_always=4)
    assert not any(updates[4:].any() for updates in results[name]["updates"])


@pytest.mark.parametrize("name", STREAMED_STEP_ROUTING)
def test_streamed_pools_are_equal(results, name):
    """In the first step equal to resident ones; later they differ from these in the experts of earlier pools."""
    found, expected = results[name], results[STREAMED_STEP_REFERENCE]
    assert found["losses"][0] == pytest.approx(results[STEP_REFERENCE]["losses"][0], rel=LOSS_TOLERANCE)
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert torch.equal(torch.stack(found["updates"]), torch.stack(expected["updates"]))
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)


@pytest.mark.parametrize("name", NAN)
def test_a_microbatch_with_a_loss_of_nan_leaves_no_trace(results, name):
    _, reference = NAN[name]
    found, expected = results[name], results[reference]
    losses = [loss for loss, applied in zip(found["losses"], found["applied"], strict=True) if applied]
    assert found["applied"] == [True, True, "step left out" not in reference, True]
    assert losses == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
