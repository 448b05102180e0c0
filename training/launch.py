"""Starts a script on its ranks through the DeepSpeed launcher, and watches them.

    python training/launch.py train_ds.py --num-gpus 2 --model-size 1B

The DeepSpeed launcher answers Ctrl-C by killing the ranks after 30 seconds, too short for a large checkpoint,
and does not say which rank failed. So it runs in a session of its own, where the terminal's Ctrl-C does not
reach it; this process passes the signal to the ranks alone, waits as long as they write, and names the first
that fails.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.command_line import Parser, parse, run_script
from training.config import UserError

CLUSTER_PORT = 29500  # on several machines the port is agreed on beforehand, for the firewall's sake
POLL_SECONDS = 0.1


def launcher_parser() -> Parser:
    """The options that belong to the launcher; all others are the script's."""
    parser = Parser(prog="launch.sh", add_help=False, usage="./launch.sh train|eval [options]")
    group = parser.add_argument_group("Where it runs")
    group.add_argument(
        "--num-gpus", type=int, metavar="N", help="GPUs of each machine (CPU: ranks; default: 1)"
    )
    group.add_argument("--num-nodes", type=int, metavar="N", help="machines, the first N of the hostfile")
    group.add_argument("--hostfile", metavar="FILE", help="machines, one `name slots=GPUS` a line")
    group.add_argument(
        "--node-rank", type=int, metavar="N", help="this machine's number; starts it without ssh"
    )
    group.add_argument("--master-addr", metavar="HOST", help="address of the first machine")
    group.add_argument("--master-port", type=int, metavar="PORT", help="port of rank 0 (default: a free one)")
    group.add_argument(
        "--bind-cores-to-rank", action="store_true", help="give each rank its own CPU cores (needs numactl)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `script [options]`; returns the exit code of the run.

    `train_ds.py` always goes through the DeepSpeed launcher, another script where an option asks for ranks.

    Raises:
        UserError: options that do not fit this machine, a port in use, an unreadable hostfile, no ssh.
    """
    script, *words = sys.argv[1:] if argv is None else argv
    parser = launcher_parser()
    own, rest = parser.parse_known_args(words)
    alone = [sys.executable, script, *rest]
    if {"-h", "--help"} & set(rest):
        print(parser.format_help(), flush=True)
        os.execv(sys.executable, alone)
    if Path(script).name == "train_ds.py":
        settings = parse(
            rest, also_suggest=[*parser._option_string_actions]
        )  # a bad option fails here, before any rank starts
        if settings.list_datasets or settings.plan:
            os.execv(sys.executable, alone)
        device = settings.training.device
    elif any(value is not None for value in (own.num_gpus, own.num_nodes, own.hostfile)):
        settings, device = None, _device_option(rest)
    else:
        os.execv(sys.executable, alone)
    command, environment, world_size = launcher_command(own, device, [script, *rest])
    if settings is not None and settings.dry_run:
        print("launcher:", shlex.join(command), flush=True)
        os.execve(sys.executable, alone, {**os.environ, "WORLD_SIZE": str(world_size)})
    return Watch(command, environment).run()


def _device_option(words: Sequence[str]) -> str | None:
    parser = Parser(add_help=False)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    return parser.parse_known_args(words)[0].device


def launcher_command(
    own: argparse.Namespace, device: str | None, script: Sequence[str]
) -> tuple[list[str], dict[str, str], int]:
    """The DeepSpeed launcher's command line, its environment, and the number of ranks it starts.

    Args:
        own: the parsed launcher options.
        device: cuda, cpu, or None for cuda where there is one.
        script: the script's path and options.
    """
    for name in ("num_gpus", "num_nodes"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    hosts = _read_hostfile(own.hostfile) if own.hostfile else {}
    nodes = own.num_nodes or max(1, len(hosts))
    if nodes > max(1, len(hosts)):
        raise UserError(f"--num-nodes {nodes} needs a --hostfile that names as many machines")
    options, environment = [], dict(os.environ)
    if hosts:
        options += ["--hostfile", own.hostfile, "--num_nodes", str(nodes), "--no_ssh_check"]
        options += ["--num_gpus", str(own.num_gpus)] if own.num_gpus else []
        ranks_here = own.num_gpus or next(iter(hosts.values()))
        world_size = sum(own.num_gpus or slots for slots in list(hosts.values())[:nodes])
        if nodes > 1 and own.node_rank is None:
            _check_cluster_login(next(iter(hosts)), script[0])
            script = [script[0], *(word if " " in word else shlex.quote(word) for word in script[1:])]
    else:
        selection, ranks_here = _local_ranks(own.num_gpus, device, environment)
        options += selection
        world_size = ranks_here
    if own.node_rank is not None:
        if not own.master_addr:
            raise UserError("--node-rank needs --master-addr: the address of machine 0")
        options += ["--no_ssh", "--node_rank", str(own.node_rank)]
    if own.master_addr:
        options += ["--master_addr", own.master_addr]
    options += ["--master_port", str(_port(own.master_port, local=not hosts))]
    if own.bind_cores_to_rank:
        if not shutil.which("numactl"):
            raise UserError(
                "--bind-cores-to-rank needs the program numactl: install it or leave the option out"
            )
        options.append("--bind_cores_to_rank")
    if ranks_here > 1:  # else every rank would start a thread for every core
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks_here)))
    architectures = environment.get("TORCH_CUDA_ARCH_LIST")
    if architectures:  # DeepSpeed's op builder cannot read suffixes such as 9.0a
        environment["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(\d)[a-z]", r"\1", architectures)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    return [*launcher, *options, *script], environment, world_size


def _local_ranks(
    wanted: int | None, device: str | None, environment: dict[str, str]
) -> tuple[list[str], int]:
    """Launcher options that choose the ranks of this machine, and their number; edits `environment`."""
    import torch

    available = 0 if device == "cpu" else torch.cuda.device_count()
    if device == "cuda" and not available:
        raise UserError(
            "--device cuda: this machine has no CUDA GPU that torch can use; leave it out to run on CPU"
        )
    if not available:
        environment["DS_ACCELERATOR"] = "cpu"
        return ["--num_gpus", str(wanted or 1)], wanted or 1
    if wanted and wanted > available:
        raise UserError(f"--num-gpus {wanted}: this machine has {available} (CUDA_VISIBLE_DEVICES counts)")
    ranks = wanted or available
    visible = environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is None:
        return ["--num_gpus", str(ranks)], ranks
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: the DeepSpeed launcher wants plain numbers, such as 0,1"
        )
    return ["--include", f"localhost:{','.join(visible.split(',')[:ranks])}"], ranks


def _read_hostfile(path: str) -> dict[str, int]:
    """Machine name -> number of GPUs."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line.strip())
        if not match:
            raise UserError(
                f"--hostfile {path} line {number}: expected `name slots=GPUS`, not {line.strip()!r}"
            )
        if match[1] in hosts:
            raise UserError(f"--hostfile {path} line {number}: {match[1]} is named twice")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"--hostfile {path}: names no machine")
    return hosts


def _check_cluster_login(host: str, script: str) -> None:
    """Raises UserError where the launcher could not start ranks on other machines."""
    for path in (sys.executable, script, os.getcwd()):
        if re.search(r"[^\w@%+=:,./-]", path):
            raise UserError(
                f"the DeepSpeed launcher cannot start several machines from {path!r}: rename the path"
            )
    for program in ("pdsh", "ssh"):
        if not shutil.which(program):
            raise UserError(
                f"several machines need {program}: install it, or start each machine with --node-rank"
            )
    login = ["ssh", "-o", "PasswordAuthentication=no", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", host]
    if subprocess.run([*login, "true"], capture_output=True).returncode:
        raise UserError(f"ssh to {host} failed: it must work without a password, or use --node-rank")


def _port(wanted: int | None, local: bool) -> int:
    """A port rank 0 can listen on: the wanted one, else a free one on one machine, the usual on several."""
    if wanted is None and not local:
        return CLUSTER_PORT
    if wanted is not None and not 0 < wanted < 65536:
        raise UserError(f"--master-port must lie between 1 and 65535, not {wanted}")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", wanted or 0))
        except OSError as error:
            raise UserError(
                f"--master-port {wanted}: {error.strerror}; leave it out to get a free one"
            ) from None
        return listener.getsockname()[1]


class Watch:
    """One run of the DeepSpeed launcher, its ranks watched through the process table."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self.command, self.environment = command, environment
        self.ranks: dict[int, psutil.Process] = {}  # rank on this machine -> process
        self.failed: tuple[int, int] | None = None  # rank, exit code (negative: signal)
        self.gone: list[int] = []  # ranks that ended between two looks
        self.interrupted: int | None = None  # the signal

    def run(self) -> int:
        """Runs to the end; returns 0, the failed rank's exit code, or 128 + the signal that ended the run."""
        self.launcher = subprocess.Popen(self.command, env=self.environment, start_new_session=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)
        while self.launcher.poll() is None:
            self._look()
            time.sleep(POLL_SECONDS)
        if self.interrupted:
            return 128 + self.interrupted
        code = self.launcher.returncode
        if self.failed is None and not (code and self.gone):
            return code if code >= 0 else 128 - code
        # The launcher's own code is that of the rank it saw failing, where 247 stands for signal 9.
        rank, code = self.failed or (self.gone[0], code if code < 192 else code - 256)
        if code == 2:  # the rank has said what the user can mend
            return code
        if code > 0:
            how = f"stopped with exit code {code}"
        else:
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
            how += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        others = " The other ranks were stopped." if len(self.ranks) > 1 else ""
        print(f"error: rank {rank} {how}.{others}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    def _interrupt(self, number: int, frame: object) -> None:
        """First signal: pass it to the ranks, which save and stop. Second: end everything at once."""
        if self.interrupted is None:
            self.interrupted = number
            self._look()
            name = signal.Signals(number).name
            print(
                f"\n{name}: the run saves and stops; once more ends it at once", file=sys.stderr, flush=True
            )
            if self.ranks:
                self._signal_ranks(signal.SIGTERM if number == signal.SIGHUP else number)
            else:  # no rank runs yet, or they run on other machines, where the launcher reaches them
                os.killpg(self.launcher.pid, signal.SIGTERM)
            return
        os.killpg(self.launcher.pid, signal.SIGKILL)

    def _signal_ranks(self, number: int) -> None:
        for process in self.ranks.values():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def _look(self) -> None:
        """Finds the ranks, and the first that failed; the others are then told to stop, all at once."""
        with contextlib.suppress(psutil.Error):
            parents = psutil.Process(self.launcher.pid).children()
            for process in (child for parent in parents for child in parent.children()):
                match = re.search(r"\s--local_rank=(\d+)\s", " ".join(process.cmdline()) + " ")
                if match:
                    self.ranks.setdefault(int(match[1]), process)
        if self.failed or self.interrupted:
            return
        self.gone += [r for r, p in self.ranks.items() if r not in self.gone and not p.is_running()]
        codes = {rank: code for rank, process in self.ranks.items() if (code := _exit_code(process))}
        if codes:
            # A rank that loses its peer fails too, within a moment: the one killed by a signal was the first.
            self.failed = min(codes.items(), key=lambda item: (item[1] > 0, item[0]))
            self._signal_ranks(signal.SIGTERM)


def _exit_code(process: psutil.Process) -> int | None:
    """Exit code (negative: signal) of a process that has ended and waits for its parent; else None."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return None
        status = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[-1])
        return os.waitstatus_to_exitcode(status)
    except (psutil.Error, OSError):
        return None


if __name__ == "__main__":
    run_script(main)
