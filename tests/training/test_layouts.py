"""One model, one order of batches, many layouts: losses, gradients and weights are those of one plain rank.

`LAYOUTS` is the matrix. A process group trains all layouts of its rank count one after the other, so that
DeepSpeed starts twice and not a hundred times.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]

WORKER = Path(__file__).with_name("layouts.py")
TIMEOUT = 300  # seconds for all layouts of one rank count: a rank that waits for another never ends

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
    **{f"1 rank, 4 microbatches, {n}": {"ranks": 1, "accumulation": 4, **x} for n, x in PLACED.items()},
    **{f"2 ranks, 2 microbatches, {n}": {"ranks": 2, "accumulation": 2, **x} for n, x in PLACED.items()},
    **{f"1 rank, recompute, {name}": {"ranks": 1, "checkpointing": True, **x} for name, x in FOUR.items()},
    **{f"2 ranks, recompute, {name}": {"ranks": 2, "checkpointing": True, **x} for name, x in FOUR.items()},
}
SHORT = {name: {"steps": [0, 1, 2, 3], **layout} for name, layout in SHORT.items()}
PLAIN = {"plain PyTorch": {"ranks": 1, "plain": True, "steps": list(range(20))}}
BF16 = {
    f"{ranks} rank, bf16, {name}": {"ranks": ranks, "precision": "bf16", "steps": list(range(10)), **layout}
    for ranks in (1, 2)
    for name, layout in PLACED.items()
}
FORCED = {  # experts 4 to 7 get no token, 0 and 1 none on rank 1, 2 and 3 none on rank 0
    f"2 ranks, forced router, {name}": {
        "ranks": 2, "router": [[0, 1], [2, 3]], "steps": [0, 1], **layout
    }
    for name, layout in (*PLACED.items(), ("recompute", {**PLACED["zero3"], "checkpointing": True}))
}  # fmt: skip
# A poisoned layout and the undisturbed one it must equal: the step left out, or the microbatch emptied.
NAN_REFERENCES = {
    "step left out": {**SCALE_FREE, "ranks": 1, "stage": 0, "steps": [0, 1, 3]},
    "row 0 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 0]]},
    "row 3 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 3]]},
    "rows 0 and 1 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 0], [2, 1]]},
    "rows 2 and 3 emptied": {**SCALE_FREE, "ranks": 1, "stage": 0, "emptied": [[2, 2], [2, 3]]},
}
NAN = {}
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
        rows = "".join(str(row) for _, row in poison["poisoned"])
        case = f"{ranks} rank, NaN in row {rows} of {accumulation} microbatches, {name}"
        fields = {**SCALE_FREE, "ranks": ranks, "accumulation": accumulation, **poison, **layout}
        NAN[case] = (fields, reference)
POISONED = {case: fields for case, (fields, _) in NAN.items()}
LAYOUTS = {**PLAIN, **EQUAL, **SHORT, **BF16, **FORCED, **NAN_REFERENCES, **POISONED}

GRADIENT_TOLERANCE = 1e-5  # relative, a tensor: sums in another order
LOSS_TOLERANCE = 1e-5  # relative, every step
WEIGHT_TOLERANCE = 1e-5  # relative, a tensor: Adam divides gradients near zero by themselves
BF16_LOSS_TOLERANCE = 2e-3  # relative, against fp32


def run_worker(layouts: list[dict], ranks: int, directory: Path) -> list[dict]:
    """Results of the layouts, trained by `ranks` processes of two threads' worth of CPU at most."""
    (directory / "layouts.json").write_text(json.dumps(layouts))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks)},
        }
        with open(directory / f"rank_{rank}.log", "w") as log:
            command = [
                sys.executable,
                str(WORKER),
                str(directory / "layouts.json"),
                str(directory / "out.pt"),
            ]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["hangs"]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((directory / f"rank_{rank}.log").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, f"{codes}\n{logs}"
    return torch.load(directory / "out.pt")


def compile_operations(*builders: str) -> None:
    """Before any clock runs: a build that is killed leaves a lock behind, on which all later ones wait."""
    code = (
        "import sys\nfrom deepspeed.accelerator import get_accelerator\n"
        "for builder in sys.argv[1:]: get_accelerator().create_op_builder(builder).load(verbose=False)"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code, *builders], env=environment, check=True)


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


@pytest.mark.parametrize(
    "name", [name for name in (*EQUAL, *SHORT) if name not in (REFERENCE, SHORT_REFERENCE)]
)
def test_layouts_are_equal(results, name):
    found, expected = results[name], results[REFERENCE if name in EQUAL else SHORT_REFERENCE]
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


def test_the_sums_of_a_step(results):
    """Of 4 rows of 24 places: real tokens and, first ones aside, targets, as `rows_of_step` lays them out."""
    found = results[REFERENCE]
    assert found["sums"]["tokens"] == 12 + 24 + 14 + 24
    assert found["sums"]["targets"] == 3 + 23 + 13 + 23
    assert found["load"].sum(1).tolist() == [2 * 74.0, 2 * 74.0]
    tokens = found["sums"]["tokens"]
    assert 1.9 < found["sums"]["balance"] / tokens < 2.5  # k when experts are used evenly
    assert 0 < found["sums"]["entropy"] / tokens < 2.0795 and found["sums"]["z"] / tokens > 4


def test_the_reference_learns(results):
    """Equality of models that stand still would prove nothing."""
    losses = results[REFERENCE]["losses"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) and all(results[REFERENCE]["applied"])


@pytest.mark.parametrize("name", BF16)
def test_bf16_layouts_follow_fp32(results, name):
    found = results[name]["losses"]
    expected = results[REFERENCE]["losses"][: len(found)]
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


@pytest.mark.parametrize("name", NAN)
def test_a_microbatch_with_a_loss_of_nan_leaves_no_trace(results, name):
    _, reference = NAN[name]
    found, expected = results[name], results[reference]
    losses = [loss for loss, applied in zip(found["losses"], found["applied"], strict=True) if applied]
    assert found["applied"] == [True, True, reference != "step left out", True]
    assert losses == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)


@pytest.mark.timeout(1500)  # the asynchronous reader and writer compile for minutes, once
def test_offload_to_nvme(one_rank, tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("offload to NVMe needs libaio")
    compile_operations("AsyncIOBuilder")
    expected = one_rank[SHORT_REFERENCE]
    layout = {**PAGED, "offload": str(tmp_path), "page_size": 2, "steps": SHORT[SHORT_REFERENCE]["steps"]}
    (found,) = run_worker([layout], 1, tmp_path)
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
