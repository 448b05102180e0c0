"""Which of several processes this one is, in the words of whatever started it; imports no torch."""

import re
import socket
from collections.abc import Mapping

import psutil

from training.config import UserError

FIRST_PORT, PORTS = 20000, 10000  # below those that the system hands out by itself


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a process that `mpirun` or `srun` started as one of several; else empty.

    A MASTER_ADDR or MASTER_PORT that is set stays. Without them Slurm's are the step's first machine and a port
    from the job's number, so that two jobs on a machine differ; Open MPI names neither (`start_ranks` lets
    DeepSpeed ask it, through mpi4py).
    """
    if "RANK" in environment:
        return {}
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        words = {
            "RANK": "RANK",
            "WORLD_SIZE": "SIZE",
            "LOCAL_RANK": "LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "LOCAL_SIZE",
        }
        return {ours: environment[f"OMPI_COMM_WORLD_{theirs}"] for ours, theirs in words.items()}
    # Of the step: a batch script and `srun --pty bash` have the job's SLURM_NTASKS too, and are alone.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        number = 16 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[int(environment["SLURM_NODEID"])]),
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": environment.get("MASTER_PORT") or str(FIRST_PORT + number % PORTS),
        }
    return {}


def tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` -> [2, 2, 2, 1]."""
    return [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(times or 1))
    ]


def first_host(nodes: str) -> str:
    """The first machine of Slurm's `rack[1-2]-node[08,10-12],other` (here rack1-node08)."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])*", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def interface_towards(address: str) -> str | None:
    """The network interface of this machine that reaches a host, or has its address; None for the loopback's.

    Raises:
        UserError: the name is not known here.
    """
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as error:
        raise UserError(f"{address}, the address of the first machine: {error.strerror}") from None
    with socket.socket(family, kind) as probe:  # connecting one sends nothing
        try:
            probe.connect(where)
        except OSError:
            return None  # no route: gloo looks for itself
        own = probe.getsockname()[0]
    names = [name for name, found in psutil.net_if_addrs().items() if own in (a.address for a in found)]
    return None if own == "::1" or own.startswith("127.") or not names else names[0]
