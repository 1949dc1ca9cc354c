"""All tests compute on one thread, as every CPU actor does: sums split over threads differ in their last bits."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
