"""What each reasoning component does to the validation loss of a small model; from the root of the repository:

    python -m examples.component_ablation --steps 200

One base model is trained, then the same with each component: the same rows in the same order, the same first
weights. The coprocessor of the cache augmentation is trained on the finished base. Whole studies, with several
seeds and tasks that tell components apart: benchmarks/components.py.
"""

import argparse

from examples.python_api import sums
from model.presets import preset_config
from training import DataArguments, Pretrainer, TrainingArguments
from training.checkpoint import resolve_model
from training.weights import directory_weights, initial_weights

ARMS = {
    "base": {},
    "memory": {"use_neural_memory": True},
    "value head": {"use_tree_of_thoughts": True},
    "cache": {"use_cache_augmentation": True, "stage": "cache"},
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options.add_argument("--output", default="outputs")
    given = options.parse_args()
    rows, base = sums(400), None
    for arm in given.arms:
        args = TrainingArguments(
            output_dir=given.output, max_steps=given.steps, save_strategy="no", per_device_train_batch_size=8,
            learning_rate=3e-3, local_learning_rate=3e-3, warmup_steps=5, logging_steps=given.steps,
            report_to="none", **ARMS[arm],
        )  # fmt: skip
        start = None
        if arm == "cache":
            if base is None:
                options.error("--arms cache needs base before it: the coprocessor reads a trained model")
            start = directory_weights(resolve_model(base), initial_weights(args.seed, 0.02))
        trainer = Pretrainer(
            model=preset_config("tiny"),
            args=args,
            train_dataset=rows,
            data_args=DataArguments(max_length=128),
            init_from=start,
            name="tiny",
        )
        run = trainer.train()
        if arm == "base":
            base = str(run)
        row = trainer.evaluate()["overall"]
        print(f"{arm:12} validation loss {row['loss']:.4f}  perplexity {row['perplexity']:.4g}", flush=True)


if __name__ == "__main__":
    main()
