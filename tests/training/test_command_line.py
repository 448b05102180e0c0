"""Settings: one declaration serves the command line, the YAML file and the Python API."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from inference.arguments import EngineArguments, EvaluationArguments, ModelSource, read_arguments
from training.cluster import ClusterArguments
from training.command_line import SETTINGS, Parser, parse
from training.config import DataArguments, ModelArguments, TrainingArguments, UserError, flag_of

ROOT = Path(__file__).resolve().parents[2]

USAGE_GUIDE = {
    "--model-size": "tiny",
    "--num-active-experts": 2,
    "--epochs": 3,
    "--batch-size": 4,
    "--learning-rate": 1e-4,
    "--local-learning-rate": 1e-3,
    "--max-length": 512,
    "--gradient-clip": 1.0,
    "--output-dir": "./outputs",
    "--logging-steps": 100,
    "--eval-steps": 1000,
    "--save-steps": 5000,
}


def test_no_arguments_are_the_defaults():
    run = parse([])
    assert (run.model, run.data, run.training) == (ModelArguments(), DataArguments(), TrainingArguments())
    assert not run.dry_run and not run.list_datasets and run.plan is None


def test_what_to_plan_for_is_no_setting_of_the_run():
    run = parse(["--plan", "--gpus", "16", "--interconnect", "200Gb", "--model-size", "7B"])
    assert run.plan == ClusterArguments(gpus=16, interconnect="200Gb")
    assert parse(["--plan"]).plan == ClusterArguments()
    with pytest.raises(UserError, match=r"^--gpus is for --plan: leave it out, or add --plan$"):
        parse(["--gpus", "16"])
    with pytest.raises(UserError, match=r"--gpu must be one of .*: did you mean h100\?"):
        parse(["--plan", "--gpu", "h1000"])


def test_usage_guide_names_and_defaults():
    fields = {
        flag_of(field): field.default for settings in SETTINGS for field in dataclasses.fields(settings)
    }
    assert {flag: fields[flag] for flag in USAGE_GUIDE} == USAGE_GUIDE


def test_field_names_and_flags_are_unique():
    names = [name for s in SETTINGS for f in dataclasses.fields(s) for name in {f.name, flag_of(f)[2:]}]
    assert len(names) == len(set(names))


def other_value(field: dataclasses.Field):
    """A legal value that is not the default, and the words that set it."""
    if bool in (field.type, *typing.get_args(field.type)):
        return not field.default, [flag_of(field)]
    choices = field.metadata["choices"]
    if choices:
        value = next(choice for choice in choices if choice not in (field.default, "custom"))
        return value, [flag_of(field), value]
    if field.type is str or field.type == (str | None):
        return "x/y z", [flag_of(field), "x/y z"]
    if field.type is float:
        value = (field.default or 1) / 2
        return value, [flag_of(field), str(value)]
    value = (field.default or 2) + 1
    return value, [flag_of(field), str(value)]


@pytest.mark.parametrize(
    ("settings", "name"), [(s, f.name) for s in SETTINGS for f in dataclasses.fields(s)], ids=lambda x: str(x)
)
def test_every_field_is_set_by_its_flag(settings, name):
    field = next(f for f in dataclasses.fields(settings) if f.name == name)
    value, words = other_value(field)
    if name in ("hidden_size", "num_layers"):
        words = ["--model-size=custom", "--num-experts=8", "--hidden-size=3", "--num-layers=3"]
    if name == "expert_pool":
        words += ["--routing=step"]
    if name == "cache_joint":
        words += ["--stage=cache"]
    if name in ("expert_vram", "gpu_memory"):
        value, words = "3GB", [f"--{name.replace('_', '-')}=3GB"]
    if name in ("expert_store", "nvme_path", "expert_ram"):
        value = {"expert_store": "nvme", "nvme_path": "disk", "expert_ram": "3GB"}[name]
        words = ["--expert-store=nvme", "--nvme-path=disk", "--expert-ram=3GB"]
    run = parse(words)
    found = next(group for group in vars(run).values() if isinstance(group, settings))
    assert getattr(found, name) == value != field.default


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["--batchsize=3"], "unknown option --batchsize: did you mean --batch-size?"),
        (["--zzzz"], "unknown option --zzzz; --help lists all"),
        (
            ["--num_gpus=2"],
            "--num-gpus is for the launcher, which starts ranks of train_ds.py: ./launch.sh train ",
        ),
        (["--hostfiles", "hosts"], "unknown option --hostfiles: did you mean --hostfile?"),
        (["--run_id", "x"], "unknown option --run-id; --help lists all"),  # which the launcher hides
        (["--plan", "--num-gpus", "2"], "unknown option --num-gpus: did you mean --gpus?"),
        (["--epochs", "1", "--epochs", "2"], "--epochs is set twice"),
        (["--batch-size=1", "--batch_size=2"], "--batch-size is set twice"),
        (["--offload-to-cpu", "--no-offload-to-cpu"], "is set twice"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--epochs", "2.5"], "--epochs (num_train_epochs) must be a whole number, not '2.5'"),
        (["--epochs", "0"], "--epochs (num_train_epochs) must be at least 1, not 0"),
        (["--learning-rate", "fast"], "--learning-rate must be a number, not 'fast'"),
        (["--learning-rate", "nan"], "--learning-rate must be a number"),
        (["--learning-rate", "inf"], "--learning-rate must be a number"),
        (["--validation-fraction", "0.9"], "must be at most 0.5"),
        (["--model-size", "350m"], "did you mean 350M?"),
        (["--routing", "steps"], "--routing must be one of token, step, not 'steps': did you mean step?"),
        (["--expert-pool", "4"], "--expert-pool 4 needs --routing step"),
        (["--lr-scheduler", "cosin"], "did you mean cosine?"),
        (["--report-to", "wandb,tensorbord"], "did you mean tensorboard?"),
        (["--report-to", "wandb,none"], "none cannot stand beside others"),
        (["--dataset", ""], "--dataset must not be empty"),
        (["--hidden-size", "64"], "use --model-size custom"),
        (["--model-size", "custom", "--num-layers", "2"], "needs --hidden-size and --num-experts"),
        (["--placement", "zero3", "--offload-to-cpu"], "both set the placement"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_words_are_one_clear_line(words, message):
    with pytest.raises(UserError) as caught:
        parse(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "line 1: unknown setting epoch: did you mean epochs?"),
        ("seed: 1\nepochs: 5\nnum_train_epochs: 3", "line 3: num_train_epochs is set twice"),
        ("seed: 1\nseed: 2", "line 2: seed is set twice"),
        ("- seed", "setting: value"),
        ("seed: [", "not YAML"),
        ("seed: [1]", "--seed must be a whole number, not [1]"),
        ("seed: true", "--seed must be a whole number"),
        ("deterministic: 1", "--deterministic must be true or false, not 1"),
        ("dataset: {a: b}", "--dataset must be a text"),
        ("seed: null", "--seed needs a value"),
        ("seed: 1\ngpus: 64", "line 2: gpus is for --plan, on the command line"),
        ("num_gpus: 2", "line 1: num_gpus is for the launcher, on the command line: --num-gpus"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_has_a_launcher_speaks_of_it():
    with pytest.raises(UserError, match=r"--num-gpus is for the launcher.*: \./launch\.sh eval --num-gpus"):
        read_arguments("eval_ds.py", "", (ModelSource, EvaluationArguments), ["--num-gpus", "2"])
    with pytest.raises(UserError, match="unknown option --hostfile; --help lists all"):
        read_arguments("chat_ds.py", "", (ModelSource, EngineArguments), ["--hostfile", "hosts"])


def test_missing_yaml_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: No such file"):
        parse(["--config", str(tmp_path / "nothing.yaml")])


def test_flags_override_the_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 5\nlearning_rate: 1e-3\nreport-to: none\ndeterministic: true\ndataset: 7\n")
    run = parse(["--config", str(path), "--epochs", "2", "--no-deterministic"])
    assert run.training.num_train_epochs == 2
    assert run.training.learning_rate == 1e-3
    assert run.training.reporters == ["none"]
    assert run.training.deterministic is False
    assert run.data.dataset == "7"


def test_none_unsets_what_need_not_have_a_value(tmp_path):
    path, run = tmp_path / "run.yaml", tmp_path / "run" / "checkpoint-1"
    path.write_text("capacity_factor: 1.5\nmax_steps: none\n")
    assert parse(["--config", str(path)]).training.capacity_factor == 1.5
    unset = parse(["--config", str(path), "--capacity-factor", "none", "--gpu-memory=none"]).training
    assert (unset.capacity_factor, unset.max_steps, unset.gpu_memory) == (None, None, None)
    run.mkdir(parents=True)
    (run / "trainer_state.json").write_text('{"step": 1, "files": {}}')
    (run.parent / "run.json").write_text('{"settings": {"training": {"capacity_factor": 1.5, "seed": 7}}}')
    for words, factor in (([], 1.5), (["--capacity-factor", "none"], None)):
        resumed = parse(["--resume", str(run), *words]).training
        assert (resumed.capacity_factor, resumed.seed) == (factor, 7)
    with pytest.raises(UserError, match="--seed must be a whole number, not 'none'"):
        parse(["--seed", "none"])


@pytest.mark.parametrize(
    ("flag", "placement"), [("--placement=zero3", "zero3"), ("--no-offload-to-cpu", "resident")]
)
@pytest.mark.parametrize("below", ["offload_to_cpu: true", "placement: streamed"])
def test_a_flag_overrides_the_other_name_of_its_setting(tmp_path, below, flag, placement):
    path = tmp_path / "run.yaml"
    path.write_text(below)
    assert parse(["--config", str(path), flag]).training.requested_placement == placement


def test_python_api_gives_the_same_errors():
    with pytest.raises(UserError, match="did you mean linear"):
        TrainingArguments(lr_scheduler_type="linaer")
    with pytest.raises(UserError, match="at least 1"):
        DataArguments(max_samples=0)
    assert TrainingArguments(output_dir=Path("a") / "b").output_dir == "a/b"


@pytest.mark.parametrize(
    ("words", "placement"),
    [
        ([], "auto"),
        (["--offload-to-cpu"], "streamed"),
        (["--no-offload-to-cpu"], "resident"),
        (["--placement", "zero3"], "zero3"),
    ],
)
def test_offload_flags_request_a_placement(words, placement):
    assert parse(words).training.requested_placement == placement


def test_underscored_spellings_are_accepted():
    run = parse(["--learning_rate", "1e-3", "--deepspeed_config=my_ds_config.json"])
    assert run.training.learning_rate == 1e-3
    assert run.training.deepspeed_config == "my_ds_config.json"


@pytest.mark.parametrize("word", ["--local_rank=3", "--local-rank=3"])
def test_the_launcher_adds_a_local_rank(word):
    assert parse([word]).local_rank == 3


def test_help_names_every_flag_and_imports_no_torch():
    program = (
        "import sys; from training.command_line import parse\n"
        "try: parse(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(set(sys.modules) & {'torch', 'deepspeed', 'transformers', 'datasets'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for settings in SETTINGS:
        for field in dataclasses.fields(settings):
            assert flag_of(field) in done.stdout


def test_parser_takes_no_abbreviation():
    parser = Parser()
    parser.add_argument("--temperature", type=float)
    with pytest.raises(UserError, match="did you mean --temperature"):
        parser.parse_args(["--temp", "1"])


@pytest.mark.parametrize(("rank", "start"), [("0", "error: it is"), ("3", "error (rank 3): it is")])
def test_a_script_answers_a_user_error_with_one_line(rank, start):
    program = (
        "import training.command_line\nfrom training.config import UserError\n"
        "training.command_line.RANK_0_SECONDS = 0.1\n"
        "def main(): raise UserError('it is so')\n"
        "training.command_line.run_script(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={"RANK": rank}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(start) and done.stderr.count("\n") == 1
