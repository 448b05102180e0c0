"""launch.sh as a user meets it: any directory, spaces in the path, other environments, a poor machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import lent_environment

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(sys.prefix)
NOT_SOURCE = shutil.ignore_patterns(
    ".venv", ".git", ".*_cache", "__pycache__", "outputs", "wandb", ".hypothesis"
)


@pytest.fixture
def skeleton(tmp_path, monkeypatch) -> Path:
    """launch.sh with nothing to install and a chat script that says which Python runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    repository = tmp_path / "a repository with spaces"
    repository.mkdir()
    shutil.copy(ROOT / "launch.sh", repository)
    (repository / "requirements.txt").write_text("# nothing\n")
    (repository / "chat_ds.py").write_text(
        "import os, sys\n"
        "assert ' ' not in sys.prefix  # PyTorch could not link there\n"
        "print(os.path.realpath(sys.prefix), os.getcwd(), *sys.argv[1:], sep='|')\n"
    )
    return repository


def launch(repository: Path, *words: str, **options) -> subprocess.CompletedProcess:
    options = {"cwd": "/", "timeout": 300, **options}
    return subprocess.run([repository / "launch.sh", *words], capture_output=True, text=True, **options)


def plain_environment(**changes: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PRAGNOSIA_VENV", "VIRTUAL_ENV")}
    return environment | changes


def only_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def programs(directory: Path, *without: str) -> Path:
    """A directory of links to the programs of the machine, but for some."""
    directory.mkdir()
    for folder in ("/bin", "/usr/bin"):
        for program in Path(folder).iterdir():
            hidden = program.name in without or program.name.startswith("python")
            if not hidden and not (directory / program.name).is_symlink():
                (directory / program.name).symlink_to(program)
    return directory


def existing_environment() -> dict[str, str]:
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.skip("the running Python has no bin/python to lend")
    return plain_environment(PRAGNOSIA_VENV=str(ENVIRONMENT))


def test_help_names_the_commands(skeleton):
    done = launch(skeleton, "--help")
    assert done.returncode == 0 and "train|eval|chat|test" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"), [((), "no command"), (("trian",), "unknown command trian: use train")]
)
def test_unknown_command(skeleton, words, message):
    assert message in only_error(launch(skeleton, *words))


@pytest.mark.slow
def test_makes_the_environment_once(skeleton, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    polluted = plain_environment(
        VIRTUAL_ENV="/nowhere", PYTHONPATH=str(tmp_path / "x"), PYTHONHOME="/nowhere"
    )
    polluted["PIP_TARGET"] = str(tmp_path / "target")
    first = launch(skeleton, "chat", "--hello", "a b", cwd=elsewhere, env=polluted)
    assert first.returncode == 0, first.stderr
    assert "installing requirements.txt" in first.stderr
    assert first.stdout.strip() == f"{skeleton / '.venv'}|{elsewhere}|--hello|a b"
    assert not (tmp_path / "target").exists()

    link = elsewhere / "link"
    link.symlink_to(skeleton / "launch.sh")
    plain = plain_environment()
    second = subprocess.run([link, "chat"], cwd="/", capture_output=True, text=True, env=plain)
    assert second.stderr == ""
    assert second.stdout.strip() == f"{skeleton / '.venv'}|/"

    (skeleton / "requirements.txt").write_text("# changed\n")
    assert "installing" in launch(skeleton, "chat", env=plain).stderr
    assert "installing" not in launch(skeleton, "chat", env=plain).stderr


@pytest.mark.slow
def test_a_failed_install_says_why_and_is_redone(skeleton):
    (skeleton / "requirements.txt").write_text("./missing.whl\n")
    done = launch(skeleton, "chat", env=plain_environment())
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: pip failed: ") and "missing.whl" in error
    assert str(skeleton / ".venv" / "install.log") in error
    leftover = skeleton / ".venv" / "half_installed"
    leftover.touch()

    (skeleton / "requirements.txt").write_text("# nothing\n")
    again = launch(skeleton, "chat", env=plain_environment())
    assert again.returncode == 0, again.stderr
    assert not leftover.exists()


def test_too_old_python(skeleton, tmp_path):
    path = programs(tmp_path / "bin")
    old = path / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in *version_info*) exit 1 ;; -V) echo Python 3.8.10 ;; esac\n')
    old.chmod(0o755)
    error = only_error(launch(skeleton, "chat", env={"PATH": str(path)}))
    assert "Python 3.11 or later" in error and "Python 3.8.10 is too old" in error


def test_no_python(skeleton, tmp_path):
    error = only_error(launch(skeleton, "chat", env={"PATH": str(programs(tmp_path / "bin"))}))
    assert "Python 3.11 or later" in error and "no Python found" in error


def test_no_compiler(skeleton, tmp_path):
    path = programs(tmp_path / "bin", "c++", "g++")
    assert "no C++ compiler" in only_error(launch(skeleton, "chat", env={"PATH": str(path)}))


def test_no_disk(skeleton, tmp_path):
    small = tmp_path / "small disk"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "x", small]).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        shutil.copytree(skeleton, small / "repository")
        error = only_error(launch(small / "repository", "chat", env=plain_environment()))
    finally:
        subprocess.run(["umount", small], check=True)
    assert "needs 6 GB" in error and "MB are free" in error


def test_named_environment_must_be_one(skeleton, tmp_path):
    error = only_error(launch(skeleton, "chat", env=plain_environment(PRAGNOSIA_VENV=str(tmp_path))))
    assert "holds no Python 3.11 or later" in error


@pytest.mark.slow
def test_dry_run_prints_command_and_configuration(tmp_path):
    environment = plain_environment() | lent_environment(tmp_path / "cache")
    repository = shutil.copytree(ROOT, tmp_path / "with some spaces", ignore=NOT_SOURCE)
    done = launch(
        repository,
        "train",
        "--dry-run",
        "--device",
        "cpu",
        "--num-gpus",
        "2",
        "--batch-size=3",
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[0]
    assert "deepspeed.launcher.runner" in command and "--num_gpus 2" in command
    assert f"'{repository}/train_ds.py'" in command
    assert '"train_batch_size": 6' in done.stdout
    assert not (repository / "outputs").exists()


@pytest.mark.slow
def test_training_starts_from_a_path_with_spaces(tmp_path):
    environment = existing_environment() | {"OMP_NUM_THREADS": "1"}
    repository = shutil.copytree(ROOT, tmp_path / "with some spaces", ignore=NOT_SOURCE)
    words = "--device cpu --dataset reasoning --max-samples 40 --max-steps 2 --max-length 64 --num-workers 0"
    work = tmp_path / "work here"
    work.mkdir()
    done = launch(
        repository,
        "train",
        *words.split(),
        "--output-dir",
        "my runs",
        "--cache-dir",
        str(tmp_path / "cache"),
        cwd=work,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (work / "my runs").iterdir()
    assert (run / "final_model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["train", "--num-gpu", "3"], "unknown option --num-gpu: did you mean --num-gpus?"),
        (["train", "--num-gpus", "two"], "--num-gpus"),
        (["train", "--num-gpus", "0"], "--num-gpus must be at least 1"),
        (["train", "--num-nodes", "2"], "--num-nodes 2 needs a --hostfile"),
        (["train", "--hostfile", "/missing"], "--hostfile /missing: cannot be read"),
        (["train", "--master-port", "1", "--master-port", "2"], "--master-port is set twice"),
    ],
)
def test_bad_options_are_one_clear_line(tmp_path, words, message):
    environment = plain_environment() | lent_environment(tmp_path)
    assert message in only_error(launch(ROOT, *words, env=environment))
