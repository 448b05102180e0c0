"""The form every benchmark's result takes: a table on the terminal and a JSON file."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

DIRECTORY = Path(__file__).parent / "results"


def machine() -> dict:
    """GPU name (or the processor's) and versions."""
    import deepspeed
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }
    return {"gpu": gpu, "versions": versions}


def goal(name: str, target: float, measured: float, *, at_least: bool) -> dict:
    """A goal judged from a measurement."""
    met = measured >= target if at_least else measured <= target
    return {"name": name, "target": target, "measured": measured, "met": met}


def report(name: str, rows: list[dict], goals: list[dict]) -> Path:
    """Print the table and write benchmarks/results/<name>.json; returns its path."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=DIRECTORY.parent)
    header = {
        "command": " ".join(["python", *sys.argv]),
        **machine(),
        "commit": commit.stdout.strip() or None,
        "date": date.today().isoformat(),
    }
    print(f"\n{header['gpu']}; " + ", ".join(f"{k} {v}" for k, v in header["versions"].items() if v))
    print(f"{header['command']}\n")
    print(table(rows))
    for item in goals:
        verdict = "met" if item["met"] else "MISSED"
        print(f"goal {item['name']}: target {item['target']:g}, measured {item['measured']:.4g}: {verdict}")
    path = DIRECTORY / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**header, "rows": rows, "goals": goals}, indent=1) + "\n")
    print(f"\nwritten {path}")
    return path


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table; a row's missing cells stay empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [f"{v:,.4g}" if isinstance(v, float) else str(v) for v in (row.get(c, "") for c in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
