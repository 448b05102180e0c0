"""Planning on paper: the bytes against ranks that are counted one by one, the time against what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import training.scale_plan as scale
from model.causal_lm import PragnosiaForCausalLM
from model.presets import config_from_arguments, preset_config, size_of
from training.cluster import GPUS, Cluster, parse_interconnect
from training.command_line import FIELDS, parse, words_of
from training.config import TrainingArguments, UserError
from training.deepspeed_config import default_path
from training.launch import launcher_parser
from training.plan import FIT, make_plan, usable_memory

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Cluster(GPUS["a100-80"], 64, parse_interconnect("200Gb"))

machines = st.integers(1, 6)
clusters = st.one_of(
    st.integers(1, 8).map(lambda gpus: Cluster(GPUS["h200"], gpus)),
    machines.map(lambda count: Cluster(GPUS["h200"], 8 * count, 25e9)),
)


def forecasts(preset="7B", cluster=CLUSTER, max_length=512, **arguments) -> list[scale.Forecast]:
    args, config = TrainingArguments(**arguments), preset_config(preset)
    return [
        scale.forecast(config, args, combination, cluster, max_length)
        for combination in scale.combinations(config, args, cluster, preset)
    ]


def counted(cluster: Cluster, sent: dict[tuple[int, int], float]) -> tuple[float, float]:
    """(most bytes of a rank to others of its machine, most of a machine to others) of rank-to-rank bytes."""
    local, network = [0.0] * cluster.gpus, [0.0] * cluster.machines
    for (source, target), nbytes in sent.items():
        if source // 8 == target // 8:
            local[source] += nbytes
        else:
            network[source // 8] += nbytes
    return max(local), max(network)


def divisors(data, count: int) -> int:
    return data.draw(st.sampled_from([size for size in range(1, count + 1) if count % size == 0]))


@given(clusters, st.data())
def test_an_all_to_all_moves_what_its_ranks_send(cluster, data):
    """Also where groups lie across machines."""
    ep, config = divisors(data, cluster.gpus), preset_config("tiny")
    each = 2 * 96 * config.num_experts_per_tok * config.hidden_size / ep
    sent = {
        (source, target): each
        for source in range(cluster.gpus)
        for target in range(source // ep * ep, source // ep * ep + ep)
        if source != target
    }
    load = scale.all_to_all(config, 96, 5, ep, cluster)
    assert (load.local / 5, load.network / 5) == pytest.approx(counted(cluster, sent))
    assert load.calls == 5 * (ep > 1)
    half, whole = (scale.all_to_all(config, 96, 5, ep, cluster, capacity) for capacity in (0.5, 1.5))
    assert (half.local, half.network) == (load.local / 2, load.network / 2) and whole == load


@given(clusters, st.data())
def test_a_ring_moves_what_its_ranks_pass_on(cluster, data):
    """Of ranks with the same experts, which lie `groups` apart."""
    groups = divisors(data, cluster.gpus)
    ranks = cluster.gpus // groups
    sent = {
        (group + place * groups, group + (place + 1) % ranks * groups): 1e9 * (ranks - 1) / ranks
        for group in range(groups)
        for place in range(ranks)
        if ranks > 1
    }
    load = scale.ring(1e9, groups, cluster)
    assert (load.local, load.network) == pytest.approx(counted(cluster, sent))


@pytest.mark.parametrize("recomputed", [False, True])
def test_flops_are_those_that_pytorch_counts(recomputed):
    """Of matrices; it does not count attention on a CPU, which is what longer rows add."""
    config = preset_config("tiny", vocab_size=1024)
    model = PragnosiaForCausalLM(config).train()
    if recomputed:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, 1024, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    expected = scale.step_flops(config, 0, streamed=False, recomputed=recomputed)
    assert counter.get_total_flops() / ids.numel() == pytest.approx(expected, rel=0.01)
    longer = scale.step_flops(config, 64, streamed=False, recomputed=recomputed)
    pairs = 64 * 64 / 2  # of a query and a key that it sees: a product with the key, one with its value
    products = config.num_hidden_layers * config.num_attention_heads * pairs * 2 * 2 * config.head_dim
    assert (longer - expected) * 64 == (4 if recomputed else 3) * products


@pytest.mark.parametrize("recomputed", [False, True])
def test_streamed_experts_compute_two_products_of_three_again(recomputed):
    config = preset_config("3B")
    resident, streamed = (
        scale.step_flops(config, 0, streamed=streamed, recomputed=recomputed) for streamed in (False, True)
    )
    products = 2 * 24 * 2 * 1024 * 1216  # gate and up of both experts in every layer
    assert streamed - resident == pytest.approx(2 * products - recomputed * 3 * products)


def test_time_is_that_of_the_measured_steps():
    """One H200: the four rows that the two constants were fitted to."""
    found = json.loads((ROOT / "benchmarks/results/train_step_resident.json").read_text())
    assert found["gpu"] == "NVIDIA H200" and len(found["rows"]) == 4
    for row in found["rows"]:
        args = TrainingArguments(per_device_train_batch_size=row["batch_size"])
        config, cluster = preset_config(row["model_size"]), Cluster(GPUS["h200"], 1)
        assert scale.compute_time(config, args, cluster, row["max_length"]) == pytest.approx(
            row["step_s"], rel=0.2
        )


def test_a_step_in_bytes_by_hand():
    """7B on 64 GPUs in groups of 8, ZeRO-1, 2 microbatches of 32 rows of 512 tokens."""
    config = preset_config("7B")
    of_experts = 32 * 64 * 3 * 1536 * 704
    dense = config.num_params() - of_experts
    args = TrainingArguments(per_device_train_batch_size=32, gradient_accumulation_steps=2)
    tokens = 32 * 512
    plain = scale.Combination("resident", {"stage": 1}, None, 8)
    found = scale.traffic_of(config, args, plain, CLUSTER, tokens, "bf16")
    rows = tokens * 2 * 1536 * 2 * 7 / 8
    assert found.all_to_all == scale.Load(rows * 4 * 32 * 2, 0, 4 * 32 * 2)
    passed = 2 * dense * 63 / 64
    assert found.gather == found.reduce
    assert found.gather.local == pytest.approx(passed)
    assert found.gather.network == pytest.approx(passed + 2 * of_experts * 7 / 8)
    args.gradient_checkpointing = True
    again = scale.traffic_of(config, args, plain, CLUSTER, tokens, "bf16")
    assert again.all_to_all.local == found.all_to_all.local * 5 / 4
    for stage, gathers, reductions in ((0, 0, 2), (2, 1, 2), (3, 6, 2)):
        other = scale.Combination("resident", {"stage": stage}, None, 8)
        moved = scale.traffic_of(config, args, other, CLUSTER, tokens, "bf16")
        assert moved.gather.network == pytest.approx(gathers * found.gather.network)
        assert moved.reduce.network == pytest.approx(reductions * found.gather.network)


@pytest.mark.parametrize(
    ("microbatches", "state", "up", "down"),
    [(1, "bf16", 2 + 6, 6), (1, "fp32", 2 + 14, 14), (3, "bf16", 3 * 2 + 2 * 2 + 6 + 2 * 2, 6 + 2 * 2)],
)
def test_streamed_experts_by_hand(microbatches, state, up, down):
    """Bytes of an expert's value over PCIe, of which a rank has its share."""
    config = preset_config("3B")
    values = 24 * 32 * 3 * 1024 * 1216
    args = TrainingArguments(gradient_accumulation_steps=microbatches)
    streamed = scale.Combination("streamed", {"stage": 1}, "streamed.json")
    for gpus in (1, 8):
        found = scale.traffic_of(config, args, streamed, Cluster(GPUS["h200"], gpus), 2048, state)
        assert (found.up, found.down) == pytest.approx((up * values / gpus, down * values / gpus))
    pool = preset_config("3B", routing="step", expert_pool=4)
    fewer = scale.traffic_of(pool, args, streamed, Cluster(GPUS["h200"], 8), 2048, state)
    assert fewer.up == pytest.approx(found.up / 8)


@settings(max_examples=20)
@given(
    st.sampled_from(["350M", "3B", "13B"]), st.sampled_from([8, 16, 64]), st.integers(1, 32), st.integers(1, 4),
    st.booleans(),
)  # fmt: skip
def test_more_of_a_machine_is_never_slower(preset, gpus, rows, microbatches, recomputed):
    arguments = {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": microbatches,
        "gradient_checkpointing": recomputed,
    }  # fmt: skip
    slow = forecasts(preset, Cluster(GPUS["a100-80"], gpus, 12.5e9), **arguments)
    for better in (Cluster(GPUS["a100-80"], gpus, 25e9), Cluster(GPUS["h100"], gpus, 12.5e9)):
        fast = forecasts(preset, better, **arguments)
        for a, b in zip(slow, fast, strict=True):
            assert b.step <= a.step + 1e-9 and a.compute <= a.step <= a.compute + a.communication + 1e-9
    best = scale.best(slow)
    fitting = [found for found in slow if found.memory.device <= FIT * 80e9]
    assert (best is None) == (not fitting)
    if best:
        assert best in fitting and best.step <= scale.ALIKE * min(found.step for found in fitting)


def test_what_is_compared():
    config = preset_config("13B")

    def sizes(gpus, **arguments):
        cluster = Cluster(GPUS["a100-80"], gpus, 25e9)
        found = scale.combinations(config, TrainingArguments(**arguments), cluster, "13B")
        return sorted({c.expert_parallel for c in found if c.placement == "resident"}), [
            c.stage for c in found
        ]

    assert sizes(64) == ([1, 2, 4, 8, 16, 32], [0, 1, 2, 3] * 6 + [1, 2, 3])
    assert sizes(24) == ([1, 2, 4, 8, 24], [0, 1, 2, 3] * 5 + [1, 2, 3])  # 3, 6 and 12 lie across machines
    assert sizes(24, expert_parallel_size=12) == ([12], [0, 1, 2, 3])
    assert sizes(6, placement="resident") == ([1, 2, 3, 6], [0, 1, 2, 3] * 4)
    assert sizes(8, placement="streamed") == ([], [1, 2, 3])
    assert sizes(1) == ([1], [2, 1, 2, 3])
    assert sizes(4, capacity_factor=1.5) == ([2, 4], [0, 1, 2, 3] * 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"placement": "zero3"}, ("--placement zero3",)),
        ({"deepspeed_config": "7B_a100_node"}, ("--deepspeed-config",)),
        ({"precision": "fp32"}, ("--precision fp32",)),
        ({"resume": "outputs/run"}, ("--resume", "use --init-from")),
        ({"device": "cpu"}, ("--device cpu",)),
        ({"stage": "cache"}, ("--stage cache",)),
        ({"expert_store": "nvme", "nvme_path": "/tmp"}, ("--expert-store nvme",)),
        ({"expert_parallel_size": 7}, ("--expert-parallel-size 7", "64 experts and 64 ranks", "use 4 or 8")),
        ({"expert_parallel_size": 8, "placement": "streamed"}, ("size 8 has no effect", "--placement resident")),
        ({"expert_vram": "1GB", "placement": "resident"}, ("--expert-vram 1GB", "--placement streamed")),
        ({"expert_parallel_size": 1, "capacity_factor": 1.5}, ("--capacity-factor 1.5", "more --gpus")),
        ({"capacity_factor": 1.5, "placement": "streamed"}, ("factor 1.5 has no effect", "--placement resident")),
    ],
)  # fmt: skip
def test_what_is_not_planned_for_is_one_line(arguments, words):
    with pytest.raises(UserError) as error:
        forecasts(**arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def lines_of(command: str) -> tuple[list[str], list[scale.Forecast]]:
    run = parse(command.split())
    config = config_from_arguments(run.model)
    lines = scale.plan_lines(
        config, run.training, run.plan.cluster, size=run.model.model_size, max_length=run.data.max_length,
        given=run.given,
    )  # fmt: skip
    found = [
        scale.forecast(config, run.training, combination, run.plan.cluster, run.data.max_length)
        for combination in scale.combinations(config, run.training, run.plan.cluster, run.model.model_size)
    ]
    return lines, found


@pytest.mark.parametrize(
    "command",
    [
        "--model-size 7B --plan --gpus 64 --gpu=a100-80 --interconnect 200Gb --batch-size 32",
        "--model-size 13B --gpus 64 --plan --interconnect 8x200Gb --expert_parallel_size 8",
        "--model-size 3B --plan --placement resident",
        "--model-size 1B --plan --gpus 1 --gpu l4 --batch-size 16 --gradient-accumulation-steps 2",
        "--model-size 13B --plan --gpus 8 --gpu rtx-4090 --gradient-checkpointing --offload-to-cpu",
        "--model-size 13B --plan --gpus 1 --gpu rtx-3090 --batch-size 8 --gradient-checkpointing",
        "--model-size 3B --plan --gpus 8 --expert-state int8 --expert-vram=512MB",
        "--plan --gpu-memory 20GB --model-size 7B --gpus 8 --batch-size 16",
    ],
)
def test_what_is_recommended_is_what_would_run(command, tmp_path, monkeypatch):
    """The command and the JSON make a plan of the same placement, stage, groups and memory."""
    lines, found = lines_of(command)
    best = scale.best(found)
    (run,) = (line for line in lines if line.startswith("run "))
    words = run.split()[3:]
    own, rest = launcher_parser().parse_known_args(words)
    ranks = found[0].ranks
    assert (own.num_gpus == ranks and not own.hostfile) if ranks <= 8 else own.hostfile
    monkeypatch.chdir(tmp_path)
    if lines[-1].startswith("{"):
        name = lines[-2].split()[-1].rstrip(":")
        Path(name).write_text(lines[-1])
    settings = parse(rest)
    gpu = parse(command.split()).plan.cluster.gpu
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(8, ranks)))
    monkeypatch.setattr("training.plan._device_memory", lambda _, args: usable_memory(gpu.memory, args))
    plan = make_plan(
        preset_config(settings.model.model_size), settings.training, size=settings.model.model_size,
        max_length=settings.data.max_length, device="cuda", world_size=ranks,
    )  # fmt: skip
    assert plan.placement == best.combination.placement
    assert plan.expert_parallel == best.combination.expert_parallel
    assert plan.ds_config["zero_optimization"] == best.combination.zero
    assert plan.memory == best.memory


def examples_of(name: str) -> list:
    """Values of a setting that are not its default."""
    default, (low, _), choices = FIELDS[name].default, *map(FIELDS[name].metadata.get, ("range", "choices"))
    if choices:
        return [choice for choice in choices if choice != default]
    if "bool" in str(FIELDS[name].type):
        return [value for value in (True, False) if value is not default]
    if low is not None:
        return [low + 2] if isinstance(low, int) and "float" not in str(FIELDS[name].type) else [0.25]
    return ["2GB"]  # a size, or a name of something


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_in_a_file_counts_as_its_flag(name, tmp_path):
    """The same plan and the same command, or the same refusal."""

    def outcome(*words: str) -> list[str]:
        try:
            run = parse(["--plan", *words])
            config = config_from_arguments(run.model)
            return scale.plan_lines(
                config, run.training, run.plan.cluster, size=size_of(config), max_length=run.data.max_length,
                given=run.given,
            )  # fmt: skip
        except UserError as error:
            return [str(error)]

    for value in examples_of(name):
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps({name: value}))
        assert outcome("--config", str(file)) == outcome(*words_of(name, value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("offload_to_cpu: true\nlearning_rate: 1e-3", "--learning-rate 1e-3 --placement streamed"),
        ("expert_vram: 1GB\nplacement: auto", "--placement resident --expert-parallel-size 8"),
        ("offload_to_cpu: false\nexpert_parallel_size: 4", "--placement resident --expert-parallel-size 4"),
        ("gpu_memory: 4GB\ndeterministic: true", "--gpu-memory 4GB --deterministic --placement streamed"),
    ],
)
def test_settings_in_a_file_leave_a_command_that_runs(text, words, tmp_path):
    """What was chosen replaces what the file says, and what would be idle is left out."""
    file = tmp_path / "run.yaml"
    file.write_text(f"model_size: 3B\n{text}")
    lines, _ = lines_of(f"--plan --config {file}")
    run = next(line for line in lines if line.startswith("run ")).split(maxsplit=5)[5]
    assert run == f"--model-size 3B {words}"
    parse(run.split())


def test_the_default_json_needs_no_file():
    lines, _ = lines_of("--model-size 3B --plan --placement resident --gpus 8 --expert-parallel-size 8")
    default = default_path("3B", "resident", "cuda", 8, 1)
    zero = json.loads(default.read_text())["zero_optimization"]
    chosen = scale.Combination("resident", zero, default.name, 8)
    found = scale.forecast(preset_config("3B"), TrainingArguments(), chosen, Cluster(GPUS["a100-80"], 8), 512)
    words = scale.launch_words(found, Cluster(GPUS["a100-80"], 8), {"num_train_epochs": 2}, "3B_plan.json")
    assert words == [
        "./launch.sh", "train", "--num-gpus", "8", "--epochs", "2", "--placement", "resident",
        "--expert-parallel-size", "8",
    ]  # fmt: skip
    assert any(line.startswith("| ") and " 8 |" in line for line in lines)


def test_where_nothing_fits_it_says_what_to_do():
    lines, found = lines_of("--model-size 13B --plan --gpus 1 --gpu l4 --placement resident")
    assert not any(forecast.fits for forecast in found)
    assert lines[-1].startswith("nothing fits in 90% of 24 GB") and "--gradient-checkpointing" in lines[-1]
    assert lines[-1].endswith("streamed experts need less")
    *_, last = lines_of("--model-size 13B --plan --gpus 1 --gpu l4 --batch-size 256")[0]
    assert last.startswith("nothing fits") and last.endswith("more GPUs")


def test_it_names_the_shares_of_what_takes_part_and_what_is_fastest():
    def lines_with(*words: str) -> tuple[str, str]:
        lines, _ = lines_of(" ".join(("--plan --model-size 1B", *words)))
        return tuple(next(line for line in lines if line.startswith(name)) for name in ("assumed", "fastest"))

    (alone, _), (machine, fastest), (two, _) = (
        lines_with(words) for words in ("--gpus 1", "--gpus 8 --gpu l4", "--gpus 16 --interconnect 100Gb")
    )
    assert "NVLink" not in alone and "network" not in alone
    assert "50% of PCIe between GPUs" in machine and "network" not in machine
    assert "55% of NVLink, 80% of the network" in two
    assert re.fullmatch(
        r"fastest +experts resident, ZeRO 1, ep 8: [\d.]+ GB of a GPU, [\d,]+ tokens/s", fastest
    )


def test_it_imports_no_torch():
    code = "import sys, training.scale_plan; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_script_prints_the_plan():
    """Without a GPU and without torch.distributed; the launcher starts no ranks for it."""
    command = ["--model-size", "tiny", "--plan", "--gpus", "16", "--interconnect", "100Gb"]
    done = subprocess.run(
        [sys.executable, "training/launch.py", "train_ds.py", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines, _ = lines_of(" ".join(command))
    assert done.stdout.splitlines() == "\n".join(lines).splitlines()
