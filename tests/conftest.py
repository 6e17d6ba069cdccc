"""What every test starts from: one thread, fixed seeds, no GPU test without a GPU."""

import os
import random
import signal

import hypothesis
import numpy as np
import pytest

from stacking_ds.process.runtime import let_waiting_threads_sleep

os.environ["TOKENIZERS_PARALLELISM"] = "false"
let_waiting_threads_sleep()

import torch  # noqa: E402 - its OpenMP reads the environment once

# how long an example takes is the machine's affair: another test may be using it
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # who starts the tests in the background, or with nohup, has these ignored, and what tests start
    # would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
