"""Where numbers of a run go: metrics.jsonl always, the terminal, TensorBoard, Weights & Biases, a PNG."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import Tensor


def router_load_metrics(load_LE: Tensor) -> dict[str, float]:
    """Busiest and idlest expert as multiples of the even share, and the coefficient of variation, over layers."""
    share_LE = load_LE / load_LE.mean(1, keepdim=True).clamp(min=1)
    return {
        "router/load_min": share_LE.min().item(),
        "router/load_max": share_LE.max().item(),
        "router/load_cv": share_LE.std(1, correction=0).mean().item(),
    }


def component_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means of what components report, from the sums of a step (see `StepResult`)."""
    suffix = " count"
    names = [name.removesuffix(suffix) for name in sums if name.endswith(suffix)]
    return {name: sums[name] / max(1.0, sums[name + suffix]) for name in names}


def validation_metrics(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The losses of `evaluate_loss` as validation/<family>/<name>."""
    counts = ("tokens", "samples")
    return {
        f"validation/{family}/{name}": value
        for family, row in results.items()
        for name, value in row.items()
        if name not in counts
    }


def validation_line(results: dict[str, dict[str, float]]) -> str:
    """The same for a person."""
    return "  ".join(
        f"{family} {row['loss']:.4f} (ppl {row['perplexity']:.4g}"
        + (f", choice gap {row['choice_gap']:+.3f})" if "choice_gap" in row else ")")
        for family, row in results.items()
    )


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Peak GPU memory since the start and this process's resident host memory, GB (1e9 bytes)."""
    metrics = {"memory/host_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        metrics["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        metrics["memory/gpu_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return metrics


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


class MetricsLog:
    """Writes of rank 0; on other ranks every method returns without effect."""

    def __init__(
        self, directory: Path, reporters: list[str], settings: dict, *, active: bool, resume_step: int
    ):
        self.active = active
        self.directory = directory
        self.started = time.monotonic()
        if not active:
            return
        self._drop_after(resume_step)
        self.file = open(directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.tensorboard = self.wandb = self.bar = None
        if "tensorboard" in reporters:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)
        if "wandb" in reporters:
            import wandb

            self.wandb = wandb.init(
                project="pragnosia", name=directory.name, id=directory.name, dir=str(directory), config=settings,
                resume="allow",
            )  # fmt: skip

    def _drop_after(self, step: int) -> None:
        """Forget lines that a resumed run will write again."""
        path = self.directory / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            kept = path.with_name(".tmp-metrics.jsonl")
            kept.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            kept.replace(path)

    def start_bar(self, done: int, total: int | None) -> None:
        """A live bar, on a terminal only."""
        if self.active and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """One step done."""
        if self.active and self.bar is not None:
            self.bar.update()

    def say(self, line: str) -> None:
        """One line for the person at the terminal."""
        if not self.active:
            return
        try:
            self.bar.write(line) if self.bar is not None else print(line, flush=True)
        except BrokenPipeError:  # `| head` has read enough; the run goes on, metrics.jsonl has everything
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """The metrics of `step` to every reporter."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flush and end every reporter."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.close()
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # the torn last line of a killed run


def draw_loss_curve(directory: Path) -> None:
    """loss.png from metrics.jsonl; nothing if no loss was logged."""
    rows = [
        json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    curves = {
        label: [(row["step"], row[key]) for row in rows if key in row]
        for label, key in (("training", "loss"), ("validation", "validation/overall/loss"))
    }
    if not any(curves.values()):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(
                *zip(*points, strict=True), marker="o" if len(points) < 30 else "", markersize=3, label=label
            )
    axes.set(xlabel="step", ylabel="loss (nats a target token)", title=directory.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(directory / "loss.png")


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
