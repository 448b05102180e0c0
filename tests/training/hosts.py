"""Machines to test on: network namespaces of this one, each with its own address, host name and sshd."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEAD = "10.77.0.9"  # on their network, and no machine has it
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
SSHD = """
ListenAddress {address}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
"""


class Hosts:
    """Two machines on one cable; what runs on the first sees its network alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"pragnosia{os.getpid()}-{i}" for i in range(len(ADDRESSES))]

    def on(self, machine: int, *words: str | Path) -> list[str]:
        """The command line that runs a program on a machine."""
        name = self.names[machine]
        shell = ["unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", name, *shell, *map(str, words)]

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        return {**kept, "PATH": f"{self.folder}:{PATH}", "OMP_NUM_THREADS": "1", **extra}

    def start(self, *words: str | Path, **options) -> subprocess.Popen:
        """A program on the first machine."""
        return subprocess.Popen(self.on(0, *words), env=self.environment(), text=True, **options)


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[Hosts]:
    """Skips where this machine cannot make them."""
    for program in ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "pkill"):
        if not shutil.which(program, path=PATH):
            pytest.skip(f"two machines are tested with {program}, which is not installed")
    hosts = Hosts(folder)
    first, second = hosts.names
    with contextlib.ExitStack() as undo:
        try:
            for name in hosts.names:
                _run("ip", "netns", "add", name)
                undo.callback(_run, "ip", "netns", "del", name)
                undo.callback(_kill_all, name)
            _run(*f"ip link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
            for name, address in zip(hosts.names, ADDRESSES, strict=True):
                for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    _run("ip", "-n", name, *words.split())
        except subprocess.CalledProcessError as error:
            pytest.skip(f"two machines are tested in network namespaces: {error.stderr.decode().strip()}")
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        ssh = folder / "ssh"  # found before the real one, by pdsh and mpirun too
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)
        for machine, address in enumerate(ADDRESSES):
            config = folder / f"sshd_config{machine}"
            config.write_text(SSHD.format(address=address, folder=folder))
            server = subprocess.Popen(
                hosts.on(machine, shutil.which("sshd", path=PATH), "-D", "-e", "-f", config),
                stderr=(folder / f"sshd{machine}.log").open("w"),
            )
            undo.callback(server.wait)
            undo.callback(server.terminate)
            for _ in range(50):
                if hosts.start("ssh", "-oLogLevel=QUIET", address, "true").wait() == 0:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError((folder / f"sshd{machine}.log").read_text())
        yield hosts


def _kill_all(name: str) -> None:
    """Ends what a failed test has left running on a machine."""
    for pid in _run("ip", "netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def _run(*words: str) -> str:
    done = subprocess.run(words, check=True, capture_output=True, env={**os.environ, "PATH": PATH})
    return done.stdout.decode()
