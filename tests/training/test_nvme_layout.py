"""Offload of pages and optimizer to a disk trains as one plain rank does. A file of its own: it comes first."""

import pytest

from tests.training.test_layouts import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    PAGED,
    SHORT,
    SHORT_REFERENCE,
    WEIGHT_TOLERANCE,
    assert_close,
    compile_operations,
    run_worker,
)


@pytest.mark.slow
@pytest.mark.libaio
@pytest.mark.timeout(1500)  # the asynchronous reader and writer compile for minutes, once
def test_offload_to_nvme(tmp_path):
    compile_operations("CPUAdamBuilder", "AsyncIOBuilder")
    reference = SHORT[SHORT_REFERENCE]
    layout = {**PAGED, "offload": str(tmp_path), "page_size": 2, "steps": reference["steps"]}
    expected, found = run_worker([reference, layout], 1, tmp_path)
    assert_close(found["gradients"], expected["gradients"], GRADIENT_TOLERANCE)
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    assert_close(found["weights"], expected["weights"], WEIGHT_TOLERANCE)
