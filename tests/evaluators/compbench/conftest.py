"""What the tests of T2I-CompBench's rules share."""

import numpy as np
import pytest
from compbench_fakes import Words


@pytest.fixture
def image():
    """An image of the frame's own size: its pixels are the frame's."""
    return np.zeros((479, 479, 3), np.uint8)


@pytest.fixture
def words():
    return Words
