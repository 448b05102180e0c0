"""A training loop of one's own, from the pieces that `Pretrainer` is made of; from the root of the repository:

    python -m examples.custom_training_loop

Everything a run decides is in the plan: change `placement` to streamed or zero3, and the same loop trains with the
experts in host memory. Under `deepspeed --num_gpus N` every rank runs it.
"""

import argparse
from pathlib import Path

from data.loader import TrainLoader, prepare_rows
from data.tokenizer_asset import load_tokenizer
from examples.python_api import sums
from model.presets import preset_config
from training import DataArguments, TrainingArguments
from training.engine import (
    DTYPES,
    build_engine,
    build_model,
    build_placement,
    set_learning_rates,
    start_ranks,
)
from training.export import export_model
from training.plan import make_plan, resolve_device
from training.schedule import learning_rate_factor
from training.step import reduce_results, train_step
from training.weights import initial_weights


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--placement", default="resident", choices=("resident", "streamed", "zero3"))
    options.add_argument("--output", default="outputs/custom_loop")
    options.add_argument("--local-rank", type=int, default=0)  # the launcher adds it
    given = options.parse_args()

    args = TrainingArguments(
        placement=given.placement, per_device_train_batch_size=8, learning_rate=3e-3, local_learning_rate=3e-3
    )
    data_args, tokenizer, config = DataArguments(max_length=128), load_tokenizer(), preset_config("tiny")
    device = resolve_device(args.device)
    ranks = start_ranks(device, given.local_rank)
    data = prepare_rows(sums(400), data_args, tokenizer)
    split = {"rank": ranks.rank, "world_size": ranks.world_size}

    plan = make_plan(
        config, args, size="tiny", max_length=data_args.max_length, device=device, world_size=ranks.world_size
    )
    model = build_model(
        config,
        initial_weights(args.seed, config.initializer_range),
        plan.ds_config,
        placement=build_placement(plan, args, ranks),
        device=ranks.device,
        dtype=DTYPES[plan.precision],
    )
    engine = build_engine(model, args, plan.ds_config)
    loader = TrainLoader(
        data.train, micro_batch_size=args.per_device_train_batch_size, accumulation=1, seed=args.seed,
        num_workers=0, **split,
    )  # fmt: skip

    step, epoch = 0, 0
    while step < given.steps:
        for microbatches in loader.epoch(epoch):
            set_learning_rates(engine, args, learning_rate_factor("cosine", step, given.steps, 5))
            sums_of_step, _ = reduce_results([train_step(engine, microbatches)])
            step += 1
            if ranks.rank == 0 and step % 10 == 0:
                print(f"step {step}  loss {sums_of_step['loss_sum'] / sums_of_step['targets']:.4f}")
            if step == given.steps:
                break
        epoch += 1
    export_model(
        engine.module, tokenizer, Path(given.output), export_format="pragnosia", write=ranks.rank == 0
    )
    if ranks.rank == 0:
        print(f"saved {given.output}")


if __name__ == "__main__":
    main()
