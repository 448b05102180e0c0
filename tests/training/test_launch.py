"""The watch over real ranks, started through the DeepSpeed launcher on CPU."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from training.config import UserError
from training.launch import launcher_command, launcher_parser, main, prepare_run
from training.machines import on_machine

ROOT = Path(__file__).resolve().parents[2]

RANK_PROGRAM = """
import os, signal, sys, time
rank, mode = int(os.environ["RANK"]), sys.argv[-1]
signals = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: signals.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
size, threads = os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"]
print(f"rank {rank} of {size} ready, {threads} threads", *sys.argv[2:], flush=True)
time.sleep(3 if mode in ("fail", "user error") else 0.5)  # the watch must have seen the ranks
if mode == "fail" and rank == 1:
    sys.exit(3)
if mode == "user error" and rank == 0:
    sys.exit(2)
deadline = time.monotonic() + 60
while mode != "finish" and not signals and time.monotonic() < deadline:
    time.sleep(0.05)
if mode == "save slowly":
    time.sleep(3)
print(f"rank {rank} saved after {signals}", flush=True)
"""


REFUSING_PROGRAM = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from training.command_line import run_script
from training.config import UserError

def main():
    rank = int(os.environ["RANK"])
    time.sleep(5 - rank)  # the watch must have seen the ranks, and rank 1 is the first to find it
    if rank == 1 or sys.argv[-1] == "all ranks":
        raise UserError("it is so")
    time.sleep(60)

run_script(main)
"""


class Run:
    """Two ranks of a program under the watch."""

    def __init__(self, directory: Path, mode: str, program: str = RANK_PROGRAM):
        script = directory / "rank program.py"
        script.write_text(program)
        command = [
            sys.executable,
            ROOT / "training" / "launch.py",
            script,
            "--num-gpus=2",
            "--device",
            "cpu",
            mode,
        ]
        self.output = directory / "output"
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, cwd=directory
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while self.output.read_text().count("ready") < 2:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output.read_text()
            time.sleep(0.1)
        time.sleep(0.5)  # the watch must have seen them too

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=120)
        return code, self.output.read_text()


@pytest.mark.slow
def test_ranks_run_and_share_the_cores(tmp_path):
    code, output = Run(tmp_path, "finish").end()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert code == 0
    assert f"rank 0 of 2 ready, {threads} threads --device cpu finish" in output
    assert f"rank 1 of 2 ready, {threads} threads --device cpu finish" in output


@pytest.mark.slow
def test_a_rank_that_fails_is_named_and_the_others_stop(tmp_path):
    code, output = Run(tmp_path, "fail").end()
    assert code == 3
    assert "error: rank 1 stopped with exit code 3. The other ranks were stopped." in output


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_others_stop(tmp_path):
    run = Run(tmp_path, "wait")
    run.wait_ready()
    children = psutil.Process(run.process.pid).children(recursive=True)
    (victim,) = (process for process in children if "--local_rank=1" in process.cmdline())
    victim.kill()
    code, output = run.end()
    assert code == 128 + signal.SIGKILL
    assert "error: rank 1 was killed by signal 9 (SIGKILL)" in output
    assert "rank 0 saved after [15" in output


@pytest.mark.slow
def test_an_error_the_rank_has_explained_gets_no_second_line(tmp_path):
    code, output = Run(tmp_path, "user error").end()
    assert code == 2
    assert "error:" not in output


@pytest.mark.slow
@pytest.mark.parametrize(("who", "speaker"), [("all ranks", "error"), ("rank 1", "error (rank 1)")])
def test_what_ranks_find_is_said_once(tmp_path, who, speaker):
    code, output = Run(tmp_path, who, REFUSING_PROGRAM).end()
    assert code == 2
    assert [line for line in output.splitlines() if "error" in line] == [f"{speaker}: it is so"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once_and_they_have_time(tmp_path, number):
    run = Run(tmp_path, "save slowly")
    run.wait_ready()
    run.process.send_signal(number)
    code, output = run.end()
    assert code == 128 + number
    passed_on = signal.SIGTERM if number == signal.SIGHUP else number
    for rank in (0, 1):
        assert f"rank {rank} saved after [{int(passed_on)}]" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_does_not_end_the_launcher(tmp_path, number):
    """As `pkill -f` sends it: to the watch, DeepSpeed's two launchers and the ranks."""
    run = Run(tmp_path, "save slowly")
    run.wait_ready()
    processes = [run.process, *psutil.Process(run.process.pid).children(recursive=True)]
    assert len(processes) == 5
    for process in processes:
        process.send_signal(number)
    code, output = run.end()
    assert code == 128 + number
    assert "Traceback" not in output
    for rank in (0, 1):
        assert f"rank {rank} saved after [{int(number)}" in output


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tmp_path):
    run = Run(tmp_path, "save slowly")
    run.wait_ready()
    for _ in range(2):
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    code, output = run.end()
    assert code == 128 + signal.SIGINT
    assert "saved after" not in output


def command_for(words: list[str], device: str | None = "cpu"):
    own, rest = launcher_parser().parse_known_args(words)
    return launcher_command(own, device, ["script.py", *rest])


def test_the_scripts_options_pass_through_in_order():
    command, environment, world_size = command_for(["--a", "1", "--num-gpus=3", "--b=x y", "-z", "--c"])
    assert command[-6:] == ["script.py", "--a", "1", "--b=x y", "-z", "--c"]
    assert world_size == 3
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_two_runs_get_two_ports():
    with socket.socket() as taken:
        taken.bind(("", 0))
        command, _, _ = command_for([])
        assert command[command.index("--master_port") + 1] != str(taken.getsockname()[1])


def test_a_port_in_use_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--master-port {port}: Address already in use"):
            command_for(["--master-port", str(port)])


def test_hostfile_counts_the_ranks(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# a cluster\nnode1 slots=4\n\nnode2 slots=8\n")
    words = ["--hostfile", str(hostfile), "--node-rank", "1", "--master-addr", "node1"]
    command, _, world_size = command_for(words)
    assert world_size == 12
    assert "--no_ssh" in command and command[command.index("--node_rank") + 1] == "1"
    assert command_for([*words, "--num-nodes", "1"])[2] == 4
    assert command_for([*words, "--num-gpus", "2"])[2] == 4
    with pytest.raises(UserError, match="--num-nodes 3 needs"):
        command_for([*words, "--num-nodes", "3"])
    with pytest.raises(UserError, match="needs --master-addr"):
        command_for(words[:4])


def prepared(words: list[str], device: str | None = "cpu"):
    own, rest = launcher_parser().parse_known_args(words)
    with tempfile.NamedTemporaryFile("w") as file:
        return prepare_run(own, device, ["script.py", *rest], file)


@pytest.mark.parametrize(
    ("words", "device", "message"),
    [
        (
            ["--node-rank", "2", "--master-addr", "a"],
            "cpu",
            "--node-rank 2: the hostfile has machines 0 to 1",
        ),
        (["--num-gpus", "400"], "cpu", "--num-gpus 400: the hostfile gives node1 slots=300"),
        (
            ["--node-rank", "0", "--master-addr", "a"],
            None,
            r"node1 slots=300, and torch finds \d+ GPUs there",
        ),
    ],
)
def test_a_hostfile_that_does_not_fit(tmp_path, words, device, message):
    (tmp_path / "hosts").write_text("node1 slots=300\nnode2 slots=500\n")
    with pytest.raises(UserError, match=message):
        prepared([*words, "--hostfile", str(tmp_path / "hosts")], device)


def test_a_launcher_needs_a_hostfile():
    with pytest.raises(UserError, match="--launcher pdsh needs a --hostfile"):
        prepared(["--launcher", "pdsh"])
    with pytest.raises(UserError, match="leave out --launcher openmpi"):
        prepared(["--launcher", "openmpi", "--node-rank", "0", "--master-addr", "host0"])


def test_several_machines_are_started_by_their_numbers(tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=4\nnode3 slots=4\n")
    words = ["--hostfile", str(tmp_path / "hosts"), "--num-nodes", "2", "--num-gpus", "2"]
    run, world_size = prepared([*words, "--a"])
    assert world_size == 4
    assert [command[-2] for command in run.commands] == ["node1", "node2"]
    for rank, command in enumerate(run.commands):
        expected = (
            f"script.py --a --hostfile 'node1 slots=2,node2 slots=2' --node-rank {rank} --master-addr node1"
        )
        assert expected in command[-1]


def test_no_secret_is_in_the_command_line_of_another_machine(monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HOME", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG"):
        monkeypatch.setenv(name, f"the value of {name}")
    line = on_machine(["python"])
    assert "NCCL_DEBUG" in line
    assert not any(name in line for name in ("WANDB_API_KEY", "HF_TOKEN", "HOME", "CUDA_VISIBLE_DEVICES"))


@pytest.mark.parametrize(
    "words", ["--num-gpus 64", "--node-rank 0", "--launcher ssh", "--bind-cores-to-rank"]
)
def test_a_plan_takes_its_gpus_from_its_own_flag(words):
    with pytest.raises(UserError, match=r"--plan starts no ranks: .* say --gpus"):
        main(["train_ds.py", "--plan", *words.split()])


def test_a_rank_of_srun_starts_no_ranks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("RANK", 1), ("SIZE", 4), ("LOCAL_RANK", 1), ("LOCAL_SIZE", 2)):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    with pytest.raises(UserError, match="started 4 ranks, and this is one of them: leave out --num-gpus"):
        main(["train_ds.py", "--num-gpus", "2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no machine"),
        ("node1 slots=two", "line 1: expected `name slots=GPUS`"),
        ("node1 slots=2\nnode1 slots=2", "line 2: node1 is named twice"),
    ],
)
def test_bad_hostfile(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        command_for(["--hostfile", str(tmp_path / "hosts")])


def test_architectures_lose_the_suffix_deepspeed_cannot_read(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;12.0f+PTX")
    assert command_for([])[1]["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;12.0+PTX"


def test_cuda_without_a_gpu_is_one_clear_line():
    import torch

    if torch.cuda.device_count():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no CUDA GPU"):
        command_for([], device="cuda")


@pytest.mark.gpu
def test_gpu_choice_respects_visible_devices(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    command, environment, world_size = command_for([], device=None)
    assert "localhost:0" in command and world_size == 1
    assert "CUDA_VISIBLE_DEVICES" not in environment
    with pytest.raises(UserError, match="this machine has 1"):
        command_for(["--num-gpus", "2"], device=None)
