"""One run on several machines: a `launch.py --node-rank` on each, started over ssh or pdsh.

On each machine it checks what it finds there, starts the ranks through the DeepSpeed launcher and watches them.
Here the first machine that fails is found, the others are stopped, and one line says what happened. (DeepSpeed's
own way with pdsh starts the ranks, but a rank that fails stops only those of its machine.)
"""

import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from training.config import UserError
from training.watch import POLL_SECONDS, say_stopping

SSH_OPTIONS = (
    "-oBatchMode=yes -oConnectTimeout=15 -oServerAliveInterval=10 -oServerAliveCountMax=2 -oLogLevel=ERROR"
)
SETTLE_SECONDS = 3  # a rank that loses its peer fails too, and may be seen first
STOP_SECONDS = 15  # for machines that were told to stop because another failed
NO_SUCH_PLACE = 127
# Settings of libraries; no secrets, since a command line can be read by everyone on the machine.
EXPORTED = re.compile(r"(CUDA|DEEPSPEED|DS|GLOO|HF|NCCL|OMP|PYTHON|TORCH|TRITON|UCX|WANDB)")
KEPT = re.compile(r"TOKEN|KEY|VISIBLE_DEVICES")
OF_SSH = re.compile(r"ssh: |Host key|Timeout, server|Connection |client_loop|.*Permission denied \(")
FAILED_RANK = re.compile(r"error: (rank \d+ (?:stopped|was killed).*)")


class Machines:
    """The launchers of all machines, watched through their connections.

    Args:
        shell: ssh or pdsh.
        commands: machine -> what runs there, in a directory like this one.
    """

    def __init__(self, shell: str, commands: dict[str, list[str]]) -> None:
        for program in {shell, "ssh"}:
            if not shutil.which(program):
                raise UserError(
                    f"several machines need {program}: install it, or start each with --node-rank"
                )
        self.shell, self.executable = shell, next(iter(commands.values()))[0]
        self.ids = {host: secrets.token_hex(8) for host in commands}  # by which its launcher is found there
        self.lines = {
            host: on_machine([*command, "--run-id", self.ids[host]]) for host, command in commands.items()
        }
        self.connections: dict[str, subprocess.Popen] = {}
        self.failed_ranks: dict[str, str] = {}  # machine -> what it said of its first rank that failed
        self.ssh_words: dict[str, str] = {}  # machine -> what ssh said of the connection to it
        self.last_words: dict[str, str] = {}  # machine -> last other line of its standard error
        self.codes: dict[str, int] = {}  # machine -> exit code other than 0, before any was told to stop
        self.interrupted: int | None = None
        self.times_told = 0
        self.deadline = math.inf

    def run(self) -> int:
        """Runs to the end; returns 0, the exit code of the machine that failed, or 128 + the signal."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._interrupt)
        readers = []
        for host, line in self.lines.items():
            self.connections[host] = self._start(host, line, stderr=subprocess.PIPE, text=True)
            readers.append(threading.Thread(target=self._relay, args=(host,), daemon=True))
            readers[-1].start()
        while self._running():
            self._look()
            if time.monotonic() > self.deadline:
                self._tell(signal.SIGTERM)
            time.sleep(POLL_SECONDS)
        for reader in readers:
            reader.join(timeout=1)
        if self.interrupted:
            return 128 + self.interrupted
        self._look()
        return self._verdict()

    @property
    def commands(self) -> list[list[str]]:
        """What starts each machine."""
        return [self._remote(host, line) for host, line in self.lines.items()]

    def _remote(self, host: str, line: str) -> list[str]:
        if self.shell == "pdsh":
            return ["pdsh", "-N", "-S", "-R", "ssh", "-w", host, line.replace("%", "%%")]
        return ["ssh", "-n", *SSH_OPTIONS.split(), host, line]

    def _start(self, host: str, line: str, **options) -> subprocess.Popen:
        appended = f"{SSH_OPTIONS} {os.environ.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
        return subprocess.Popen(
            self._remote(host, line),
            env={**os.environ, "PDSH_SSH_ARGS_APPEND": appended},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

    def _relay(self, host: str) -> None:
        """Passes a machine's errors on, but for those that may follow from another's: `_verdict` picks one."""
        for line in self.connections[host].stderr:
            if line.startswith("pdsh@"):
                continue
            if match := FAILED_RANK.match(line):
                self.failed_ranks[host] = match[1]
            elif OF_SSH.match(line):
                self.ssh_words[host] = line.strip()
            else:
                self.last_words[host] = line.strip()
                print(line, end="", file=sys.stderr, flush=True)

    def _running(self) -> list[str]:
        return [host for host, connection in self.connections.items() if connection.poll() is None]

    def _look(self) -> None:
        """Notes machines that failed by themselves, and when to stop the others."""
        if self.times_told:
            return
        for host, connection in self.connections.items():
            code = connection.poll()
            if code and host not in self.codes:
                self.codes[host] = code if code > 0 else 128 - code
                self.deadline = min(self.deadline, time.monotonic() + SETTLE_SECONDS)

    def _tell(self, number: int) -> None:
        """Passes a signal to the launcher of every machine: the first saves and stops, the second ends at once."""
        self.times_told += 1
        self.deadline = time.monotonic() + STOP_SECONDS
        for host in self._running():
            if self.times_told > 2:  # nobody there listens
                os.killpg(self.connections[host].pid, signal.SIGKILL)
            else:
                pattern = f"^{re.escape(self.executable)} .*run-id {self.ids[host]}"
                name = signal.Signals(number).name.removeprefix("SIG")
                self._start(host, shlex.join(["pkill", f"-{name}", "-f", pattern]), stderr=subprocess.DEVNULL)

    def _interrupt(self, number: int, frame: object) -> None:
        if self.interrupted is None:
            self.interrupted = number
            say_stopping(number)
            self._tell(number)
            self.deadline = math.inf  # a checkpoint may take its time
        else:
            self._tell(number)

    def _verdict(self) -> int:
        """Says which machine failed first, unless it has said so itself; returns its exit code."""
        if not self.codes:
            return 0
        # A mistake that the user can mend explains all others, and so does a signal.
        order = [*self.codes]
        host = min(order, key=lambda host: (self.codes[host] != 2, self.codes[host] < 128, order.index(host)))
        code, words = self.codes[host], self.last_words.get(host, "")
        if code == 2:
            return code
        if host in self.failed_ranks:
            what = self.failed_ranks[host]
        elif code == 255:
            words = self.ssh_words.get(host)
            what = f"no connection ({words}); ssh must work without a password. --node-rank needs no ssh."
            what = what if words else "the connection was lost"
        elif code == NO_SUCH_PLACE:
            what = (
                f"the repository and its environment must be where they are here, in {Path.cwd()} ({words})"
            )
        else:
            what = f"stopped with exit code {code} ({words})"
        print(f"error: {host}: {what}", file=sys.stderr, flush=True)
        return code


def on_machine(command: Sequence[str]) -> str:
    """A line for another machine's shell: the command in this directory, with this process's settings."""
    exported = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if EXPORTED.match(name) and not KEPT.search(name)
    ]
    there = shlex.quote(os.getcwd())
    return f"cd {there} || exit {NO_SUCH_PLACE}; exec env {shlex.join([*exported, *command])}"
