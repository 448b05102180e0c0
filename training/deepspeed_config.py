"""The DeepSpeed JSON: chosen, checked key by key, and completed with what the command line owns.

DeepSpeed ignores a misspelt top-level key and drops `"auto"` in a nested one without a word, so every key is
checked here: sections that DeepSpeed declares as pydantic models against those models, the rest against the
table in `top_level`. A setting has one owner: `OWNED_BY_FLAGS` lists the keys that the command line owns.
"""

import functools
import json
import math
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.config import TrainingArguments, UserError, did_you_mean

DIRECTORY = Path(__file__).resolve().parent.parent / "deepspeed_configs"

PLACEMENTS = ("resident", "streamed", "zero3")
NOMINAL_PARAMETERS = {"tiny": 8e6, "350M": 350e6, "1B": 1e9, "3B": 3e9, "7B": 7e9, "13B": 13e9}

BATCH_KEYS = {
    "train_batch_size": "--batch-size, --gradient-accumulation-steps, --segments and the number of GPUs",
    "train_micro_batch_size_per_gpu": "--batch-size",
    "gradient_accumulation_steps": "--gradient-accumulation-steps and --segments",
    "gradient_clipping": "--gradient-clip",
}

OWNED_BY_FLAGS = {
    "optimizer": "--learning-rate, --local-learning-rate and --weight-decay",
    "scheduler": "--lr-scheduler and --warmup-steps",
    "activation_checkpointing": "--gradient-checkpointing",
    "steps_per_print": "--logging-steps",
    "tensorboard": "--report-to",
    "wandb": "--report-to",
    "csv_monitor": "--report-to",
    "comet": "--report-to",
    "data_efficiency": "--dataset and --max-length",
    "dataloader_drop_last": "--batch-size",
}

# Read here and kept from DeepSpeed, which would put layers of its own in place of ours.
EXPERT_PARALLEL = "expert_parallel"

# Read by DeepSpeed, but meant for engines and training loops that this project does not use.
WITHOUT_EFFECT = (
    "autotuning",
    "compile",
    "data_parallel_group",
    "datastates_ckpt",
    "hybrid_engine",
    "managed_gradient_accumulation",
    "pipeline",
    "sequence_parallel_size",
    "tensor_parallel",
    "torch_autocast",
    "use_data_before_expert_parallelism",
    "weight_quantization",
)


@functools.cache
def top_level() -> dict[str, Any]:
    """Keys that a JSON may set -> a DeepSpeed pydantic model, a dictionary of nested keys, or a type."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers": {"throughput": DeepSpeedThroughputTimerConfig},
        "aio": {
            "block_size": int,
            "queue_depth": int,
            "intra_op_parallelism": int,
            "single_submit": bool,
            "overlap_events": bool,
            "use_gds": bool,
        },
        "checkpoint": {"tag_validation": str, "parallel_write": {"pipeline_stage": bool}},
        "data_types": {"grad_accum_dtype": str},
        "flops_profiler": {
            "enabled": bool,
            "recompute_fwd_factor": float,
            "profile_step": int,
            "module_depth": int,
            "top_modules": int,
            "detailed": bool,
            "output_file": str,
        },
        "communication_data_type": str,
        "seq_parallel_communication_data_type": str,
        "prescale_gradients": bool,
        "gradient_predivide_factor": float,
        "disable_allgather": bool,
        "disable_python_gc": bool,
        "dump_state": bool,
        "wall_clock_breakdown": bool,
        "memory_breakdown": bool,
        "zero_allow_untested_optimizer": bool,
        "zero_force_ds_cpu_optimizer": bool,
        "log_level": str,
    }


def default_path(preset: str, placement: str, device: str, world_size: int, nodes: int) -> Path:
    """The JSON for a run that names none.

    Args:
        preset: a key of NOMINAL_PARAMETERS; `nearest_preset` gives one for a custom model.
        placement: resident, streamed or zero3.
        device: cuda or cpu.
        world_size: ranks altogether, on `nodes` machines.
    """
    assert preset in NOMINAL_PARAMETERS and placement in PLACEMENTS and 1 <= nodes <= world_size
    if device == "cpu":
        return DIRECTORY / ("cpu_zero3.json" if placement == "zero3" else "cpu.json")
    if placement == "streamed":
        return DIRECTORY / "streamed.json"
    machine = "consumer" if placement == "zero3" else "a100_node" if nodes == 1 else "a100_cluster"
    return DIRECTORY / f"{preset}_{machine}.json"


def nearest_preset(num_params: float) -> str:
    """The preset whose nominal number of parameters is nearest, as a ratio."""
    return min(NOMINAL_PARAMETERS, key=lambda name: abs(math.log(NOMINAL_PARAMETERS[name] / num_params)))


def load(
    path: str | os.PathLike,
    args: TrainingArguments,
    *,
    placement: str,
    precision: str,
    world_size: int,
) -> dict[str, Any]:
    """Reads, checks and completes a DeepSpeed JSON.

    Args:
        path: a file, or the name of one in deepspeed_configs, with or without `.json`.
        args: gives the batch arithmetic and the gradient clipping.
        placement: resident, streamed or zero3; a JSON for zero3 offloads parameters, one for resident nothing.
        precision: bf16, fp16 or fp32: what `"enabled": "auto"` and absent sections become.
        world_size: data-parallel ranks.
    Returns:
        What `deepspeed.initialize(config=...)` takes; `zero_optimization.stage` is always there. Its
        precision is `precision_of(config)`, which differs from `precision` where the JSON switches bf16 or
        fp16 itself and `--precision` is not given.
    Raises:
        UserError: no such file, not JSON, keys unknown or owned by a flag, values that DeepSpeed refuses,
            precision set in both places, a section that does not fit the placement.
    """
    file = _find(path)
    config = _read(file)
    for key, value in config.items():
        if key in BATCH_KEYS and value != "auto":
            raise UserError(f'{file}: {key} is set by {BATCH_KEYS[key]}: leave it out or write "auto"')
        if key in OWNED_BY_FLAGS:
            raise UserError(f"{file}: {key} is set by {OWNED_BY_FLAGS[key]}: take it out of the JSON")
        if key in WITHOUT_EFFECT:
            raise UserError(f"{file}: {key} has no effect in this trainer: take it out of the JSON")
    autoep_size = _autoep_size(file, config)
    if placement != "resident" and autoep_size not in ("auto", 1):
        raise UserError(
            f"{file}: {EXPERT_PARALLEL}.autoep_size {autoep_size} has no effect on {placement} experts: "
            'write "auto", or use --placement resident'
        )
    sections = {"zero_optimization": {}} | {
        key: value for key, value in config.items() if key not in (*BATCH_KEYS, EXPERT_PARALLEL)
    }
    _fill_precision(file, sections, args, precision)
    _check_section(str(file), sections, top_level(), offered=[*BATCH_KEYS, EXPERT_PARALLEL])
    sections["zero_optimization"] = {"stage": 0} | sections["zero_optimization"]
    _check_placement(file, sections["zero_optimization"], placement)
    micro, accumulation = args.per_device_train_batch_size, args.backward_passes
    completed = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": args.gradient_clip,
        **sections,
    }
    _check_whole(file, completed)
    return {"train_batch_size": micro * accumulation * world_size, **completed}


def placement_of(path: str | os.PathLike) -> str:
    """The placement a JSON asks for: zero3 where it offloads parameters, streamed where only the optimizer, else
    auto: either of the others."""
    file = _find(path)
    zero = _read(file).get("zero_optimization")
    if not isinstance(zero, dict):
        return "auto"
    if _offloads(zero, "offload_param"):
        return "zero3"
    return "streamed" if _offloads(zero, "offload_optimizer") else "auto"


def autoep_size(path: str | os.PathLike) -> int | str:
    """What `expert_parallel.autoep_size` of a JSON says: GPUs that share the experts of a layer, or "auto", which
    is also what a JSON without that section means. Raises UserError."""
    file = _find(path)
    return _autoep_size(file, _read(file))


def resolve_expert_parallel(
    num_experts: int, world_size: int, flag: int | None, json_value: int | str, json_is_default: bool
) -> int:
    """How many ranks share the experts of a layer: a divisor of both the experts and the ranks.

    Args:
        flag: --expert-parallel-size.
        json_value: `autoep_size` of the JSON. "auto": as many as can.
        json_is_default: whether nobody named the JSON; its number is then an upper bound that the flag overrides.
    Raises:
        UserError: the flag beside a number in a JSON that was named, or a size that does not divide both.
    """
    common = math.gcd(num_experts, world_size)
    valid = [size for size in range(1, common + 1) if common % size == 0]
    if flag is not None and json_value != "auto" and not json_is_default:
        raise UserError(
            f"--expert-parallel-size {flag} and the JSON's {EXPERT_PARALLEL}.autoep_size {json_value} are both "
            'given: leave the flag out or write "auto" there'
        )
    asked = json_value if flag is None else flag
    if asked == "auto":
        return common
    if flag is None and json_is_default:
        return max(size for size in valid if size <= asked)
    if asked not in valid:
        name = f"{EXPERT_PARALLEL}.autoep_size" if flag is None else "--expert-parallel-size"
        near = [*[size for size in valid if size < asked][-1:], *[size for size in valid if size > asked][:1]]
        raise UserError(
            f"{name} {asked} does not divide both {num_experts} experts and {world_size} ranks: "
            f"use {' or '.join(map(str, near))}"
        )
    return asked


def precision_of(config: dict[str, Any]) -> str:
    """bf16, fp16 or fp32, as a completed configuration trains."""
    return next((name for name in ("bf16", "fp16") if config[name]["enabled"]), "fp32")


def check_nvme(config: dict[str, Any]) -> None:
    """Raises UserError where the configuration offloads to NVMe and this machine cannot."""
    sections = (
        config.get("zero_optimization", {}).get(name) for name in ("offload_param", "offload_optimizer")
    )
    paths = {section.get("nvme_path") for section in sections if section and section.get("device") == "nvme"}
    for path in paths:
        if path is None:
            raise UserError('offload to NVMe needs "nvme_path": the directory of a fast local disk')
        check_nvme_path(path, "name another nvme_path in the JSON")


def check_nvme_path(path: str, way_out: str) -> None:
    """Raises UserError where files in `path` cannot be read and written with DeepSpeed's asynchronous I/O."""
    if not os.path.isdir(path) or not os.access(path, os.W_OK):
        raise UserError(f"{path} is no writable directory: create it or {way_out}")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError("offload to NVMe needs libaio: install libaio-dev (Debian) or libaio-devel (Fedora)")


def _find(path: str | os.PathLike) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    if file.name == os.fspath(path):
        shipped = DIRECTORY / f"{file.name.removesuffix('.json')}.json"
        if shipped.is_file():
            return shipped
    names = [shipped.name for shipped in DIRECTORY.glob("*.json")]
    raise UserError(f"--deepspeed-config {path}: no such file{did_you_mean(file.name, names)}")


def _read(file: Path) -> dict[str, Any]:
    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        section = dict(pairs)
        if len(section) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"{file}: {next(k for k in keys if keys.count(k) > 1)} is set twice")
        return section

    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_doubles)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} line {error.lineno}: not JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected an object of DeepSpeed settings")
    return config


def _autoep_size(file: Path, config: dict[str, Any]) -> int | str:
    section = config.get(EXPERT_PARALLEL, {})
    if not isinstance(section, dict):
        raise UserError(f"{file}: {EXPERT_PARALLEL} must be an object")
    for key in section:
        if key != "autoep_size":
            near = did_you_mean(key, ["autoep_size"])
            raise UserError(
                f"{file}: {EXPERT_PARALLEL}.{key} has no effect in this trainer{near or ': take it out'}"
            )
    size = section.get("autoep_size", "auto")
    if size != "auto" and not (_is_a(size, int) and size >= 1):
        raise UserError(
            f'{file}: {EXPERT_PARALLEL}.autoep_size must be "auto" or a whole number from 1, not {size!r}'
        )
    return size


def _fill_precision(file: Path, sections: dict[str, Any], args: TrainingArguments, precision: str) -> None:
    """Makes `enabled` of bf16 and fp16 true or false; an inactive section keeps nothing else."""
    enabled = {}
    for name in ("bf16", "fp16"):
        section = sections.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{file}: {name} must be an object")
        enabled[name] = section.get("enabled", "auto")
    if any(value != "auto" for value in enabled.values()):
        if args.precision is not None:
            name = next(name for name, value in enabled.items() if value != "auto")
            raise UserError(
                f'{file}: {name}.enabled and --precision both set the precision: write "auto" there'
            )
        if all(value is True for value in enabled.values()):
            raise UserError(f"{file}: bf16 and fp16 are both enabled: choose one")
        # What the JSON leaves to us is off, or else one section would contradict the other.
        enabled = {name: value is True for name, value in enabled.items()}
    else:
        enabled = {name: name == precision for name in enabled}
    for name, value in enabled.items():
        sections[name] = {**sections.get(name, {}), "enabled": value} if value else {"enabled": False}


def _check_section(where: str, section: Any, schema: Any, offered: list[str] | None = None) -> None:
    """Checks keys and values of one JSON object against its schema; `offered` are further keys to suggest."""
    if not isinstance(section, dict):
        raise UserError(f"{where} must be an object")
    keys = schema if isinstance(schema, dict) else dict(_model_keys(schema))
    separator = ": " if offered is not None else "."
    for key, value in section.items():
        name = f"{where}{separator}{key}"
        if key not in keys:
            near = did_you_mean(key, [*keys, *(offered or [])])
            raise UserError(f"{name} is no setting of DeepSpeed{near}")
        kind = keys[key]
        if value == "auto":
            raise UserError(
                f'{name} is "auto", which DeepSpeed drops without a word: give a value or leave it out'
            )
        if isinstance(kind, dict) or (kind is not None and hasattr(kind, "model_fields")):
            if value is not None:
                _check_section(name, value, kind)
        elif kind is not None and not _is_a(value, kind):
            raise UserError(f"{name} must be of type {kind.__name__}, not {value!r}")
    if not isinstance(schema, dict):
        _check_values(where, section, schema)


def _check_values(where: str, section: dict[str, Any], model: type) -> None:
    """Lets DeepSpeed's own model judge the values of a section."""
    from pydantic import ValidationError

    try:
        model(**section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}{'.' * bool(key)}{key}: {first['msg']}") from None
    except (AssertionError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _check_whole(file: Path, config: dict[str, Any]) -> None:
    """Lets DeepSpeed judge how the sections fit together; `config` leaves out the size of the whole batch."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(config)
    except (AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise UserError(f"{file}: {error}") from None


def _is_a(value: Any, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _model_keys(model: type) -> Iterator[tuple[str, Any]]:
    """(key, nested model or None) of a DeepSpeed pydantic model, without the keys it calls deprecated."""
    for name, field in model.model_fields.items():
        if (field.json_schema_extra or {}).get("deprecated"):
            continue
        kinds = (field.annotation, *typing.get_args(field.annotation))
        nested = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        yield name, nested
        if field.alias:
            yield field.alias, nested


def _offloads(zero: dict[str, Any], name: str) -> bool:
    section = zero.get(name)
    return isinstance(section, dict) and section.get("device", "none") != "none"


def _check_placement(file: Path, zero: dict[str, Any], placement: str) -> None:
    """The offload sections of the JSON against the placement of the run."""
    offloads = {name: _offloads(zero, name) for name in ("offload_param", "offload_optimizer")}
    if placement == "zero3" and not (zero.get("stage") == 3 and offloads["offload_param"]):
        raise UserError(
            f"{file}: the zero3 placement needs zero_optimization.stage 3 with an offload_param device: "
            "take another JSON or --placement resident"
        )
    if placement == "resident" and offloads["offload_optimizer"] and not zero.get("stage"):
        raise UserError(
            f"{file}: zero_optimization.offload_optimizer needs stage 1, 2 or 3: set one, or take it out"
        )
    if placement == "resident" and offloads["offload_param"]:
        raise UserError(
            f"{file}: zero_optimization.offload_param needs the zero3 or streamed placement: "
            "take another JSON or another --placement"
        )
