"""docs/parallelism.md: its tables are computed again from `training/scale_plan.py` and compared."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import training.scale_plan as scale
from model.presets import PRESETS, preset_config
from training.cluster import GPUS, Cluster, parse_interconnect
from training.command_line import parse
from training.config import TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs/parallelism.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Cells of the rows of the table whose heading line begins so."""
    lines = DOCUMENT.split(f"\n{heading}")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"


def test_what_is_recommended():
    rows = table("| `--plan` with |")
    assert len(rows) >= 10
    for command, *cells in rows:
        run = parse(["--plan", *command.strip("`").split()])
        config, size = preset_config(run.model.model_size), run.model.model_size
        found = scale.best(
            scale.forecast(config, run.training, combination, run.plan.cluster, run.data.max_length)
            for combination in scale.combinations(config, run.training, run.plan.cluster, size)
        )
        printed = dict(zip(scale.COLUMNS, scale.cells(found), strict=True))
        assert cells == [printed[name] for name in ("experts", "ZeRO", "ep", "GPU", "tokens/s")], command


def crossing(preset: str, recomputed: bool) -> float:
    """Tokens a GPU and update at which groups of 16 send as much over the network as groups of 8."""
    config, cluster = preset_config(preset), Cluster(GPUS["a100-80"], 64, 25e9)

    def sent(tokens: float, ep: int) -> float:
        args = TrainingArguments(gradient_checkpointing=recomputed)
        chosen = scale.Combination("resident", {"stage": 1}, None, ep)
        moved = scale.traffic_of(config, args, chosen, cluster, tokens, "bf16")
        return sum(load.network for load in (moved.all_to_all, moved.gather, moved.reduce))

    base = sent(0, 8) - sent(0, 16)  # both are linear in tokens, and groups of 8 send none of those
    return base / (sent(1, 16) - sent(0, 16))


def test_tokens_below_which_groups_larger_than_a_machine_pay():
    rows = table("| preset | tokens |")
    presets = [name for name, preset in PRESETS.items() if preset.num_experts > 8]
    assert [row[0].strip("`") for row in rows] == presets
    for preset, (_, *cells) in zip(presets, rows, strict=True):
        assert cells == [f"{crossing(preset, recomputed):,.0f}" for recomputed in (False, True)]
        config = PRESETS[preset]
        assert crossing(preset, True) == pytest.approx(
            12 * config.num_experts * config.expert_width / (16 * 2 * 5)
        )


def example(gpus: int) -> Iterator[str]:
    """The values of the worked example, in the order of its rows."""
    config, args = preset_config("13B"), TrainingArguments(
        per_device_train_batch_size=32, gradient_checkpointing=True
    )  # fmt: skip
    cluster = Cluster(GPUS["a100-80"], gpus, parse_interconnect("8x200Gb"))
    chosen = next(
        c
        for c in scale.combinations(config, args, cluster, "13B")
        if (c.placement, c.stage, c.expert_parallel) == ("resident", 2, 8)
    )
    found = scale.forecast(config, args, chosen, cluster, 512)
    experts = 3 * 96 * 2048 * 528 * 40
    dense = config.num_params() - experts
    here = dense + experts / 8
    yield f"{experts / 1e9:.2f}e9"
    yield f"{dense / 1e9:.2f}e9"
    yield f"{here / 1e9:.2f}e9"
    yield gigabytes(2 * here)
    yield gigabytes(14 * config.num_params() / gpus)
    yield gigabytes(found.memory.device - 2 * here - 14 * config.num_params() / gpus)
    yield gigabytes(found.memory.device)
    traffic = found.traffic
    rows = 2 * 16384 * 2 * 2048
    assert traffic.all_to_all.local == rows * 7 / 8 * 5 * 40 and traffic.all_to_all.network == 0
    yield gigabytes(traffic.all_to_all.local)
    yield milliseconds(traffic.all_to_all.seconds(cluster))
    ring = 2 * dense * (gpus - 1) / gpus + 2 * experts * (gpus // 8 - 1) / (gpus // 8)
    assert traffic.gather.network == traffic.reduce.network == pytest.approx(ring)
    yield gigabytes(ring)
    yield milliseconds(traffic.reduce.seconds(cluster))
    yield f"{scale.step_flops(config, 512, streamed=False, recomputed=True) / 1e9:.2f}e9"
    yield milliseconds(found.compute)
    hidden = scale.OVERLAP * 3 / 4 * found.compute
    assert found.waiting == pytest.approx(
        traffic.all_to_all.seconds(cluster)
        + traffic.gather.seconds(cluster)
        + max(0, traffic.reduce.seconds(cluster) - hidden)
    )
    yield milliseconds(found.step)
    yield f"{found.tokens_per_second:,.0f}"


def test_the_worked_example():
    rows = table("| what | how | 64 GPUs")
    assert [row[2] for row in rows] == list(example(64))
    assert [row[3] for row in rows] == list(example(1024))


def compared() -> Iterator[tuple[str, str]]:
    """(estimated, measured) of each line."""
    for row in json.loads((ROOT / "benchmarks/results/train_step_resident.json").read_text())["rows"]:
        args = TrainingArguments(per_device_train_batch_size=row["batch_size"])
        seconds = scale.compute_time(preset_config(row["model_size"]), args, Cluster(GPUS["h200"], 1), 512)
        yield milliseconds(seconds), milliseconds(row["step_s"])

    def streamed(size: str, gpus: int, rows: int) -> str:
        config = preset_config(size)
        args = TrainingArguments(placement="streamed", per_device_train_batch_size=rows)
        cluster = Cluster(GPUS["h200"], gpus)
        chosen = scale.combinations(config, args, cluster, size)[0]
        return f"{scale.forecast(config, args, chosen, cluster, 512).tokens_per_second:,.0f} tokens/s"

    yield streamed("3B", 2, 4), "4,300 to 5,900 tokens/s"
    for row in json.loads((ROOT / "benchmarks/results/scale_out_streamed.json").read_text())["rows"]:
        found = streamed(row["model_size"], row["num_gpus"], row["batch_size"])
        yield found, f"{row['tokens_per_s']:,.0f} tokens/s"


def test_what_was_measured():
    assert [tuple(row[1:]) for row in table("| what | estimated")] == list(compared())
    assert "4,300 to 5,900 tokens/s" in (ROOT / "docs/log.md").read_text()


def test_the_constants_are_those_of_the_code():
    from training.cluster import LATENCY, NETWORK_SHARE, NVLINK_SHARE, PCIE_SHARE, PEER_SHARE

    for words in (
        f"({scale.PEAK_SHARE:.0%} of the peak) + {1000 * scale.LAYER_SECONDS:.0f} ms × L A",
        f"{LATENCY * 1e6:.0f} µs a call",
        f"{NVLINK_SHARE:.0%} of NVLink and {PCIE_SHARE[2]:.0%} of PCIe ({PCIE_SHARE[1]:.0%} for one GPU)",
        f"{NETWORK_SHARE:.0%} of the network, and without NVLink {PEER_SHARE:.0%} of PCIe",
        f"{1000 * scale.FETCH_SECONDS} ms of Python a module that it fetches (measured), {scale.FETCHED} (2 + r)",
        f"within {scale.ALIKE - 1:.0%} count as equally fast",
        f"fits in {scale.FIT:.0%} of the GPU's memory",
    ):
        assert words in DOCUMENT
    assert scale.OVERLAP == 0.5 and "half the computation it can hide behind" in DOCUMENT
