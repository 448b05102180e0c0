"""Runs on two machines: what each way of starting them does, and what is said when one fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.hosts import ADDRESSES, DEAD, Hosts, two_machines
from tests.training.runs import REPOSITORY

pytestmark = pytest.mark.slow
LAUNCH = REPOSITORY / "training" / "launch.py"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with two_machines(tmp_path_factory.mktemp("machines")) as hosts:
        yield hosts


def hostfile(folder: Path, *addresses: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{address} slots=1\n" for address in addresses))
    return path


def launch(hosts: Hosts, *words: str | Path) -> subprocess.Popen:
    """`launch.py` on the first machine."""
    return hosts.start(sys.executable, LAUNCH, *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def ended(process: subprocess.Popen, timeout: float = 60) -> str:
    """What it printed; within a minute nothing of it may be left on any machine."""
    output, _ = process.communicate(timeout=timeout)
    return output


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error")]


def test_a_machine_that_is_off(hosts, tmp_path):
    script = tmp_path / "script.py"
    script.touch()
    for shell in ("ssh", "pdsh"):
        process = launch(
            hosts,
            script,
            "--hostfile",
            hostfile(tmp_path, ADDRESSES[0], DEAD),
            "--device",
            "cpu",
            "--launcher",
            shell,
        )
        output = ended(process)
        print(output)
        assert process.returncode == 255
        assert errors(output) == [
            f"error: {DEAD}: no connection (ssh: connect to host {DEAD} port 22: No route to host); ssh must work without a password. --node-rank needs no ssh."
        ]
