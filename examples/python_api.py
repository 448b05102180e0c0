"""Train, evaluate and ask from Python; from the root of the repository:

    python -m examples.python_api

Under `deepspeed --num_gpus N` the same file trains on N GPUs: every rank runs it.
"""

import random

from data.prompts import prompt_text
from inference.generation import Sampling, generate
from model.presets import preset_config
from training import DataArguments, Pretrainer, TrainingArguments


def sums(count: int) -> list[dict[str, str]]:
    """Rows as any dataset has them: `question` and `answer` (other columns: docs/datasets.md)."""
    draw = random.Random(0)
    pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(count)]
    return [{"question": f"What is {a} + {b}?", "answer": f"#### {a + b}"} for a, b in pairs]


def main() -> None:
    trainer = Pretrainer(
        model=preset_config("tiny"),
        args=TrainingArguments(
            output_dir="outputs",
            max_steps=30,
            save_strategy="no",
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            local_learning_rate=3e-3,
            warmup_steps=5,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=sums(400),
        data_args=DataArguments(max_length=128),
        name="tiny",
    )
    run = trainer.train()
    print("validation", trainer.evaluate()["overall"])

    model, tokenizer = trainer.engine.module, trainer.tokenizer
    prompt = prompt_text([{"role": "user", "content": "What is 2 + 3?"}], "problem", tokenizer)
    print("answer", generate(model, tokenizer, [prompt], Sampling.greedy(16), device=trainer.ranks.device))
    print("saved", run / "final_model")


if __name__ == "__main__":
    main()
