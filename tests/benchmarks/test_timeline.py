"""Lanes of a recorded step: what belongs where, how busy they are, the plot."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import timeline


def event(name: str, start: int, end: int, category: str = "kernel") -> dict:
    """Times in microseconds."""
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": end - start}


EVENTS = [
    event("Memcpy HtoD (Pinned -> Device)", 100, 300, "gpu_memcpy"),
    event("Memcpy DtoH (Device -> Pinned)", 200, 400, "gpu_memcpy"),
    event("Memcpy DtoD (Device -> Device)", 420, 430, "gpu_memcpy"),
    event("update_kernel", 250, 270),
    event("ncclDevKernel_AllGather", 500, 600),
    event("gemm", 260, 310),
    event("gemm", 305, 320),
    event("aten::mm", 0, 900, "cpu_op"),
    {"ph": "i", "name": "a mark", "ts": 0},
]


def test_what_a_gpu_does_goes_to_its_lane():
    lanes = timeline.spans(EVENTS)
    expected = {
        "copies up": [(0, 200)],
        "copies down": [(100, 300)],
        "collectives": [(400, 500)],
        "AdamW of experts": [(150, 170)],
        "other kernels": [(160, 220), (320, 330)],
    }
    assert {name: [(1e6 * a, 1e6 * b) for a, b in spans] for name, spans in lanes.items()} == {
        name: [(pytest.approx(a), pytest.approx(b)) for a, b in spans] for name, spans in expected.items()
    }
    busy = {name: round(1e6 * value) for name, value in timeline.busy(lanes).items()}
    assert busy["recorded_s"] == 500 and busy["nothing_s"] == 20 + 70
    assert busy["up_and_down_at_once_s"] == 100 and busy["copies_and_kernels_at_once_s"] == 70
    assert timeline.heaviest(EVENTS, 1) == [
        {"kernel": "ncclDevKernel_AllGather", "kernel_s": 1e-4, "launches": 1}
    ]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(sorted).map(tuple)))
def test_a_union_covers_the_same_without_overlaps(times):
    merged = timeline.union(times)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))
    covered = {second for start, end in times for second in range(start, end)}
    assert covered == {second for start, end in merged for second in range(start, end)}
    assert timeline.seconds(merged) == len(covered)


def test_plot(tmp_path):
    timeline.draw(timeline.spans(EVENTS), "a step", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
