"""What computes a chat's answers: plain torch, DeepSpeed inference over several ranks, or ZeRO-Inference.

torch        the model as it is.
deepspeed    `deepspeed.init_inference`. Over N ranks its automatic tensor parallelism splits the attention
             projections; it knows plain linear layers only, so the experts, most of the weights, are split
             here, along their hidden width. Embedding, output head, norms and routers stay whole.
offload      a ZeRO-3 engine without an optimizer (ZeRO-Inference): weights stay in host memory and pass
             through the GPU module by module.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from inference.arguments import EngineArguments, ModelSource
from inference.generation import Sampling, context_length, decode, follow_rank_zero
from training.config import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from inference.tree_of_thoughts import Tree
    from model.components import TreeConfig
    from model.config import PragnosiaConfig

PATIENCE = timedelta(days=30)  # how long the other ranks wait for the next question


@dataclass
class Engine:
    """A loaded model that answers. Rank 0 talks; the others `follow` until it calls `close`."""

    model: object
    tokenizer: object
    device: str
    description: str
    control: ProcessGroup | None = None
    """Ranks that share the model agree over this gloo group: waiting in it costs no GPU time."""

    @property
    def context(self) -> int:
        return context_length(self.model)

    def answer(self, prompt: Sequence[int], sampling: Sampling, stop: Callable[[], bool]) -> Iterator[int]:
        """Stream the tokens of one answer. To end it early make `stop` true and keep iterating."""
        self._announce((list(prompt), sampling))
        yield from self._decode(prompt, sampling, stop)

    def think(
        self, prompt: Sequence[int], sampling: Sampling, tree: TreeConfig, stop: Callable[[], bool]
    ) -> Tree:
        """One answer by a search over steps; once `stop` is true it is the best of what there is."""
        self._announce((list(prompt), sampling, tree))
        return self._search(prompt, sampling, tree, stop)

    def follow(self) -> None:
        """On ranks other than 0: compute every answer that rank 0 announces, until it closes."""
        while (question := self._announce(None)) is not None:
            if len(question) == 3:
                self._search(*question, stop=lambda: False)
                continue
            for _ in self._decode(*question, stop=lambda: False):
                pass
        self._leave()

    def close(self) -> None:
        """On rank 0: let the other ranks leave."""
        self._announce(None)
        self._leave()

    def _announce(self, question: tuple | None) -> tuple | None:
        if self.control is None:
            return question
        import torch.distributed as dist

        message = [question]
        dist.broadcast_object_list(message, src=0, group=self.control)
        return message[0]

    def _leave(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def _search(
        self, prompt: Sequence[int], sampling: Sampling, tree: TreeConfig, stop: Callable[[], bool]
    ) -> Tree:
        from inference.tree_of_thoughts import tree_of_thoughts

        found = tree_of_thoughts(
            self.model, self.tokenizer, [prompt], tree, max_new_tokens=sampling.max_new_tokens,
            seed=sampling.seed, device=self.device, agree=follow_rank_zero(self.control), stop=stop,
        )  # fmt: skip
        return found[0]

    def _decode(self, prompt: Sequence[int], sampling: Sampling, stop: Callable[[], bool]) -> Iterator[int]:
        steps = decode(
            self.model,
            [prompt],
            sampling,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            device=self.device,
            agree=follow_rank_zero(self.control),
            stop=stop,
        )
        for (token,) in steps:
            yield token


def start_workers(ranks: int) -> None:
    """Make this process rank 0 and start the other ranks with the same command line.

    They get no terminal and a session of their own, so that Ctrl-C reaches rank 0 alone; when one dies, this
    process ends, since a collective without it would wait for days.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    workers = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(1, ranks)
    ]
    os.environ.update(RANK="0", LOCAL_RANK="0")
    leaving = threading.Event()

    @atexit.register
    def end_workers() -> None:
        leaving.set()
        for worker in workers:
            worker.kill()

    def watch(rank: int, worker: subprocess.Popen) -> None:
        if worker.wait() != 0 and not leaving.is_set():
            print(f"error: rank {rank} of the chat ended", file=sys.stderr, flush=True)
            for other in workers:
                other.kill()
            os._exit(1)

    for rank, worker in enumerate(workers, start=1):
        threading.Thread(target=watch, args=(rank, worker), daemon=True).start()


def choose_device(name: str | None, ranks: int) -> str:
    """cuda:<local rank> or cpu. Raises UserError where this machine has no GPU, or fewer than ranks."""
    import torch

    from training.plan import resolve_device

    if resolve_device(name) == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
        return "cpu"
    gpus = torch.cuda.device_count()
    if gpus < ranks:
        raise UserError(f"{ranks} ranks need as many GPUs and {gpus} are visible: use --num-gpus {gpus}")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


def choose_dtype(precision: str | None, device: str) -> torch.dtype:
    """The dtype of `--precision`; bf16 on a GPU and fp32 on CPU by default. Raises UserError: fp16 on CPU."""
    from training.engine import DTYPES

    if precision == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU: use fp32 or bf16 on CPU")
    return DTYPES[precision or ("fp32" if device == "cpu" else "bf16")]


def open_engine(source: ModelSource, arguments: EngineArguments) -> Engine:
    """Load a checkpoint into the engine that was asked for, on several ranks if need be.

    Raises UserError for what does not fit together, before other ranks start and before anything is loaded.
    """
    from training.checkpoint import load_config, load_model, load_tokenizer_for, resolve_model

    launched = "WORLD_SIZE" in os.environ
    ranks = int(os.environ["WORLD_SIZE"]) if launched else arguments.num_gpus or 1
    if arguments.num_gpus not in (None, ranks):
        raise UserError(f"--num-gpus {arguments.num_gpus}, but {ranks} ranks were launched: leave it out")
    path = resolve_model(source.checkpoint)
    config = load_config(path)
    device = choose_device(source.device, ranks)
    dtype = choose_dtype(source.precision, device)
    offload = arguments.offload or (ranks == 1 and device != "cpu" and not fits(config, dtype, device))
    name = arguments.engine or ("torch" if device == "cpu" and ranks == 1 and not offload else "deepspeed")
    if name == "torch" and (ranks > 1 or offload):
        raise UserError("--engine torch holds the whole model on one device: use --engine deepspeed")
    if offload and ranks > 1:
        raise UserError("--offload works on one GPU: leave out --num-gpus")
    if ranks > 1:
        check_divisible(config, ranks)
        if not launched:
            start_workers(ranks)

    control = None
    if name == "torch":
        model, tokenizer = load_model(path, device, dtype)
    elif offload:
        tokenizer = load_tokenizer_for(path, config)
        model = _zero_inference(path, config, device, dtype)
    else:
        # Over several ranks it is cut in host memory, so that a GPU never holds more than its share.
        model, tokenizer = load_model(path, "cpu" if ranks > 1 else device, dtype)
        control = _join_ranks(device) if ranks > 1 else None
        model = _tensor_parallel(model, dtype, ranks)
    model.eval()
    place = f"{ranks} x {device.split(':')[0]}" if ranks > 1 else device
    return Engine(
        model=model,
        tokenizer=tokenizer,
        device=device,
        description=f"{path} on {place}, {str(dtype).removeprefix('torch.')}, engine {name}"
        + (", weights in host memory" if offload else ""),
        control=control,
    )


def fits(config: PragnosiaConfig, dtype: torch.dtype, device: str) -> bool:
    """Whether the model's weights fill at most 90% of the GPU's free memory."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return config.num_params() * dtype.itemsize <= 0.9 * free


def _join_ranks(device: str) -> ProcessGroup:
    """Start communication between the ranks, patient enough for a person; returns the control group."""
    import torch
    import torch.distributed as dist

    from training.engine import init_process_group, unlink_shared_buffers

    if device != "cpu":
        torch.cuda.set_device(device)
    init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    if dist.get_rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = dist.new_group(backend="gloo", timeout=PATIENCE)
    dist.barrier(group=control)
    unlink_shared_buffers()
    return control


def _tensor_parallel(model: torch.nn.Module, dtype: torch.dtype, ranks: int) -> torch.nn.Module:
    import deepspeed

    if ranks > 1:
        split_experts(model)
    return deepspeed.init_inference(
        model,
        dtype=dtype,
        tensor_parallel={"tp_size": ranks},
        # Bounds the prompt in `engine.generate`; the decode loop checks the context itself.
        max_out_tokens=model.config.max_position_embeddings,
    )


def check_divisible(config: PragnosiaConfig, ranks: int) -> None:
    """Raises UserError unless heads split evenly, and the expert width into multiples of 8 (grouped GEMM); a
    memory and a coprocessor, which reads all heads, are not split at all."""
    if config.memory:
        raise UserError("a model with a neural memory answers on one GPU: leave out --num-gpus")
    if config.cache:
        raise UserError("a model with a coprocessor answers on one GPU: leave out --num-gpus")
    for name, size, unit in (
        ("key-value heads", config.num_key_value_heads, 1),
        ("units of expert width", config.moe_intermediate_size, 8),
    ):
        if size % (ranks * unit):
            raise UserError(f"{ranks} ranks cannot share {size} {name} evenly: use another --num-gpus")


def split_experts(model: torch.nn.Module) -> None:
    """Keep this rank's slice of every expert's hidden width and sum the ranks' outputs.

    SwiGLU acts on each hidden unit alone, and the down projection sums over them, so rank r needs rows r of
    the gate and up projections and columns r of the down projection.
    """
    import torch.distributed as dist

    from model.moe import MoEBlock

    rank, ranks = dist.get_rank(), dist.get_world_size()

    def sum_over_ranks(_module: torch.nn.Module, _inputs: tuple, output_TD: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(output_TD)
        return output_TD

    for block in model.modules():
        if not isinstance(block, MoEBlock):
            continue
        for name, parameter in block.experts.named_parameters():
            width_dim = 2 if name.endswith("down_proj") else 1
            parameter.data = parameter.data.chunk(ranks, dim=width_dim)[rank].contiguous()
        block.experts.register_forward_hook(sum_over_ranks)


def _zero_inference(path: Path, config: PragnosiaConfig, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A ZeRO-3 engine without an optimizer, its weights in host memory and read one at a time."""
    import deepspeed
    import torch

    from experts import default_page_size
    from experts.placement import ordinary_placement
    from training.engine import build_model, start_ranks
    from training.weights import directory_weights

    start_ranks(torch.device(device).type)
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "cpu", "pin_memory": device != "cpu"},
            # Little more than the module that runs is kept on the GPU.
            "stage3_max_live_parameters": 1e8,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 5e7,
        },
    }
    model = build_model(
        config,
        directory_weights(path),
        ds_config,
        placement=ordinary_placement("zero3", default_page_size(config.num_experts)),
        device=torch.device(device),
        dtype=dtype,
    )
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    return engine
