"""Real training processes on a small model, for the tests of runs and checkpoints."""

import contextlib
import json
import os
import signal
import socket
import tempfile
from pathlib import Path

from tests.preloaded import Process, address

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    "--model-size", "custom", "--hidden-size", "32", "--num-layers", "2", "--num-experts", "4",
    "--max-length", "64", "--batch-size", "2", "--device", "cpu", "--report-to", "none", "--deterministic",
    "--logging-steps", "1", "--num-workers", "0", "--learning-rate", "1e-3",
)  # fmt: skip


def write_rows(path: Path, count: int = 120) -> Path:
    """A small reasoning dataset."""
    rows = [
        {"question": f"What is {n} + {n % 7}?", "answer": f"{n} + {n % 7} = {n + n % 7}\n#### {n + n % 7}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_shape(words: list[str]) -> list[str]:
    """A command line that leaves the model's shape to the run it starts from."""
    shape = ("--model-size", "--hidden-size", "--num-layers", "--num-experts")
    return [word for i, word in enumerate(words) if word not in shape and words[i - 1] not in shape]


def command(data: Path, output: Path, *flags: str) -> list[str]:
    """What follows `python` in the command line of a small run; a flag given here replaces the small run's own."""
    own = (
        *SMALL,
        "--dataset",
        str(data),
        "--cache-dir",
        str(data.parent / "cache"),
        "--output-dir",
        str(output),
    )
    kept = [word for flag, values in _pairs(own) if flag not in flags for word in (flag, *values)]
    return [str(REPOSITORY / "train_ds.py"), *kept, *flags]


def _pairs(words):
    pairs = []
    for word in words:
        if word.startswith("--"):
            pairs.append((word, []))
        else:
            pairs[-1][1].append(word)
    return pairs


def environment(**extra: str) -> dict[str, str]:
    """One thread, the CPU."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
    return {**inherited, **own, **extra}


class Forked:
    """A process that is `python words…` with this environment and nothing on its standard input."""

    def __init__(self, words: list[str], variables: dict[str, str], output: Path | None = None):
        self.output = open(output, "w+") if output else tempfile.TemporaryFile("w+")  # noqa: SIM115
        with open(os.devnull) as nothing:
            files = (nothing.fileno(), self.output.fileno(), self.output.fileno())
            self.process = Process(address(), words, variables, os.getcwd(), files)

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            self.process.wait(timeout=0)
        return self.process.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        return self.process.wait()

    def communicate(self, timeout: float) -> str:
        """All that it printed, when it has ended."""
        try:
            self.process.wait(timeout)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            raise TimeoutError(self.printed()) from None
        return self.printed()

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()


def start(arguments: list[str], world_size: int = 1, **extra: str) -> list[Forked]:
    """The ranks of a run, started without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        {
            "RANK": str(r),
            "LOCAL_RANK": str(r),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for r in range(world_size)
    ]
    return [Forked(arguments, environment(**rank, **extra)) for rank in ranks]


def finish(processes: list[Forked], timeout: float = 300) -> tuple[int, str]:
    """(exit code of rank 0, output of all ranks)."""
    outputs = [process.communicate(timeout) for process in processes]
    return processes[0].returncode, "\n".join(outputs)


def run(data: Path, output: Path, *flags: str, world_size: int = 1, expect: int = 0) -> tuple[Path, str]:
    """Run to the end; the newest run directory under `output`, and what was printed."""
    code, text = finish(start(command(data, output, *flags), world_size))
    assert code == expect, text
    runs = sorted(output.glob("pragnosia_*"))
    return (runs[-1] if runs else output), text


def losses(run_directory: Path) -> dict[int, float]:
    """step -> logged loss."""
    rows = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def weights(model_directory: Path) -> bytes:
    """All bytes of the exported weights."""
    return b"".join(path.read_bytes() for path in sorted(model_directory.glob("*.safetensors")))
