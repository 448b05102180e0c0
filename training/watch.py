"""Watches the ranks of this machine, which a launcher has started: stops them, and says which failed.

The DeepSpeed launcher answers Ctrl-C by killing the ranks after 30 seconds, too short for a large checkpoint,
and does not say which rank failed. So it runs in a session of its own, where the terminal's Ctrl-C does not
reach it, with SIGINT and SIGTERM blocked, for `pkill -f` sends them to everyone; this process passes the signal
to the ranks alone, waits as long as they write, and names the first that fails.
"""

import contextlib
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import psutil

POLL_SECONDS = 0.1
BLOCKED = (signal.SIGINT, signal.SIGTERM)  # in the launcher; what it starts inherits it, see `run_script`
STOP_SECONDS = 30  # for ranks whose peer has failed, or whose output nobody reads: then they are killed


class Watch:
    """One run of a launcher, its ranks watched through the process table.

    Args:
        command, environment: of the launcher.
        is_part: of a run on several machines; whoever started it says what happens to all.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], is_part: bool = False) -> None:
        self.commands, self.environment, self.is_part = [command], environment, is_part
        self.ranks: dict[int, psutil.Process] = {}  # rank -> process, of this machine
        self.world_size = 1
        self.failed: tuple[int, int] | None = None  # rank, exit code (negative: signal)
        self.gone: list[int] = []  # ranks that ended between two looks
        self.interrupted: int | None = None  # the signal
        self.deadline = math.inf

    def run(self) -> int:
        """Runs to the end; returns 0, the failed rank's exit code, or 128 + the signal that ended the run."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        self._start()
        for number in (*BLOCKED, signal.SIGHUP):
            signal.signal(number, self._interrupt)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while self.launcher.poll() is None:
            self._look()
            if self.interrupted is None and self.is_part and is_hung_up(sys.stdout):
                self._interrupt(signal.SIGHUP, None)
                self.deadline = time.monotonic() + STOP_SECONDS
            if time.monotonic() > self.deadline:
                self._kill()
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
        others = " The other ranks were stopped." if self.world_size > 1 else ""
        print(f"error: rank {rank} {how}.{others}", file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code

    def _start(self, **options) -> None:
        self.launcher = subprocess.Popen(
            self.commands[0], env=self.environment, start_new_session=True, **options
        )

    def _interrupt(self, number: int, frame: object) -> None:
        """First signal: pass it to the ranks, which save and stop. Second: end everything at once."""
        if self.interrupted is not None:
            self._kill()
            return
        self.interrupted = number
        self._look()
        if not self.is_part:
            say_stopping(number)
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self.ranks:
            self._signal_ranks(signal.SIGTERM if number == signal.SIGHUP else number)
        else:  # none runs yet
            self._kill()

    def _kill(self) -> None:
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
                if re.search(r"\s--local_rank=\d+\s", " ".join(process.cmdline()) + " "):
                    variables = process.environ()
                    self.ranks.setdefault(int(variables["RANK"]), process)
                    self.world_size = int(variables["WORLD_SIZE"])
        if self.failed or self.interrupted:
            return
        self.gone += [r for r, p in self.ranks.items() if r not in self.gone and not p.is_running()]
        codes = {rank: code for rank, process in self.ranks.items() if (code := _exit_code(process))}
        if codes:
            # A rank that loses its peer fails too, within a moment: the one killed by a signal was the first.
            self.failed = min(codes.items(), key=lambda item: (item[1] > 0, item[0]))
            self._signal_ranks(signal.SIGTERM)
            self.deadline = time.monotonic() + STOP_SECONDS


class MpiWatch(Watch):
    """A run of `mpirun`, which stops the ranks of all machines itself when one fails.

    What it says of the failure, some paragraphs between rulers, becomes one line. A signal that ends it leaves the
    ranks a second; SIGUSR1 it passes on to them all, and they take it for SIGTERM.
    """

    def run(self) -> int:
        """As `Watch.run`."""
        code = super().run()
        self.reader.join(timeout=1)
        told = " ".join(self.told)
        if self.interrupted is None and code not in (0, 2):
            killed = re.search(r"process rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)", told)
            exited = re.search(r"Process name: \[\[\d+,1\],(\d+)\]\s+Exit code: +(\d+)", told)
            what = f"mpirun stopped with exit code {code}: {told}"
            if killed:
                how = f"rank {killed[1]} was killed by signal {killed[3]}"
                what = f"{killed[2]}: {how}. The other ranks were stopped."
            elif exited:
                what = f"rank {exited[1]} stopped with exit code {exited[2]}. The other ranks were stopped."
            elif "unable to reliably start" in told:
                what = "mpirun did not reach every machine: each needs Open MPI, and ssh without a password"
            print(f"error: {what}", file=sys.stderr, flush=True)
        return code

    def _start(self) -> None:
        super()._start(stderr=subprocess.PIPE, text=True)
        self.told: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        """Passes on what the ranks print, and keeps what stands between mpirun's rulers."""
        is_told = False
        for line in self.launcher.stderr:
            if re.fullmatch("-{70,}", line.strip()):
                is_told = not is_told
            elif is_told:
                self.told.append(line.strip())
            else:
                print(line, end="", file=sys.stderr, flush=True)

    def _look(self) -> None:
        pass

    def _pass_on(self, number: int) -> None:
        with contextlib.suppress(psutil.Error):
            started = psutil.Process(self.launcher.pid).children()
            for mpirun in started:
                mpirun.send_signal(signal.SIGUSR1)
            if not started:
                self._kill()


def say_stopping(number: int) -> None:
    """What a signal does, for whoever sent it."""
    name = signal.Signals(number).name
    print(f"\n{name}: the run saves and stops; once more ends it at once", file=sys.stderr, flush=True)


def is_hung_up(stream: TextIO) -> bool:
    """Whether nobody reads this pipe, connection or terminal any more."""
    poll = select.poll()
    poll.register(stream, 0)
    return bool(poll.poll(0))


def _exit_code(process: psutil.Process) -> int | None:
    """Exit code (negative: signal) of a process that has ended and waits for its parent; else None."""
    try:
        if process.status() != psutil.STATUS_ZOMBIE:
            return None
        status = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[-1])
        return os.waitstatus_to_exitcode(status)
    except (psutil.Error, OSError):
        return None
