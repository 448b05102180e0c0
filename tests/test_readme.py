"""The documents say what is so: their commands run, their options exist, their tables equal the code."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train_step import parser as benchmark_parser
from inference.arguments import EngineArguments, EvaluationArguments, ModelSource, read_arguments
from inference.chat import COMMANDS
from inference.generation import Sampling
from model.presets import PRESETS, preset_config
from tests.preloaded import lent_environment, python
from tests.test_budget import BANKS, CALLED, PATH, SOURCE
from training.command_line import parse
from training.config import MODEL_SIZES
from training.launch import launcher_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README = TEXT["README.md"]
COMMAND = re.compile(r"(^|\| )(\./launch\.sh (train|eval|chat)|python \S+\.py)( |$)")


def section(text: str, heading: str) -> str:
    """What stands under a heading."""
    return re.split(r"^#+ ", text.split(f"# {heading}\n")[1], flags=re.M)[0]


def code_cells(line: str) -> list[str]:
    return [cell.strip().strip("`") for cell in line.strip("|\n ").split("|")]


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Every block after `<!-- test -->`, run as it stands in a folder that looks like the repository.

    Returns the folder and what each block printed.
    """
    folder = tmp_path_factory.mktemp("repository")
    for path in ROOT.glob("[!.]*"):
        if path.name not in ("outputs", "wandb"):
            (folder / path.name).symlink_to(path)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment |= lent_environment(folder / ".cache")
    environment |= {
        "PATH": f"{environment['PRAGNOSIA_VENV']}/bin:{sys.prefix}/bin:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    printed = {}
    for block in re.findall(r"<!-- test -->\n```sh\n(.*?)```", README, re.S):
        done = subprocess.run(
            ["bash", "-euc", block], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed[block] = done.stdout
    return folder, printed


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_examples_run(examples):
    folder, printed = examples
    assert len(printed) == 6
    runs = sorted((folder / "outputs").iterdir())
    assert [run.name.split("_2")[0] for run in runs] == ["pragnosia_tiny_8experts"] * 2
    assert {"checkpoint-20", "checkpoint-25", "final_model"} <= {path.name for path in runs[0].iterdir()}
    logged = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in logged if "loss" in row}
    assert list(losses) == [5, 10, 15, 20, 25]  # the resumed run took over --logging-steps
    assert losses[25] < losses[5] - 1
    (mine,) = (folder / "my_runs").iterdir()
    datasets = {line["dataset"]: line for line in json.loads((mine / "run.json").read_text())["data"]}
    assert datasets["my.jsonl"]["rows"] + datasets["my.jsonl"]["validation_rows"] == 3
    results = json.loads((folder / "results.json").read_text())["results"]
    assert results["reasoning"]["loss"] == results["overall"]["loss"] < losses[5]
    chat = next(text for block, text in printed.items() if " chat " in block)
    assert chat.count("\n") == 1  # one question, one line


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_metrics_are_the_documented_ones(examples):
    documented = {
        name
        for line in section(TEXT["docs/training.md"], "What is logged").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    (log, *_) = sorted((examples[0] / "outputs").glob("*/metrics.jsonl"))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    logged = {re.sub("^validation/[a-z]+/", "validation/<family>/", name) for row in rows for name in row}
    logged = {name.replace("validation/<family>/perplexity", ".../perplexity") for name in logged}
    logged = {name.replace("validation/<family>/bits_per_byte", ".../bits_per_byte") for name in logged}
    on_gpu = {"memory/gpu_peak_gb", "memory/gpu_reserved_gb"}
    elsewhere = {"validation/<family>/training_choice_loss", ".../choice_gap", "router/dropped_share"}
    assert logged - {"step"} - on_gpu == documented - on_gpu - elsewhere - {"overall"}
    assert on_gpu | elsewhere <= documented


def commands() -> list[tuple[str, str]]:
    """(document, command line) of every command of ours in a code block."""
    found = []
    for name, text in TEXT.items():
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if language in ("", "sh") and COMMAND.search(line):
                    found.append((name, line))
    return found


def test_commands_are_found():
    assert len(commands()) >= 20


@pytest.mark.parametrize(("document", "line"), commands())
def test_options_of_every_command_are_accepted(document, line):
    words = shlex.split(line.split("|")[-1], comments=True)
    position = next(i for i, word in enumerate(words) if re.search(r"launch\.sh$|\.py$", word))
    script, rest = Path(words[position]).name, words[position + 1 :]
    if script == "launch.sh":
        script, rest = f"{rest[0]}_ds.py", rest[1:]
    if script == "train_ds.py":
        _, rest = launcher_parser().parse_known_args(rest)
        for flag in ("--config", "--resume"):  # a file, a run: not here
            if flag in rest:
                del rest[rest.index(flag) : rest.index(flag) + 2]
        parse(rest)
    elif script == "eval_ds.py":
        read_arguments(script, "", (ModelSource, EvaluationArguments), rest)
    elif script == "chat_ds.py":
        read_arguments(script, "", (ModelSource, EngineArguments, Sampling), rest)
    elif script == "train_step.py":
        benchmark_parser().parse_args(rest)
    else:
        assert (ROOT / "data" / script).exists(), line


def test_every_option_in_the_text_exists():
    helps = ["training/launch.py train_ds.py", "eval_ds.py", "chat_ds.py"]
    benchmarks = ("train_step", "constant_vram", "offload", "scale_out", "kernels", "components", "countdown")
    helps += [f"benchmarks/{name}.py" for name in benchmarks]
    known = {"--check", "--num_gpus", "--nnodes", "--nproc-per-node", "--gpus-per-node"}  # of other programs
    for script in helps:
        command = [python(), *script.split(), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        known |= set(re.findall(r"--[a-z][a-z-]+", done.stdout))
    for name, text in TEXT.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) - known == set(), name


def test_preset_table_equals_the_presets():
    lines = [line for line in README.splitlines() if re.match(r"\| `(tiny|\d+[MB])` \|", line)]
    expected = []
    for name, p in PRESETS.items():
        config = preset_config(name)
        counts = [f"{n / 1e6:,.1f}M" for n in (config.num_params(), config.active_params())]
        sizes = [p.hidden_size, p.num_layers, p.num_experts, config.num_experts_per_tok, p.expert_width]
        expected.append([name, *map(str, sizes), f"{p.heads} × {p.head_dim}", str(p.kv_heads), *counts])
    assert [code_cells(line) for line in lines] == expected
    assert list(MODEL_SIZES) == [*PRESETS, "custom"]


def test_file_list_is_complete():
    listed = re.findall(r"^(\S+)/ ", section(README, "Files"), re.M)
    assert all((ROOT / name).is_dir() for name in listed)
    assert {*SOURCE, "docs", "deepspeed_configs"} == set(listed)
    for script in [*ROOT.glob("*_ds.py"), ROOT / "launch.sh"]:
        assert script.name in section(README, "Files")


def test_path_of_a_batch_is_the_one_that_is_measured():
    numbered = re.findall(r"^\d+\. (.*)", section(README, "Files"), re.M)
    assert [re.match(r"`([^`]+)`", line)[1] for line in numbered] == list(PATH)
    named = {name for line in numbered for name in re.findall(r"`(\w+/\w+\.py)`", line)}
    assert named == {
        *PATH,
        *CALLED,
        *itertools.chain(*(banks for banks, _ in BANKS.values())),
        "experts/expert_parallel.py",
    }  # on one rank it does not run


def test_chat_commands_are_all_named():
    assert set(re.findall(r"`(/[a-z-]+)`", section(README, "Chat"))) == set(COMMANDS)


@pytest.mark.parametrize("document", TEXT)
def test_links_and_paths_lead_somewhere(document):
    text = TEXT[document]
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target
    for name in re.findall(rf"`((?:{'|'.join(SOURCE)}|docs|deepspeed_configs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
