"""GPUs and networks to plan for: the table, and what may be asked."""

import pytest

from training.cluster import GPUS, Cluster, ClusterArguments, parse_interconnect
from training.config import UserError


@pytest.mark.parametrize(
    ("text", "gigabytes"), [("200Gb", 25), ("8x200Gb", 200), ("2.5Gb", 0.3125), ("16x400Gb", 800)]
)
def test_an_interconnect_is_in_bits_and_a_machine_may_have_several(text, gigabytes):
    assert parse_interconnect(text) == gigabytes * 1e9


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("200GB", "200Gb"), ("200", "200Gb"), ("8x200", "8x200Gb"), ("200 Gbit/s", "200Gb"), ("fast", "200Gb"),
        ("0Gb", "200Gb"), ("0x200Gb", "200Gb"), ("-100Gb", "100Gb"), ("1e3Gb", "1Gb"), ("", "200Gb"),
    ],
)  # fmt: skip
def test_a_malformed_interconnect_is_one_line_with_one_that_is_not(text, nearest):
    with pytest.raises(UserError) as error:
        parse_interconnect(text)
    assert str(error.value).endswith(f"did you mean {nearest}?") and "\n" not in str(error.value)
    parse_interconnect(nearest)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpu": "A100"}, ("--gpu must be one of", "did you mean a100-40?")),
        ({"gpu": "rtx4090"}, ("did you mean rtx-4090?",)),
        ({"gpus": 12}, ("--gpus 12", "use 8 or 16")),
        ({"gpus": 64}, ("--gpus 64 are 8 machines", "--interconnect")),
        ({"gpus": 64, "interconnect": "200"}, ("--interconnect 200", "did you mean 200Gb?")),
        ({"gpus": 2, "interconnect": "200"}, ("--interconnect 200",)),
        ({"gpus": 8, "interconnect": "200Gb"}, ("--interconnect 200Gb", "8 GPUs are one machine", "--gpus")),
    ],
)
def test_what_cannot_be_planned_for_is_one_line(settings, words):
    with pytest.raises(UserError) as error:
        ClusterArguments(**settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_machines_have_eight_gpus():
    cluster = ClusterArguments(gpus=64, gpu="h100", interconnect="8x400Gb").cluster
    assert (cluster.machines, cluster.gpus_here, cluster.network) == (8, 8, 400e9)
    cluster = ClusterArguments(gpus=3).cluster
    assert (cluster.machines, cluster.gpus_here, cluster.network) == (1, 3, 0)


@pytest.mark.parametrize("name", GPUS)
def test_the_table_is_complete(name):
    gpu = GPUS[name]
    assert 20e9 < gpu.memory < 200e9 and 50e12 < gpu.flops < 1e15
    assert gpu.pcie in (32e9, 64e9) and gpu.nvlink in (0, 300e9, 450e9)
    assert "NVIDIA" in gpu.source and f"{gpu.memory / 1e9:.0f} GB" in gpu.source


def test_rates_lie_within_what_was_measured_on_two_h200():
    """GiB/s of all-gather and all-to-all from 64 to 512 MiB; GB/s of PCIe both ways at once."""
    two, one = (Cluster(GPUS["h200"], gpus) for gpus in (2, 1))
    assert 211 < two.peer_rate / 2**30 < 252 and two.peer_rate / 2**30 == pytest.approx(235, rel=0.02)
    assert two.pcie_rate == pytest.approx(39e9, rel=0.02) and one.pcie_rate == pytest.approx(50e9, rel=0.02)
    without = Cluster(GPUS["rtx-4090"], 2)
    assert 0 < without.peer_rate < without.gpu.pcie
