"""The form every benchmark's result takes: a table on the terminal and a JSON file."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from model.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORY = REPOSITORY / "benchmarks" / "results"
GPU_GOALS_GB = {"350M": 0.4, "1B": 0.5, "3B": 0.7, "7B": 1.0, "13B": 1.5}


def machine(device: str | None) -> dict:
    """Name of the GPU, or of the processor where `device` is cpu or there is no GPU, and versions."""
    import torch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
    }
    return {"gpu": torch.cuda.get_device_name() if on_gpu else processor(), "versions": versions}


def processor() -> str:
    """The processor's name as the system tells it, and how many cores there are to use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"no GPU; {names[0] if names else platform.machine()} x {max(1, len(names))}"


def commit() -> str | None:
    """The checked-out commit, `-dirty` with changes on top; None outside git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def goal(name: str, target: float, measured: float, *, at_least: bool) -> dict:
    """A goal judged from a measurement."""
    met = measured >= target if at_least else measured <= target
    return {"name": name, "target": target, "measured": measured, "met": met}


def gpu_goals(rows: list[dict]) -> list[dict]:
    """For each preset with its own number of experts, its best offloaded row of one row of 512 tokens."""
    judged = []
    for preset, target in GPU_GOALS_GB.items():
        wanted = {
            "model_size": preset,
            "batch_size": 1,
            "max_length": 512,
            "experts": PRESETS[preset].num_experts,
        }
        peaks = [
            row["gpu_allocated_gb"]
            for row in rows
            if row.get("placement") in ("streamed", "zero3")
            and "gpu_allocated_gb" in row
            and wanted.items() <= row.items()
        ]
        if peaks:
            name = f"GB of GPU memory, {preset} offloaded, 1 x 512 tokens"
            judged.append(goal(name, target, min(peaks), at_least=False))
    return judged


def write(path: Path, rows: list[dict], goals: list[dict], device: str | None) -> dict:
    """Write rows and goals as JSON to `path`, with what they were measured on; returns all of it."""
    result = {
        "command": shlex.join(["python", *sys.argv]),
        **machine(device),
        "commit": commit(),
        "date": date.today().isoformat(),
        "rows": rows,
        "goals": goals,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # whoever ends the benchmark now finds the result before
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return result


def report(path: Path, rows: list[dict], goals: list[dict], device: str | None) -> None:
    """Write the result to `path` and print it as a table."""
    result = write(path, rows, goals, device)
    print(f"\n{result['gpu']}; " + ", ".join(f"{k} {v}" for k, v in result["versions"].items() if v))
    print(f"{result['command']}\n")
    print(table(rows))
    for item in goals:
        verdict = "met" if item["met"] else "MISSED"
        print(f"goal {item['name']}: target {item['target']:g}, measured {item['measured']:.4g}: {verdict}")
    print(f"\nwritten {path}")


def save(figure, path: Path) -> None:
    """Write a plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def measured_before(path: Path, device: str | None) -> list[dict]:
    """The rows without an error that `path` holds, for a benchmark that goes on where it was ended.

    Raises:
        SystemExit: they come from another machine or other versions, and cannot be compared.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    now = machine(device)
    if any(result[key] != now[key] for key in now):
        raise SystemExit(
            f"{path} was measured on another machine or with other versions: start anew without --keep"
        )
    return [row for row in result["rows"] if "error" not in row]


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table of plain values; a row's missing cells stay empty."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, dict | list)))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{v:,.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
