"""Weights by their exported names: fill a placed model from a source, and stream a placed model to a directory.

Every placement has its own parameters; the exported names are the common language. So a seed gives the same
initial weights whatever the placement, page size or number of ranks, and a directory written by one placement
loads into another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import repeat
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from experts import canonical
from experts.placement import Placement, ordinary_placement
from model.memory import ShortConvolution
from training.config import UserError

SHARD_BYTES = 2 << 30
BIASES = "gate.nudges_E"  # of routers: not parameters, but part of a model; 0 where a model has had none
_COMPONENT = re.compile(r"(^|\.)(memory|cache|value_head)\.")
_TWIN = "cache.copy."  # a coprocessor that begins as a copy of the model
_EXPERT = re.compile(r"^(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)$")

# (exported name, shape, first expert of a page or None) -> values, any float dtype, on CPU
Source = Callable[[str, torch.Size, "int | None"], Tensor]


def initial_weights(seed: int, std: float) -> Source:
    """Norms 1, matrices normal: each matrix, and each expert of a bank, from its own generator.

    Biases and the projections by which components add to the residual stream, `out_proj`, are 0: a new component
    changes nothing until it is trained. A memory's keys begin as its queries, and its convolution with half of the
    token before (see `model/memory.py`).
    """

    def draw(key: str, shape: torch.Size) -> Tensor:
        state = int.from_bytes(blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
        return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(state))

    def source(name: str, shape: torch.Size, first: int | None) -> Tensor:
        name = original_of(name)
        if name.endswith(("norm.weight", "layernorm.weight")):
            return torch.ones(shape)
        if name.endswith(("bias", "out_proj.weight", BIASES)):
            return torch.zeros(shape)
        if name.endswith("conv.weight"):
            return ShortConvolution.first_weight(shape)
        if _EXPERT.match(name):
            keys = [f"{name}/{(first or 0) + row}" for row in range(shape[0])]
            if len(keys) == 1:
                return draw(keys[0], shape[1:])[None]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # a generator draws on one core
                return torch.stack([*pool.map(draw, keys, repeat(shape[1:]))])
        return draw(name.replace(".memory.k_proj.", ".memory.q_proj."), shape)

    return source


def original_of(name: str) -> str:
    """The tensor of the model that a copy of it begins with; any other name as it is."""
    return f"model.{name.removeprefix(_TWIN)}" if name.startswith(_TWIN) else name


def directory_weights(directory: Path, new_components: Source | None = None) -> Source:
    """Tensors of a safetensors directory: our export, or a Qwen3-MoE's (one tensor an expert, or stacked).

    new_components: where the tensors of a component come from that the directory has not.

    Raises:
        UserError: (when called) a tensor is missing, truncated or of another shape.
    """
    files = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or not safetensors ({error}): copy it again") from None
        files.update(dict.fromkeys(handle.keys(), handle))
    if not files:
        raise UserError(f"{directory} holds no *.safetensors weights")

    def file_of(name: str):
        if name not in files:
            raise UserError(f"{directory} has no tensor {name}: it is of another architecture or incomplete")
        return files[name]

    def read(name: str) -> Tensor:
        return file_of(name).get_tensor(name)

    def source(name: str, shape: torch.Size, first: int | None) -> Tensor:
        if new_components and name not in files and name.startswith(_TWIN):
            return source(original_of(name), shape, first)
        if name.endswith(BIASES) and name not in files:
            return torch.zeros(shape)
        if new_components and name not in files and _COMPONENT.search(name):
            return new_components(name, shape, first)
        match = _EXPERT.match(name)
        if match and f"{match[1]}.gate_proj" not in files:
            bank, projection = match.groups()
            rows = slice(first or 0, (first or 0) + shape[0])
            if f"{bank}.gate_up_proj" in files:  # stacked, gate above up
                stacked = f"{bank}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
                value = read(stacked)[rows]
                if projection != "down_proj":
                    value = value.chunk(2, dim=1)[projection == "up_proj"]
            else:
                value = torch.stack(
                    [read(f"{bank}.{e}.{projection}.weight") for e in range(rows.start, rows.stop)]
                )
        elif first is not None:
            value = file_of(name).get_slice(name)[first : first + shape[0]]
        else:
            value = read(name)
        if value.shape != shape:
            raise UserError(
                f"{directory}: {name} is {list(value.shape)}, the model needs {list(shape)}: sizes differ, "
                f"use the settings it was trained with"
            )
        return value

    return source


def model_weights(model: nn.Module, new_components: Source | None = None) -> Source:
    """The weights of a resident model in memory; `new_components` as in `directory_weights`."""
    state = model.state_dict()

    def source(name: str, shape: torch.Size, first: int | None) -> Tensor:
        if new_components and name not in state and name.startswith(_TWIN):
            return source(original_of(name), shape, first)
        if name.endswith(BIASES) and name not in state:
            return torch.zeros(shape)
        if new_components and name not in state and _COMPONENT.search(name):
            return new_components(name, shape, first)
        value = state[name] if first is None else state[name][first : first + shape[0]]
        return value.cpu()

    return source


def gathered(parameter: nn.Parameter, modifier_rank: int | None = None):
    """A context in which a ZeRO-3 partitioned parameter is whole; nothing to do for any other."""
    import deepspeed

    partitioned = [parameter] if hasattr(parameter, "ds_id") else []
    return deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=modifier_rank, enabled=bool(partitioned)
    )


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> None:
    """Give every parameter its value from `source`, one at a time, then `fill_counts`. Collective under ZeRO-3."""
    for name, parameter in model.named_parameters():
        with gathered(parameter, modifier_rank=0):
            if parameter.numel() == 0:  # partitioned and this rank does not modify
                continue
            exported, first = canonical(name, parameter)
            parameter.copy_(source(exported, parameter.shape, first))
    fill_counts(model, source)
    placement_of(model).fill(source)


def fill_counts(model: nn.Module, source: Source) -> None:
    """Biases of routers from `source`; counts that belong to a run start at 0."""
    for name, count in model.named_buffers():
        if name.endswith(BIASES):
            count.copy_(source(name, count.shape, None))
        else:
            count.zero_()


@torch.no_grad()
def exported_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(exported name, CPU tensor) of every parameter and bias, parts of banks joined; collective.

    Holds one layer's pages at a time.
    """
    pages: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter):
            exported, first = canonical(name, parameter)
            owners = getattr(parameter, "owners", None)
            tensor = parameter.detach() if owners is None else joined(parameter, owners)
            tensor = tensor.to("cpu", copy=True).contiguous()
        if first is None or owners is not None:
            # Pages of one layer are consecutive: the first other parameter means they are complete.
            yield from ((bank, torch.cat(parts)) for bank, parts in pages.items())
            pages = {}
            yield exported, tensor
        else:
            pages.setdefault(exported, []).append(tensor)
    yield from ((bank, torch.cat(parts)) for bank, parts in pages.items())
    yield from ((name, count.cpu()) for name, count in model.named_buffers() if name.endswith(BIASES))
    yield from placement_of(model).tensors()


def joined(parameter: Tensor, owners: dist.ProcessGroup) -> Tensor:
    """A whole bank of which each rank of a group owns a part; collective."""
    parts = [torch.empty_like(parameter) for _ in range(owners.size())]
    dist.all_gather(parts, parameter.detach().contiguous(), group=owners)
    return torch.cat(parts)


def placement_of(model: nn.Module) -> Placement:
    """Where the model's experts live; a model that was built by hand has them all as parameters."""
    return getattr(model, "placement", None) or ordinary_placement("resident", None)


def qwen3_moe_tensors(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same weights under the names of a published Qwen3-MoE checkpoint: one tensor an expert."""
    for name, tensor in tensors:
        match = _EXPERT.match(name)
        if match is None:
            yield name, tensor
        else:
            for expert, weight in enumerate(tensor):
                yield f"{match[1]}.{expert}.{match[2]}.weight", weight.clone()


def write_shards(tensors: Iterator[tuple[str, Tensor]], directory: Path, write: bool) -> None:
    """Stream tensors to `model-*.safetensors` and their index. With `write` False only take part in gathers."""
    shard: dict[str, Tensor] = {}
    names: list[list[str]] = []
    total = 0

    def flush() -> None:
        nonlocal shard
        save_file(shard, directory / f"part-{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(shard))
        shard = {}

    for name, tensor in tensors:
        if not write:
            continue
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        total += tensor.nbytes
    if not write:
        return
    flush()
    weight_map = {}
    for number, members in enumerate(names):
        file_name = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"part-{number}.safetensors").rename(directory / file_name)
        weight_map.update(dict.fromkeys(members, file_name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
