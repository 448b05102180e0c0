"""The form every benchmark's result takes: a table on the terminal and a JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORY = REPOSITORY / "benchmarks" / "results"


def machine(device: str | None) -> dict:
    """Name of the GPU, or of the processor where `device` is cpu or there is no GPU, and versions."""
    import deepspeed
    import torch
    import transformers

    on_gpu = device != "cpu" and torch.cuda.is_available()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
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


def report(path: Path, rows: list[dict], goals: list[dict], device: str | None) -> None:
    """Print the table and write it as JSON to `path`."""
    header = {
        "command": " ".join(["python", *sys.argv]),
        **machine(device),
        "commit": commit(),
        "date": date.today().isoformat(),
    }
    print(f"\n{header['gpu']}; " + ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v))
    print(f"{header['command']}\n")
    print(table(rows))
    for item in goals:
        verdict = "met" if item["met"] else "MISSED"
        print(f"goal {item['name']}: target {item['target']:g}, measured {item['measured']:.4g}: {verdict}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**header, "rows": rows, "goals": goals}, indent=1) + "\n")
    print(f"\nwritten {path}")


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; a row's missing cells stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{v:,.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
