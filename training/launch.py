"""Starts a script on its ranks through the DeepSpeed launcher, and watches them.

    python training/launch.py train_ds.py --num-gpus 2 --model-size 1B

Ranks of this machine are `training/watch.py`'s to watch; several machines are started by `training/machines.py`,
or by mpirun (`--launcher openmpi`), or each by hand with its `--node-rank`. Where srun or mpirun has started this
process as one rank of several, it becomes the script.
"""

import argparse
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from training.command_line import Parser, parse, run_script
from training.config import UserError
from training.machines import EXPORTED, KEPT, SSH_OPTIONS, Machines
from training.ranks import rank_variables
from training.watch import MpiWatch, Watch

CLUSTER_PORT = 29500  # on several machines the port is agreed on beforehand, for the firewall's sake


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
        "--launcher",
        choices=("ssh", "pdsh", "openmpi"),
        help="what reaches the machines of the hostfile (default: ssh)",
    )
    group.add_argument(
        "--node-rank", type=int, metavar="N", help="this machine's number; starts it without ssh"
    )
    group.add_argument(
        "--master-addr",
        metavar="HOST",
        help="address of the first machine (default: its name in the hostfile)",
    )
    group.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help=f"port of rank 0 (default: a free one; {CLUSTER_PORT} on several machines)",
    )
    group.add_argument(
        "--bind-cores-to-rank", action="store_true", help="give each rank its own CPU cores (needs numactl)"
    )
    group.add_argument(
        "--run-id", help=argparse.SUPPRESS
    )  # from training/machines.py, which finds it again by this
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
    asks_for_ranks = any(value is not None for value in (own.num_gpus, own.num_nodes, own.hostfile))
    if own.node_rank is None and (variables := rank_variables(os.environ)):
        if asks_for_ranks:
            raise UserError(
                f"srun or mpirun has started {variables['WORLD_SIZE']} ranks, and this is one of them: "
                f"leave out --num-gpus, --num-nodes and --hostfile"
            )
        os.execve(sys.executable, alone, {**os.environ, **variables})
    if Path(script).name == "train_ds.py":
        settings = parse(rest)  # a bad option fails here, before any rank starts
        if settings.plan and any(value is not None and value is not False for value in vars(own).values()):
            raise UserError(
                "--plan starts no ranks: leave out --num-gpus, --hostfile and all else that is for a launcher, "
                "and say --gpus"
            )
        if settings.list_datasets or settings.plan:
            os.execv(sys.executable, alone)
        device = settings.training.device
    elif asks_for_ranks:
        settings, device = None, _device_option(rest)
    else:
        os.execv(sys.executable, alone)
    hosts = chosen_hosts(own)
    with tempfile.NamedTemporaryFile("w", prefix="hosts-") as file:
        run, world_size = prepare_run(own, device, [script, *rest], file)
        if settings is not None and settings.dry_run:
            for command in run.commands:
                print("launcher:", shlex.join(command), flush=True)
            ranks = {
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(max(hosts.values(), default=world_size)),
            }
            return subprocess.run(alone, env={**os.environ, **ranks}).returncode
        return run.run()


def prepare_run(
    own: argparse.Namespace, device: str | None, script: Sequence[str], file: IO[str]
) -> tuple[Watch | Machines, int]:
    """What runs on this machine or, with a hostfile, on all of it; and the number of ranks.

    Args:
        own: the parsed launcher options.
        device: cuda, cpu, or None for cuda where there is one.
        script: the script's path and options.
        file: takes the hostfile that DeepSpeed reads, with the machines and slots of this run alone.
    """
    hosts = chosen_hosts(own)
    if own.launcher and own.node_rank is not None:
        raise UserError(f"--node-rank starts this machine alone: leave out --launcher {own.launcher}")
    if hosts:
        file.writelines(f"{name} slots={slots}\n" for name, slots in hosts.items())
        file.flush()
        own.hostfile, own.num_nodes, own.num_gpus = file.name, None, None
        if own.node_rank is not None:
            _check_this_machine([*hosts.items()], own.node_rank, device)
        elif own.launcher != "openmpi":
            commands = {host: machine_command(own, hosts, rank, script) for rank, host in enumerate(hosts)}
            return Machines(own.launcher or "ssh", commands), sum(hosts.values())
    elif own.launcher:
        raise UserError(f"--launcher {own.launcher} needs a --hostfile that names the machines")
    command, environment, world_size = launcher_command(own, device, script)
    watch = MpiWatch if own.launcher == "openmpi" else Watch
    return watch(command, environment, is_part=own.run_id is not None), world_size


def machine_command(
    own: argparse.Namespace, hosts: dict[str, int], node_rank: int, script: Sequence[str]
) -> list[str]:
    """What starts one of several machines, by itself and there."""
    lines = ",".join(f"{name} slots={slots}" for name, slots in hosts.items())
    options = ["--hostfile", lines, "--node-rank", str(node_rank)]
    options += ["--master-addr", own.master_addr or next(iter(hosts))]
    options += ["--master-port", str(own.master_port)] if own.master_port else []
    options += ["--bind-cores-to-rank"] if own.bind_cores_to_rank else []
    return [sys.executable, str(Path(__file__).resolve()), *script, *options]


def _device_option(words: Sequence[str]) -> str | None:
    parser = Parser(add_help=False)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    return parser.parse_known_args(words)[0].device


def launcher_command(
    own: argparse.Namespace, device: str | None, script: Sequence[str]
) -> tuple[list[str], dict[str, str], int]:
    """The DeepSpeed launcher's command line, its environment, and the number of ranks of the run.

    With a hostfile it is that of one machine (`--node-rank`), or of all through mpirun.

    Args:
        own: the parsed launcher options.
        device: cuda, cpu, or None for cuda where there is one.
        script: the script's path and options.
    """
    hosts = chosen_hosts(own)
    environment = dict(os.environ)
    if hosts:
        options = ["--hostfile", own.hostfile]
        ranks_here, world_size = max(hosts.values()), sum(hosts.values())
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
    else:
        options, ranks_here = _local_ranks(own.num_gpus, device, environment)
        world_size = ranks_here
    is_mpi = bool(hosts) and own.node_rank is None
    if own.node_rank is not None:
        if not own.master_addr:
            raise UserError("--node-rank needs --master-addr: the address of machine 0")
        options += ["--no_ssh", "--node_rank", str(own.node_rank)]
    master = own.master_addr or (next(iter(hosts)) if is_mpi else None)
    options += ["--master_addr", master] if master else []
    port = _port(own.master_port, is_cluster=bool(hosts), is_first=not hosts or own.node_rank == 0)
    options += ["--master_port", str(port)]
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
    # DeepSpeed calls ninja by name, and a machine reached over ssh has the shortest of paths.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    if is_mpi:
        environment |= {"MASTER_ADDR": master, "MASTER_PORT": str(port)}
        options += _mpi_options(environment)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical"]
    return [*launcher, *options, *script], environment, world_size


def _mpi_options(environment: dict[str, str]) -> list[str]:
    """Options for the DeepSpeed launcher to start all ranks by mpirun, with the settings of this environment."""
    if not shutil.which("ompi_info"):
        raise UserError("--launcher openmpi needs Open MPI: install it (Debian and Ubuntu: openmpi-bin)")
    names = [name for name in environment if EXPORTED.match(name) and not KEPT.search(name)]
    by_deepspeed = ("PYTHON", "UCX", "NCCL")
    exports = ["PATH", "MASTER_ADDR", "MASTER_PORT", *(n for n in names if not n.startswith(by_deepspeed))]
    words = ["--bind-to", "none", "--mca", "plm_rsh_args", SSH_OPTIONS]
    words += [word for name in exports for word in ("-x", name)]
    return [
        "--launcher",
        "openmpi",
        "--force_multi",
        "--no_ssh_check",
        f"--launcher_args={shlex.join(words)}",
    ]


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


def chosen_hosts(own: argparse.Namespace) -> dict[str, int]:
    """Machine -> number of its ranks, of the machines that the options choose; empty without a hostfile."""
    for name in ("num_gpus", "num_nodes"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    hosts = read_hostfile(own.hostfile) if own.hostfile else {}
    nodes = own.num_nodes or max(1, len(hosts))
    if nodes > max(1, len(hosts)):
        raise UserError(f"--num-nodes {nodes} needs a --hostfile that names as many machines")
    for host, slots in hosts.items():
        if own.num_gpus and own.num_gpus > slots:
            raise UserError(f"--num-gpus {own.num_gpus}: the hostfile gives {host} slots={slots}")
    return {host: own.num_gpus or slots for host, slots in [*hosts.items()][:nodes]}


def read_hostfile(path: str) -> dict[str, int]:
    """Machine -> number of GPUs; `path` may also be the lines themselves, with commas between them."""
    try:
        lines = path.split(",") if "slots=" in path else Path(path).read_text().splitlines()
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


def _check_this_machine(hosts: list[tuple[str, int]], node_rank: int, device: str | None) -> None:
    """Raises UserError where the hostfile names no such machine, or gives it GPUs that it has not."""
    if not 0 <= node_rank < len(hosts):
        raise UserError(f"--node-rank {node_rank}: the hostfile has machines 0 to {len(hosts) - 1}")
    host, slots = hosts[node_rank]
    if device == "cpu":
        return
    import torch

    if slots > (gpus := torch.cuda.device_count()):
        way_out = "give it as many slots" if gpus else "mend it, or train on CPUs with --device cpu"
        raise UserError(
            f"the hostfile gives {host} slots={slots}, and torch finds {gpus} GPUs there: {way_out}"
        )


def _port(wanted: int | None, is_cluster: bool, is_first: bool) -> int:
    """A port rank 0 can listen on: the wanted one, else a free one on one machine, the usual on several."""
    if wanted is not None and not 0 < wanted < 65536:
        raise UserError(f"--master-port must lie between 1 and 65535, not {wanted}")
    wanted = wanted or (CLUSTER_PORT if is_cluster else 0)
    if not is_first:  # rank 0 listens elsewhere
        return wanted
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", wanted))
        except OSError as error:
            way_out = (
                "choose another, the same on all machines" if is_cluster else "leave it out to get a free one"
            )
            raise UserError(f"--master-port {wanted}: {error.strerror}; {way_out}") from None
        return listener.getsockname()[1]


if __name__ == "__main__":
    run_script(main)
