"""Growth of GPU memory with the number of experts: goals, plot, command."""

import json

import pytest

from benchmarks.constant_vram import draw, growth_goals, preset_goals


def row(experts, allocated, **more):
    sizes = {"model_size": "3B", "placement": "streamed", "batch_size": 1, "max_length": 512}
    return {**sizes, "experts": experts, "experts_gb": experts / 2, "gpu_allocated_gb": allocated, **more}


def test_growth_is_from_the_fewest_to_the_most_experts():
    failed = {"model_size": "3B", "error": "out of memory"}
    rows = [row(128, 1.03), row(8, 1.0), row(32, 1.5), failed]
    (judged,) = growth_goals(rows)
    assert judged["measured"] == pytest.approx(0.03) and not judged["met"]
    assert growth_goals([row(8, 1.0), row(128, 1.019)])[0]["met"]
    assert growth_goals([row(8, 1.0), failed]) == []


def test_presets_are_judged_by_gpu_and_host_memory():
    rows = [
        row(32, 0.6),
        row(96, 2.0, model_size="13B", host_rss_gb=50, state="int8"),
        row(96, 1.4, model_size="13B", host_rss_gb=90, state="bf16"),
    ]
    goals = preset_goals([*rows, {"model_size": "7B", "error": "out of memory"}])
    assert [(g["measured"], g["met"]) for g in goals] == [(0.6, True), (1.4, True), (50, True)]


def test_plot_shows_what_was_measured(tmp_path):
    rows = [row(32, 1.01), row(8, 1.0), {"model_size": "3B", "error": "out of memory"}]
    figure = draw(rows, "a GPU", tmp_path / "images" / "plot.png")
    (axes,) = figure.axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[8, 32], [8, 32]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[4, 16], [1.0, 1.01]]
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "GB"
    assert "3B" in axes.get_title() and "a GPU" in axes.get_title()
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name", "experts", "state"),
    [
        (("--model-size", "tiny", "--num-experts", "16", "8"), "constant_vram", [8, 16], "fp32"),
        (("--presets", "tiny", "--expert-state", "int8"), "presets_vram", [8], "int8"),
    ],
)
def test_command(tmp_path, bench, flags, name, experts, state):
    load = ("--device", "cpu", "--steps", "1", "--max-length", "16")
    bench("constant_vram", *flags, *load, "--output", ".", "--plot", "plot.png")
    rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
    assert [(row.get("error"), row["experts"], row["state"]) for row in rows] == [
        (None, number, state) for number in experts
    ]
    assert rows[-1]["experts_gb"] == pytest.approx(experts[-1] / experts[0] * rows[0]["experts_gb"])
    assert not (tmp_path / "plot.png").exists()  # no GPU memory to draw
