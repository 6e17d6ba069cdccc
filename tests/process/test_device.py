"""What this process's device gives, as far as a machine without a GPU can say."""

import torch

from stacking_ds.process.device import measure_matmul_peak, peak_memory_gib


def test_the_yardstick_is_positive() -> None:
    assert measure_matmul_peak(torch.device("cpu"), torch.float32) > 1e8
    assert peak_memory_gib(torch.device("cpu")) > 0.01
