"""Processes that have the libraries imported: `Process` starts one, `python()` is a program that is one.

sh PYTHON words…        # what python() returns: `python words…`, five seconds sooner
"""

import atexit
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from shlex import quote

SERVER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "preloaded_server.py")


class Process:
    """A fork of the server behind the socket `server` that is `python words…` with these variables and files.

    It dies with this object's connection: with the process that started it.
    """

    def __init__(
        self, server: str, words: list[str], variables: dict[str, str], directory: str, files: tuple
    ):
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(server)
        request = {"words": words, "variables": variables, "directory": directory}
        message = json.dumps(request).encode()
        socket.send_fds(self.connection, [len(message).to_bytes(8)], files)
        self.connection.sendall(message)
        self.pid = int.from_bytes(self.connection.recv(4, socket.MSG_WAITALL))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal. Raises TimeoutError, BlockingIOError for a timeout of 0."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            status = self.connection.recv(4)
            if not status:
                raise ConnectionError("the server of forks ended")
            self.returncode = os.waitstatus_to_exitcode(int.from_bytes(status))
        return self.returncode


@functools.cache
def address() -> str:
    """The socket of this process's server, which starts now if it has not yet, beside the program `python`."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    socket_path, program = os.path.join(folder, "socket"), os.path.join(folder, "bin", "python")
    os.mkdir(os.path.dirname(program))
    with open(program, "w") as file:
        real = quote(sys.executable)
        # Python with other options, those that keep the environment out above all, is started anew; and so is one
        # for a GPU, since the libraries that are loaded have settled for the CPU.
        file.write(
            f'#!/bin/sh\ncase "$1" in -c | -m | -u | [!-]*) ;; *) exec {real} "$@" ;; esac\n'
            f'case "${{DS_ACCELERATOR:-cpu}}" in cpu) ;; *) exec {real} "$@" ;; esac\n'
            f'exec {real} -SE {quote(os.path.abspath(__file__))} {quote(socket_path)} "$@"\n'
        )
    os.chmod(program, 0o755)
    outside = ("PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    variables = {name: value for name, value in os.environ.items() if name not in outside}
    server = subprocess.Popen(
        [sys.executable, SERVER, socket_path, program],
        env=variables | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    atexit.register(server.communicate)  # its standard input ends, and so does it
    while (line := server.stdout.readline()) != b"ready\n":
        assert line, "the server of forks ended"
    return socket_path


def python() -> str:
    """The path of a program that does as `python` does, by forks of this process's server."""
    return os.path.join(os.path.dirname(address()), "bin", "python")


def lent_environment(cache: Path) -> dict[str, str]:
    """What makes launch.sh use this `python()`, with the compiled ops of the Python that runs."""

    def ops(folder: Path, environment: str) -> Path:
        number = subprocess.run(["cksum"], input=f"{environment}\n", stdout=-1, text=True).stdout.split()[0]
        return folder / "pragnosia" / f"ops-{number}"

    environment = str(Path(python()).parents[1])
    compiled = ops(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")), sys.prefix)
    compiled.mkdir(parents=True, exist_ok=True)
    lent = ops(cache, environment)
    lent.parent.mkdir(parents=True, exist_ok=True)
    lent.symlink_to(compiled)
    folders = {"XDG_CACHE_HOME": str(cache), "TORCH_EXTENSIONS_DIR": str(compiled)}
    return {"PRAGNOSIA_VENV": environment, **folders}


if __name__ == "__main__":
    process = Process(sys.argv[1], sys.argv[2:], dict(os.environ), os.getcwd(), (0, 1, 2))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.kill(process.pid, number))
    code = process.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
