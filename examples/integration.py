"""A trained model in a program of one's own: `transformers` loads it, and it answers with all it has.

    python -m examples.integration outputs/pragnosia_tiny_8experts_20260101-120000 "What is 2 + 3?"

Outside this repository `from_pretrained(directory, trust_remote_code=True)` loads the code that lies beside the
weights, and `generate` works; the components answer with the code of this repository.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import model  # noqa: F401 - registers the architecture
from data.prompts import prompt_text
from inference.generation import Sampling
from training.checkpoint import resolve_model


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("checkpoint", help="a run, a checkpoint or a model directory")
    options.add_argument("question")
    options.add_argument("--max-length", type=int, default=64)
    given = options.parse_args()

    directory = resolve_model(given.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    network = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompt = prompt_text([{"role": "user", "content": given.question}], "problem", tokenizer)

    # As any model of `transformers`.
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    tokens = network.generate(**inputs, max_new_tokens=given.max_length, do_sample=False)
    print("generate", tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    # With every component that it was trained with.
    (answer,) = network.generate_enhanced(tokenizer, [prompt], Sampling.greedy(given.max_length))
    print("enhanced", answer)


if __name__ == "__main__":
    main()
