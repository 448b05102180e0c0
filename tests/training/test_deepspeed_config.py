"""Every shipped JSON is one DeepSpeed takes; every mistake in one is named."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.presets import PRESETS, preset_config
from training.config import TrainingArguments, UserError
from training.deepspeed_config import (
    DIRECTORY,
    NOMINAL_PARAMETERS,
    autoep_size,
    check_nvme,
    default_path,
    load,
    nearest_preset,
    placement_of,
    precision_of,
    resolve_expert_parallel,
)
from training.estimate import estimate

SHIPPED = sorted(path.name for path in DIRECTORY.glob("*.json"))
MACHINES = ("consumer", "consumer_nvme", "a100_node", "a100_cluster")


def placement_named(name: str) -> str:
    if name.startswith("streamed"):
        return "streamed"
    return "zero3" if "consumer" in name or "zero3" in name else "resident"


def load_text(tmp_path, text: str | dict, placement="resident", precision="bf16", world_size=1, **arguments):
    path = tmp_path / "ds.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    args = TrainingArguments(**arguments)
    return load(path, args, placement=placement, precision=precision, world_size=world_size)


def test_every_preset_has_every_machine_class():
    assert set(SHIPPED) == {f"{p}_{m}.json" for p in NOMINAL_PARAMETERS for m in MACHINES} | {
        "cpu.json",
        "cpu_zero3.json",
        "streamed.json",
        "streamed_offload.json",
        "streamed_zero3.json",
    }


def test_readme_names_every_machine_class_and_preset():
    text = (DIRECTORY / "README.md").read_text()
    alone = ["`cpu.json`", "`cpu_zero3.json`", "`streamed.json`", "`streamed_offload.json`"]
    alone += ["`streamed_zero3.json`"]
    for name in [*alone, *(f"`<preset>_{machine}.json`" for machine in MACHINES)]:
        assert name in text
    for preset in NOMINAL_PARAMETERS:
        assert f"| `{preset}` |" in text


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_load_into_deepspeed(name, precision):
    from deepspeed.runtime.config import DeepSpeedConfig

    args = TrainingArguments(per_device_train_batch_size=2, gradient_accumulation_steps=3, gradient_clip=0.5)
    config = load(name, args, placement=placement_named(name), precision=precision, world_size=1)
    assert "auto" not in json.dumps(config)
    understood = DeepSpeedConfig(config)
    assert understood.train_batch_size == 6
    assert understood.train_micro_batch_size_per_gpu == 2
    assert understood.gradient_accumulation_steps == 3
    assert understood.gradient_clipping == 0.5
    assert understood.bfloat16_config.enabled == (precision == "bf16")
    assert understood.float16_config.enabled == (precision == "fp16")
    assert precision_of(config) == precision
    asks = {"streamed.json": "auto", "streamed_zero3.json": "zero3"}  # of the two that offload alike, zero3
    asks = asks.get(name, placement_named(name))
    offloads = asks != "resident" and asks != "auto"
    assert placement_of(name) == (asks if offloads else "auto")
    with pytest.raises(UserError):
        load(
            name,
            args,
            placement="resident" if asks == "zero3" else "zero3",
            precision=precision,
            world_size=1,
        )


@pytest.mark.parametrize("name", [name for name in SHIPPED if "consumer" in name])
def test_consumer_files_keep_little_in_gpu_memory(name):
    zero = json.loads((DIRECTORY / name).read_text())["zero_optimization"]
    assert zero["stage3_max_live_parameters"] <= 1e8
    assert zero["stage3_prefetch_bucket_size"] <= 5e7
    assert zero["reduce_bucket_size"] <= 5e7
    assert zero["stage3_max_reuse_distance"] == 0


def test_batch_arithmetic_counts_the_ranks(tmp_path):
    config = load_text(
        tmp_path,
        {"train_batch_size": "auto", "gradient_clipping": "auto"},
        world_size=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
    )
    assert config["train_batch_size"] == 60
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("1B", "resident", "cpu", 2, 1), "cpu.json"),
        (("tiny", "zero3", "cpu", 1, 1), "cpu_zero3.json"),
        (("13B", "zero3", "cuda", 1, 1), "13B_consumer.json"),
        (("3B", "resident", "cuda", 8, 1), "3B_a100_node.json"),
        (("7B", "resident", "cuda", 16, 2), "7B_a100_cluster.json"),
        (("7B", "streamed", "cuda", 2, 1), "streamed.json"),
        (("tiny", "streamed", "cpu", 1, 1), "cpu.json"),
    ],
)
def test_default_path(arguments, name):
    path = default_path(*arguments)
    assert path.name == name and path.is_file()


@pytest.mark.parametrize(
    ("parameters", "preset"),
    [(1, "tiny"), (8e6, "tiny"), (5e8, "350M"), (1.2e9, "1B"), (5e9, "7B"), (1e12, "13B")],
)
def test_nearest_preset(parameters, preset):
    assert nearest_preset(parameters) == preset


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"zero_optimisation": {}},
            "zero_optimisation is no setting of DeepSpeed: did you mean zero_optimization?",
        ),
        ({"gradient_cliping": 1}, "did you mean gradient_clipping?"),
        (
            {"zero_optimization": {"stge": 1}},
            "zero_optimization.stge is no setting of DeepSpeed: did you mean stage?",
        ),
        (
            {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}},
            "did you mean stage3_max_live_parameters?",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise is no setting of DeepSpeed: did you mean device?",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload is no setting"),
        ({"aio": {"block_sise": 1}}, "aio.block_sise is no setting of DeepSpeed: did you mean block_size?"),
        ({"timers": {"throughput": {"enabledd": True}}}, "timers.throughput.enabledd"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, 'is "auto", which DeepSpeed drops'),
        ({"zero_optimization": True}, "zero_optimization must be an object"),
        ({"prescale_gradients": 1}, "prescale_gradients must be of type bool, not 1"),
        ({"aio": {"queue_depth": "8"}}, "aio.queue_depth must be of type int"),
        ({"train_batch_size": 32}, "train_batch_size is set by --batch-size, --gradient-accumulation-steps"),
        ({"train_micro_batch_size_per_gpu": 4}, "is set by --batch-size"),
        ({"gradient_accumulation_steps": 1}, "is set by --gradient-accumulation-steps"),
        ({"gradient_clipping": 1.0}, "is set by --gradient-clip"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is set by --learning-rate"),
        ({"scheduler": {}}, "scheduler is set by --lr-scheduler"),
        ({"wandb": {"enabled": True}}, "wandb is set by --report-to"),
        ({"tensor_parallel": {}}, "tensor_parallel has no effect"),
        ({"expert_paralel": {}}, "did you mean expert_parallel?"),
        ({"expert_parallel": 8}, "expert_parallel must be an object"),
        (
            {"expert_parallel": {"autoep_sise": 8}},
            "expert_parallel.autoep_sise has no effect in this trainer: did",
        ),
        (
            {"expert_parallel": {"enabled": True}},
            "expert_parallel.enabled has no effect in this trainer: take it",
        ),
        (
            {"expert_parallel": {"autoep_size": 0}},
            'autoep_size must be "auto" or a whole number from 1, not 0',
        ),
        ({"expert_parallel": {"autoep_size": True}}, "or a whole number from 1, not True"),
        ({"expert_parallel": {"autoep_size": "8"}}, "or a whole number from 1, not '8'"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both enabled"),
        ({"bf16": True}, "bf16 must be an object"),
        ({"fp16": {"enabled": True, "loss_scale": -1}}, "fp16.loss_scale"),
        ({"bf16": {"enabled": "auto", "bf16_optimizer_states": True}}, "ZeRO Stage 1, 2, or 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "offload_param needs the zero3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer needs stage 1",
        ),
        ("{", "line 1: not JSON"),
        ("[]", "expected an object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is set twice"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, config, message):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, config)
    assert message in str(caught.value)
    assert "ds.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero3_needs_stage_3_with_parameter_offload(tmp_path):
    for zero in ({"stage": 3}, {"stage": 2, "offload_optimizer": {"device": "cpu"}}, {}):
        with pytest.raises(UserError, match="stage 3 with an offload_param device"):
            load_text(tmp_path, {"zero_optimization": zero}, placement="zero3")


def test_precision_has_one_owner(tmp_path):
    switched = {"fp16": {"enabled": True, "initial_scale_power": 8}, "bf16": {"enabled": "auto"}}
    config = load_text(tmp_path, switched, precision="bf16")
    assert precision_of(config) == "fp16"
    assert config["fp16"]["initial_scale_power"] == 8
    args = TrainingArguments(precision="fp16")
    with pytest.raises(UserError, match=r"fp16\.enabled and --precision both set the precision"):
        load(tmp_path / "ds.json", args, placement="resident", precision="fp16", world_size=1)


def test_an_inactive_precision_keeps_no_settings(tmp_path):
    lean = {
        "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "zero_optimization": {"stage": 1},
    }
    assert load_text(tmp_path, lean, precision="bf16")["bf16"]["bf16_optimizer_states"] is True
    assert load_text(tmp_path, lean, precision="fp32")["bf16"] == {"enabled": False}


def test_names_are_looked_up_among_the_shipped_files():
    args = TrainingArguments()
    expected = load(DIRECTORY / "cpu.json", args, placement="resident", precision="fp32", world_size=1)
    for name in ("cpu", "cpu.json"):
        assert load(name, args, placement="resident", precision="fp32", world_size=1) == expected
    with pytest.raises(UserError, match=r"did you mean 13B_consumer\.json"):
        load("13b_consumr", args, placement="resident", precision="fp32", world_size=1)


def nvme(path: str | None) -> dict:
    offload = {"device": "nvme"} if path is None else {"device": "nvme", "nvme_path": path}
    return {"zero_optimization": {"stage": 3, "offload_param": offload}}


def test_nvme_needs_a_writable_directory(tmp_path):
    with pytest.raises(UserError, match='needs "nvme_path"'):
        check_nvme(nvme(None))
    with pytest.raises(UserError, match="no writable directory"):
        check_nvme(nvme(str(tmp_path / "missing")))


def test_nvme_needs_libaio(tmp_path):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        check_nvme(nvme(str(tmp_path)))
    else:
        with pytest.raises(UserError, match="needs libaio"):
            check_nvme(nvme(str(tmp_path)))


def test_no_offload_needs_no_disk():
    check_nvme({})
    check_nvme({"zero_optimization": {"stage": 1}})


def test_expert_parallelism_is_kept_from_deepspeed(tmp_path):
    """Its own would put other layers in the place of ours."""
    for size in ("auto", 8):
        config = load_text(tmp_path, {"expert_parallel": {"autoep_size": size}})
        assert "expert_parallel" not in config
        assert autoep_size(tmp_path / "ds.json") == size
    assert autoep_size("cpu_zero3.json") == "auto"  # has no such section
    with pytest.raises(UserError, match=r"autoep_size 8 has no effect on streamed experts: write \"auto\""):
        load_text(tmp_path, {"expert_parallel": {"autoep_size": 8}}, placement="streamed")
    load_text(tmp_path, {"expert_parallel": {"autoep_size": "auto"}}, placement="streamed")


@pytest.mark.parametrize("preset", PRESETS)
def test_shipped_files_share_experts_within_a_machine(preset):
    experts = PRESETS[preset].num_experts
    assert autoep_size(f"{preset}_a100_node") == "auto"
    bound = autoep_size(f"{preset}_a100_cluster")
    assert resolve_expert_parallel(experts, 64, None, bound, True) == bound == 8


sizes = st.integers(1, 300)


@given(sizes, sizes, sizes, sizes, st.booleans())
def test_experts_and_ranks_are_divided_whatever_is_asked(experts, ranks, flag, number, json_is_default):
    """Or an error, whose way out is none."""
    whole = [size for size in range(1, 301) if experts % size == 0 == ranks % size]
    assert resolve_expert_parallel(experts, ranks, None, "auto", json_is_default) == whole[-1]
    bounded = max(size for size in whole if size <= number)
    assert resolve_expert_parallel(experts, ranks, None, number, True) == bounded
    for asked, arguments, name in (
        (flag, (flag, "auto", json_is_default), "--expert-parallel-size"),
        (flag, (flag, number, True), "--expert-parallel-size"),
        (number, (None, number, False), "expert_parallel.autoep_size"),
    ):
        if asked in whole:
            assert resolve_expert_parallel(experts, ranks, *arguments) == asked
            continue
        with pytest.raises(UserError) as error:
            resolve_expert_parallel(experts, ranks, *arguments)
        assert str(error.value).startswith(
            f"{name} {asked} does not divide both {experts} experts and {ranks} ranks"
        )
        offered = [int(size) for size in str(error.value).split("use ")[1].split(" or ")]
        nearest = [
            *[size for size in whole if size < asked][-1:],
            *[size for size in whole if size > asked][:1],
        ]
        assert offered == nearest and offered
    with pytest.raises(UserError, match=r"--expert-parallel-size .* are both given"):
        resolve_expert_parallel(experts, ranks, flag, number, False)


def test_the_readme_tells_the_gpu_memory_of_the_a100_files():
    """As `estimate` has it for one row of one token, rounded up."""
    lines = (DIRECTORY / "README.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| preset |"))
    machines = [(m, int(header.split(f"`a100_{m}`, ")[1].split()[0])) for m in ("node", "cluster")]
    assert machines == [("node", 8), ("cluster", 16)]
    for preset in PRESETS:
        told = next(line for line in lines if line.startswith(f"| `{preset}` |")).strip("| ").split(" | ")
        for cell, (machine, ranks) in zip(told[-2:], machines, strict=True):
            name = f"{preset}_a100_{machine}"
            shared = resolve_expert_parallel(
                PRESETS[preset].num_experts, ranks, None, autoep_size(name), True
            )
            found = estimate(
                preset_config(preset), json.loads((DIRECTORY / f"{name}.json").read_text()), placement="resident",
                page_size=None, precision="bf16", micro_batch_size=1, max_length=1, checkpointing=False,
                world_size=ranks, expert_parallel=shared,
            )  # fmt: skip
            assert cell == f"{math.ceil(found.device / 1e8) / 10} GB"
