"""Evaluation of a model that has memorised some answers: known numbers, equal for every batch and layout."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inference.evaluation import evaluate_loss
from tests.preloaded import python

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

TAUGHT = {
    "questions.jsonl": [
        {"question": f"How much is {word}?", "answer": f"{word}\n#### {number}"}
        for number, word in enumerate(["nil", "one", "two", "three", "four", "five", "six", "seven", "eight"])
    ],
    "tasks.jsonl": [
        {"docstring": f"Return {n}.", "code": f"def f():\n    return {n}", "tests": f"assert f() == {n}"}
        for n in (3, 5, 8, 9)
    ],
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory, byte_tokenizer) -> Path:
    """A directory with final_model/ that knows TAUGHT by heart, and files of the same names in which 3 of the
    9 questions and 1 of the 4 tasks want something else."""
    import torch

    from data.loader import eval_batches, prepare_rows
    from data.schema import to_example
    from model import PragnosiaConfig, PragnosiaForCausalLM
    from training.config import DataArguments
    from training.export import export_model

    directory = tmp_path_factory.mktemp("taught")
    config = PragnosiaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=2,
        moe_intermediate_size=128,
        max_position_embeddings=384,
        router_aux_loss_coef=0.0,
        router_z_loss_coef=0.0,
        pad_token_id=byte_tokenizer.pad_token_id,
        eos_token_id=byte_tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = PragnosiaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    examples = [to_example(row, dataset=name, where=name) for name, rows in TAUGHT.items() for row in rows]
    arguments = DataArguments(max_length=128, validation_fraction=0.0)
    (batch,) = eval_batches(prepare_rows(examples, arguments, byte_tokenizer).train, 32)
    for _ in range(400):
        loss = model(**batch).loss
        if loss < 0.05:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    export_model(model, byte_tokenizer, directory / "final_model", export_format="pragnosia", write=True)

    changed = json.loads(json.dumps(TAUGHT))
    for row in changed["questions.jsonl"][::4]:
        row["answer"] = "something else\n#### 77"
    changed["tasks.jsonl"][2]["tests"] = "assert f() == 77"
    for name, rows in changed.items():
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def evaluate(directory: Path, tmp_path: Path, *flags: str, launcher: tuple[str, ...] = ()) -> dict:
    output = tmp_path / "results.json"
    files = ",".join(str(directory / name) for name in TAUGHT)
    result = subprocess.run(
        [
            *(python(), *launcher, str(REPOSITORY / "eval_ds.py"), "--checkpoint", str(directory)),
            *("--dataset", files, "--device", "cpu", "--cache-dir", str(tmp_path / "cache")),
            *("--output-file", str(output), *flags),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {**json.loads(output.read_text()), "printed": result.stdout}


@pytest.fixture(scope="module")
def reference(taught, tmp_path_factory) -> dict:
    return evaluate(taught, tmp_path_factory.mktemp("reference"), "--batch-size", "8", "--execute-code")


def test_numbers_are_the_known_ones(taught, reference) -> None:
    results = reference["results"]
    assert results["reasoning"]["exact_match"] == pytest.approx(6 / 9)
    assert results["reasoning"]["answers"] == 9
    assert results["code"]["pass_rate"] == pytest.approx(3 / 4)
    assert results["overall"]["samples"] == 13
    assert set(results) == {"reasoning", "code", "overall"}
    for row in results.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    tokens = [results[family]["tokens"] for family in ("reasoning", "code")]
    losses = [results[family]["loss"] for family in ("reasoning", "code")]
    mean = sum(t * loss for t, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    assert results["overall"]["loss"] == pytest.approx(mean)


def test_loss_equals_one_example_at_a_time(taught, reference, byte_tokenizer) -> None:
    """Oracle without packing and batches: cross entropy of each answer's tokens, from the logits."""
    import torch

    from data.prompts import encode
    from data.schema import to_example
    from training.checkpoint import load_model

    model, tokenizer = load_model(taught / "final_model", "cpu", torch.float32)
    for name, family in (("questions.jsonl", "reasoning"), ("tasks.jsonl", "code")):
        total = targets = characters = 0
        for line in (taught / name).read_text().splitlines():
            example = to_example(json.loads(line), dataset=name, where=name)
            ids, labels = encode(example, tokenizer, max_length=384)
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for position, label in enumerate(labels):
                if label != -100:
                    total -= log_probs[position - 1, label].item()
                    targets += 1
            characters += len(example.answer().encode())
        row = reference["results"][family]
        assert row["tokens"] == targets
        assert row["loss"] == pytest.approx(total / targets, rel=1e-5)
        # Whether the end of an answer counts as text is the data's business: one token an answer at most.
        assert row["bits_per_byte"] == pytest.approx(total / characters / math.log(2), rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_same_numbers_for_any_batch_size(taught, reference, tmp_path, batch_size) -> None:
    compare(evaluate(taught, tmp_path, "--batch-size", batch_size, "--execute-code"), reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29619"),
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    ],
    ids=["deepspeed", "torchrun"],
)
def test_same_numbers_for_two_ranks(taught, reference, tmp_path, launcher) -> None:
    found = evaluate(taught, tmp_path, "--batch-size", "2", "--execute-code", launcher=launcher)
    assert found["world_size"] == 2
    compare(found, reference)
    assert found["printed"].count("bits_per_byte") == 1  # rank 0 alone talks


def compare(found: dict, reference: dict) -> None:
    for family, row in reference["results"].items():
        for name, value in row.items():
            assert found["results"][family][name] == pytest.approx(value, rel=1e-6), (family, name)
    assert found["examples"] == reference["examples"]


def test_code_runs_only_when_asked(taught, tmp_path) -> None:
    results = evaluate(taught, tmp_path, "--max-samples", "2", "--show-examples", "1")
    assert "pass_rate" not in results["results"]["code"]
    assert results["results"]["reasoning"]["answers"] == 2
    assert "--- reasoning, wrong" in results["printed"]
    assert "--- code, not checked" in results["printed"]
    assert [e["family"] for e in results["examples"]] == ["reasoning", "reasoning", "code"]


@pytest.mark.slow
def test_searches_are_measured_beside_greedy_answers(taught, give_head, tmp_path) -> None:
    """What a model knows by heart every search finds, most of it at least, with more tokens."""
    give_head(taught, tmp_path, max_thought_tokens=16, beam_width=2, max_depth=2, temperature=0.05)
    for name in TAUGHT:
        (tmp_path / name).write_text((taught / name).read_text())
    results = evaluate(tmp_path, tmp_path, "--tree")
    rows = {row["search"]: row for row in results["searches"]}
    assert list(rows) == ["greedy", "likelihood beam 2x4", "best of 8", "tree 2x4"]
    assert (
        rows["greedy"]["exact_match"]
        == results["results"]["reasoning"]["exact_match"]
        == pytest.approx(6 / 9)
    )
    assert min(row["exact_match"] for row in rows.values()) > 0.5  # a head that is not trained may mislead
    assert rows["greedy"]["answers"] == 9 and rows["best of 8"]["tokens"] > 7 * rows["greedy"]["tokens"]
    assert all(f"{row['tokens']:.4f}" in results["printed"] for row in rows.values())


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--batchsize", "2"), "unknown option --batchsize: did you mean --batch-size?"),
        (("--batch-size", "0"), "--batch-size must be at least 1"),
        (("--max-length", "512"), "--max-length 512 is beyond the model's context of 384 tokens"),
        (("--output-file", "/nowhere/results.json"), "--output-file /nowhere/results.json: the directory"),
        (("--dataset", "nothing.jsonl"), "nothing.jsonl"),
        (("--checkpoint", "nothing"), "--checkpoint nothing: no such run"),
        (("--tree",), "this model has no value head: train one with --use-tree-of-thoughts"),
    ],
)
def test_wrong_flags(taught, tmp_path, flags, line) -> None:
    given = {"--checkpoint": str(taught), "--dataset": str(taught / "tasks.jsonl"), "--device": "cpu"}
    given.update([flags] if len(flags) == 2 else [])
    words = [*(word for pair in given.items() for word in pair), *(flags if len(flags) == 1 else ())]
    result = subprocess.run(
        [python(), str(REPOSITORY / "eval_ds.py"), *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert line in last
    assert "Traceback" not in result.stderr


def test_no_targets_give_no_number_but_no_error(loaded) -> None:
    row = evaluate_loss(loaded[0], {}, batch_size=1, rank=0, world_size=1, device="cpu")["overall"]
    assert math.isnan(row["loss"])
    assert row["tokens"] == 0


@pytest.mark.parametrize("routing", ["token", "step"])
def test_the_training_choice_is_measured_for_step_routing_alone(byte_tokenizer, routing) -> None:
    """A pool of all experts leaves no gap, and the losses of token routing."""
    import torch

    from data.loader import prepare_rows
    from model import PragnosiaConfig, PragnosiaForCausalLM
    from training.config import DataArguments

    rows = [{"question": f"How much is {n}?", "answer": str(n)} for n in range(12)]
    data = prepare_rows(rows, DataArguments(max_length=64, validation_fraction=0.0), byte_tokenizer).train
    where = {"batch_size": 2, "rank": 0, "world_size": 1, "device": "cpu"}

    def losses(**fields) -> dict[str, float]:
        torch.manual_seed(0)
        sizes = {"vocab_size": len(byte_tokenizer), "hidden_size": 32, "moe_intermediate_size": 16, **fields}
        model = PragnosiaForCausalLM(PragnosiaConfig(initializer_range=0.4, **sizes)).train()
        found = evaluate_loss(model, {"reasoning": data}, **where)
        assert model.training and found["reasoning"] == pytest.approx(found["overall"])
        return found["overall"]

    if routing == "token":
        assert not [name for name in losses() if "choice" in name]
        return
    row = losses(routing="step", expert_pool=3)
    assert row["choice_gap"] == pytest.approx(row["loss"] - row["training_choice_loss"]) and row["choice_gap"]
    every = losses(routing="step", expert_pool=8)
    assert every["choice_gap"] == pytest.approx(0, abs=1e-6)
    assert every["loss"] == pytest.approx(losses()["loss"], rel=1e-6)


def test_help_imports_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['eval_ds.py', '--help']\n"
        "try: runpy.run_path('eval_ds.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for flag in ("--checkpoint", "--dataset", "--show-examples", "--output-file", "--execute-code"):
        assert flag in result.stdout
