"""The study of components on real data: what is run, in which order, and the rows that come of it."""

import itertools
import json
import math
from pathlib import Path

import pytest

from benchmarks import components


@pytest.fixture
def scripts(monkeypatch, request):
    """Calls of our scripts, which write small results; those with a word of the parameter fail."""
    calls, failing = [], getattr(request, "param", set())

    def script(name, *words):
        words = [*map(str, words)]
        options = dict(itertools.pairwise(words))
        calls.append((name, words))
        if failing & {*words}:
            raise SystemExit(f"{name} failed, see above")
        if name == "eval_ds.py":
            searches = [{"search": "greedy", "tokens": 3.0, "exact_match": 0.5}] if "--tree" in words else []
            results = {"reasoning": {"loss": 1.0, "exact_match": 0.25}, "overall": {"loss": 1.0}}
            file = Path(options["--output-file"])
            return file.write_text(json.dumps({"results": results, "searches": searches}))
        run = Path(options["--output-dir"], "pragnosia_1")
        run.mkdir(parents=True)
        losses = {"validation/overall/loss": 2.0, "validation/chat/loss": 1.0}
        if "cache" in words:
            losses |= {"validation/overall/base_loss": 3.0, "validation/overall/loss_at_4": 1.5}
        lines = [{"step": 1, "tokens_per_second": 10.0, "memory/gpu_peak_gb": 2.0}, {"step": 2, **losses}]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(components, "script", script)
    return calls


def run(tmp_path, *words: str) -> list[dict]:
    common = ("--data", "x.jsonl", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path))
    components.main([*common, "--device", "cpu", *words])
    return json.loads((tmp_path / "components.json").read_text())["rows"]


def test_rows_of_arms_alone(scripts, tmp_path):
    words = ("--steps", "8", "--answers", "x.jsonl", "b", "--arms", "base", "value head", "light")
    base, head, *searches, light = run(tmp_path, *words)
    assert base == {
        "arm": "base", "seed": 0, "steps": 8, "overall_perplexity": math.exp(2), "chat_perplexity": math.e,
        "tokens_per_s": 10.0, "gpu_peak_gb": 2.0, "x_reasoning_exact_match": 0.25, "b_reasoning_exact_match": 0.25,
    }  # fmt: skip
    assert head["arm"] == "value head" and [row["dataset"] for row in searches] == ["x", "b"]
    assert searches[0]["arm"] == "value head, greedy" and searches[0]["exact_match"] == 0.5
    assert light["steps"] == 2 and light["overall_after_latents"] == math.exp(2)
    assert light["overall_without_latents"] == math.exp(3) and light["perplexity_at_4"] == math.exp(1.5)
    trained = [words for name, words in scripts if name == "train_ds.py"]
    assert trained[1][trained[1].index("--value-refresh") + 1] == "1"
    assert trained[2][trained[2].index("--init-from") + 1].endswith("base-0/pragnosia_1")


def test_arms_that_start_from_the_base_have_steps_of_their_own(scripts, tmp_path):
    arms = ("--steps", "8", "--later-steps", "5", "--answers", "--arms", "base", "light")
    assert [(row["arm"], row["steps"]) for row in run(tmp_path, *arms)] == [("base", 8), ("light", 5)]
    trained = [words for name, words in scripts if name == "train_ds.py"]
    assert [words[words.index("--max-steps") + 1] for words in trained] == ["8", "5"]


@pytest.mark.parametrize("scripts", [{"--use-neural-memory"}], indirect=True)
def test_arms_side_by_side_have_no_speed_and_one_that_fails_is_a_row(scripts, tmp_path):
    words = ("--side-by-side", "3", "--seeds", "0", "1", "--answers", "--arms", "base", "memory", "lora")
    with pytest.raises(SystemExit, match="failed: memory, memory"):
        run(tmp_path, *words)
    rows = json.loads((tmp_path / "components.json").read_text())["rows"]
    assert len(rows) == 6 and not any("tokens_per_s" in row for row in rows)
    errors = [row.get("error") for row in rows if row["arm"] == "memory"]
    assert errors == ["SystemExit: train_ds.py failed, see above"] * 2
    assert not any(name == "eval_ds.py" for name, _ in scripts)
    for seed in (0, 1):
        order = [row["arm"] for row in rows if row["seed"] == seed]
        assert order.index("base") < order.index("lora")


@pytest.mark.parametrize("scripts", [{"--max-steps"}], indirect=True)
def test_what_a_failed_base_leaves_out_is_said(scripts, tmp_path):
    with pytest.raises(SystemExit, match="failed: base, lora"):
        run(tmp_path, "--arms", "base", "lora")
    rows = json.loads((tmp_path / "components.json").read_text())["rows"]
    assert [row["error"] for row in rows] == [
        "SystemExit: train_ds.py failed, see above",
        "AssertionError: the base failed",
    ]
    assert len(scripts) == 1


def test_what_starts_from_the_base_needs_it(scripts, tmp_path):
    with pytest.raises(SystemExit, match="add base to --arms"):
        run(tmp_path, "--arms", "light")
    assert not scripts
