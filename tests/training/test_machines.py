"""Runs on two machines: what each way of starting them does, and what is said when one fails."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.hosts import ADDRESSES, DEAD, Hosts, two_machines
from tests.training.runs import REPOSITORY, command, environment, losses, run, write_rows

pytestmark = pytest.mark.slow
LAUNCH = REPOSITORY / "training" / "launch.py"
FLAGS = ("--max-steps", "8", "--save-steps", "2")

# As Slurm's srun sets the variables of two tasks on one machine.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost
SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_NODEID=0 SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first && wait $second
"""
LISTENS = "import socket, time; s = socket.create_server(('', 29500)); print(); time.sleep(60)"
MANY = """
import sys
from training.machines import Machines
sys.exit(Machines("ssh", {address: [sys.executable, sys.argv[1]] for address in sys.argv[2:]}).run())
"""
SAVES = """
import signal, time
asked = []
signal.signal(signal.SIGINT, lambda *_args: asked.append(1))
print("started", flush=True)
while not asked:
    time.sleep(0.05)
time.sleep(1)
print("saved", len(asked), flush=True)
"""
DIES = """
import os, signal, sys, time
from training.ranks import rank_variables
mine = rank_variables(os.environ)
print(mine, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], *sys.argv[1:], flush=True)
time.sleep(1)
if mine["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("machines")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", 40)


@pytest.fixture(scope="module")
def on_slurm(rows, tmp_path_factory) -> Path:
    """The run of `examples/slurm.sh`, with two ranks on this machine in place of a cluster."""
    if not Path(sys.prefix, "bin", "python").exists():
        pytest.skip("the running Python has no bin/python to lend to launch.sh")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    variables = environment(
        PATH=f"{folder}:{os.environ['PATH']}",
        PRAGNOSIA_VENV=sys.prefix,
        # What the batch script itself is told, which is not yet a rank.
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NTASKS="2",
        SLURM_PROCID="0",
        SLURM_CPUS_PER_TASK="1",
    )
    _, *words = command(rows, folder / "outputs", *FLAGS)
    done = subprocess.run(
        ["bash", REPOSITORY / "examples" / "slurm.sh", *words],
        env=variables, cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "x 2 ranks" in done.stdout
    (directory,) = (folder / "outputs").iterdir()
    return directory


class Started:
    """A program on the first machine, and what it prints; to end within a minute."""

    def __init__(self, hosts: Hosts, output: Path, *words: str | Path):
        self.output = output
        with output.open("w") as file:
            self.process = hosts.start(*words, stdout=file, stderr=file)

    def wait_until(self, reached) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output.read_text()
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        return self.process.wait(timeout=60), self.output.read_text()


def hostfile(folder: Path, *addresses: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{address} slots=1\n" for address in addresses))
    return path


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def processes(pattern: str) -> list[int]:
    """Those whose command line has it."""
    found = subprocess.run(["pgrep", "-f", "--", pattern], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_slurm_batch_script_trains(on_slurm):
    assert (on_slurm / "final_model" / "config.json").exists() and len(losses(on_slurm)) == 8


def test_two_machines_learn_what_one_does_through_the_death_of_a_rank(hosts, rows, tmp_path, on_slurm):
    outputs = tmp_path / "outputs"
    words = [*command(rows, outputs, *FLAGS), "--hostfile", hostfile(tmp_path, *ADDRESSES)]
    started = Started(hosts, tmp_path / "log", sys.executable, LAUNCH, *words)
    started.wait_until(lambda: [*outputs.glob("*/checkpoint-2")])
    ranks = processes(f"^{sys.executable} -u {REPOSITORY}/train_ds.py --local_rank=0 .*{outputs}")
    (victim,) = (pid for pid in ranks if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(victim, signal.SIGKILL)
    code, output = started.end()
    assert code == 128 + signal.SIGKILL
    assert len(errors(output)) == 1
    assert errors(output)[0].startswith(f"error: {ADDRESSES[1]}: rank 1 was killed by signal 9 (SIGKILL)")
    assert processes(str(outputs)) == []
    (directory,) = outputs.iterdir()
    assert not (directory / "final_model").exists()
    run(rows, outputs, *FLAGS, "--resume", str(directory), world_size=2)
    assert losses(directory) == pytest.approx(losses(on_slurm), rel=1e-6)


@pytest.mark.parametrize("shell", ["ssh", "pdsh"])
def test_a_machine_that_is_off(hosts, tmp_path, shell):
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    (tmp_path / "script.py").touch()
    words = ["script.py", "--device", "cpu", "--hostfile", hostfile(tmp_path, ADDRESSES[0], DEAD)]
    code, output = Started(
        hosts, tmp_path / "log", "env", "-C", tmp_path, sys.executable, LAUNCH, *words, "--launcher", shell
    ).end()
    assert code == 255
    assert len(errors(output)) == 1
    assert errors(output)[0].startswith(f"error: {DEAD}: no connection (ssh: connect to host {DEAD} port 22:")


def test_a_port_in_use(hosts, tmp_path):
    listener = hosts.start(sys.executable, "-uc", LISTENS, stdout=subprocess.PIPE)
    listener.stdout.readline()
    try:
        words = ["script.py", "--device", "cpu", "--hostfile", hostfile(tmp_path, *ADDRESSES)]
        code, output = Started(hosts, tmp_path / "log", sys.executable, LAUNCH, *words).end()
    finally:
        listener.kill()
        listener.communicate()
    assert code == 2
    (line,) = errors(output)
    assert line.startswith("error: --master-port 29500: Address already in use; choose another")


def test_ctrl_c_reaches_every_machine_and_they_have_time(hosts, tmp_path):
    script = tmp_path / "it's a script.py"
    script.write_text(SAVES)
    started = Started(hosts, tmp_path / "log", sys.executable, "-c", MANY, script, *ADDRESSES)
    started.wait_until(lambda: started.output.read_text().count("started") == 2)
    os.kill(processes(f"^{sys.executable} -c .*{tmp_path}")[0], signal.SIGINT)
    code, output = started.end()
    assert code == 128 + signal.SIGINT
    assert output.count("saved 1") == 2
    assert "SIGINT: the run saves and stops; once more ends it at once" in output


def test_open_mpi_tells_the_ranks_who_they_are_and_stops_them(hosts, tmp_path, monkeypatch):
    if not shutil.which("ompi_info"):
        pytest.skip("needs Open MPI")
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setenv(name, "1")
    script = tmp_path / "script.py"
    script.write_text(DIES)
    words = [script, "--device", "cpu", "it's", "--hostfile", hostfile(tmp_path, *ADDRESSES)]
    code, output = Started(
        hosts, tmp_path / "log", sys.executable, LAUNCH, *words, "--launcher", "openmpi"
    ).end()
    assert code == 128 + signal.SIGKILL
    for rank in (0, 1):
        mine = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        assert f"{mine} {ADDRESSES[0]} 29500 --device cpu it's\n" in output
    (line,) = errors(output)
    assert re.match(r"error: \S+: rank 1 was killed by signal 9\. The other ranks were stopped\.", line)
