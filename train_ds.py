"""Train a Mixture-of-Experts language model through DeepSpeed.

./launch.sh train                                            # the tiny preset on the embedded data
./launch.sh train --model-size 1B --dataset all --epochs 3   # everything after `train` comes here
deepspeed --num_gpus 8 train_ds.py --model-size 3B --dataset chat:2,my.jsonl:1
python train_ds.py --model-size tiny --device cpu --max-steps 20
python train_ds.py --resume outputs/pragnosia_1B_16experts_20260101-120000
python train_ds.py --model-size 13B --dry-run                # print the resolved settings and stop
python train_ds.py --model-size 13B --plan --gpus 64 --gpu a100-80 --interconnect 200Gb   # before there are GPUs
"""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

from training.command_line import RunArguments, parse, run_script
from training.config import UserError


def main() -> int:
    run = parse()
    if run.list_datasets:
        from data.sources import list_datasets

        print(list_datasets())
        return 0
    if run.plan:
        return plan(run)
    if run.training.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed looks for a GPU
    if run.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    return dry_run(run) if run.dry_run else train(run)


def settings_of(run: RunArguments) -> dict:
    """All settings, for run.json and --dry-run."""
    from dataclasses import asdict

    groups = ("model", "data", "training", "memory", "cache", "tree")
    return {name: asdict(getattr(run, name)) for name in groups}


def starting_point(run: RunArguments):
    """(configuration, tokenizer, weights or None) from --resume, --init-from or --model-size."""
    from data.tokenizer_asset import load_tokenizer
    from model.presets import check_agreement, config_from_arguments, rerouted
    from training import checkpoint as disk
    from training.weights import directory_weights, initial_weights

    origin = None
    if run.training.resume:
        origin = disk.resolve_checkpoint(run.training.resume) / "model"
    elif run.model.init_from:
        origin = disk.resolve_model(run.model.init_from, "--init-from")
    if origin is None:
        tokenizer = load_tokenizer(run.model.tokenizer)
        config = config_from_arguments(
            run.model, vocab_size=len(tokenizer), max_position_embeddings=max(4096, run.data.max_length)
        )
        return config, tokenizer, None
    config = disk.load_config(origin)
    if "routing" in run.given and not run.training.resume:
        config = rerouted(config, run.model)
    check_agreement(run.model, config, origin, run.given)
    config.router_aux_loss_coef, config.router_z_loss_coef = (
        run.model.router_aux_loss_coef,
        run.model.router_z_loss_coef,
    )
    tokenizer = disk.load_tokenizer_for(origin, config)
    if run.model.tokenizer and load_tokenizer(run.model.tokenizer).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--tokenizer {run.model.tokenizer} is not the tokenizer of {origin}: leave --tokenizer out"
        )
    if run.training.resume:
        return config, tokenizer, None
    new_components = initial_weights(run.training.seed, config.initializer_range)
    return config, tokenizer, directory_weights(origin, new_components)


def asked_components(run: RunArguments, config) -> dict:
    """Name -> configuration of the components that flags add."""
    from training.components import COMPONENTS, from_arguments, refuse_idle_flags

    for name in COMPONENTS:
        refuse_idle_flags(name, getattr(run, name), run.training)
    return {
        name: from_arguments(name, getattr(run, name), config)
        for name, (flag, _) in COMPONENTS.items()
        if getattr(run.training, flag)
    }


def dry_run(run: RunArguments) -> int:
    """Print the resolved settings, the plan and its memory estimate.

    Raises:
        UserError: what `train` would raise of these settings, before it looks at data and weights.
    """
    from model.presets import size_of
    from training.checkpoint import resolve_checkpoint
    from training.plan import plan_run, resolve_device

    config, _, _ = starting_point(run)
    resume = run.training.resume
    plan = plan_run(
        config,
        run.training,
        run.data,
        is_trained=bool(resume or run.model.init_from),
        resume_from=resolve_checkpoint(resume) if resume else None,
        size=size_of(config),
        device=resolve_device(run.training.device),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        **asked_components(run, config),
    )
    print(json.dumps({**settings_of(run), "deepspeed": plan.ds_config}, indent=1))
    print("\n".join(plan.lines(run.training, run.data.max_length)))
    return 0


def plan(run: RunArguments) -> int:
    """Print an estimate for GPUs that need not be here, and the command that would run there."""
    from model.presets import size_of
    from training.components import add_components
    from training.scale_plan import plan_lines

    config, _, _ = starting_point(run)
    add_components(config, run.training, **asked_components(run, config))
    lines = plan_lines(
        config,
        run.training,
        run.plan.cluster,
        size=size_of(config),
        max_length=run.data.max_length,
        given=run.given,
    )
    print("\n".join(lines))
    return 0


def train(run: RunArguments) -> int:
    """The whole job: data, training, validation, sample answers, and where everything is."""
    from data.loader import prepare
    from inference.generation import sample_answers
    from kernels.dispatch import describe
    from model.presets import size_of
    from training.components import has_labelled_steps
    from training.engine import leave_ranks, start_ranks
    from training.plan import resolve_device
    from training.pretrainer import Interrupted, Pretrainer

    ranks = start_ranks(resolve_device(run.training.device), run.local_rank)
    say = print if ranks.rank == 0 else lambda *_args: None
    config, tokenizer, weights = starting_point(run)
    data = prepare(
        run.data, tokenizer, run.training.seed, ranks.rank, ranks.world_size,
        steps=has_labelled_steps(config, run.training),
    )  # fmt: skip
    components = {f"{name}_module": asked for name, asked in asked_components(run, config).items()}
    trainer = Pretrainer(
        model=config,
        args=run.training,
        train_dataset=data,
        tokenizer=tokenizer,
        data_args=run.data,
        init_from=weights,
        name=size_of(config),
        settings=settings_of(run),
        **components,
    )
    say("\n".join(trainer.plan.lines(run.training, run.data.max_length)))
    routing = describe(ranks.device, config.num_experts, config.num_experts_per_tok, config.hidden_size)
    say(f"kernels     routing in {routing}")
    say(f"run         {trainer.run_dir}")
    sys.stdout.flush()
    try:
        run_dir = trainer.train()
    except Interrupted as stop:
        say(f"{stop}\nresume with: --resume {shlex.quote(str(trainer.run_dir))}")
        return 128 + stop.signal_number
    shown = [example for examples in data.validation_examples.values() for example in examples[:2]]
    for sample in sample_answers(trainer.engine.module, tokenizer, shown, device=ranks.device):
        answer = "\n".join(sample["answer"].splitlines()[:8])[:400].strip()
        say(f"\n[{sample['family']}] {sample['prompt'].strip()}\n-> {answer or '(nothing)'}")
    launcher = Path(__file__).resolve().parent / "launch.sh"
    chat = shlex.join([str(launcher), "chat", "--checkpoint", str(run_dir)])
    say(f"\nsaved       {run_dir / 'final_model'}\nchat with   {chat}")
    leave_ranks()
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(143))  # until the run installs its own handler
    run_script(main)
