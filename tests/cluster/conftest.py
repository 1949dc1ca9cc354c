"""A Ray on this machine for the tests that need one, and a small plan for all of them."""

import os
from pathlib import Path

import pytest

# Before anything imports ray, which reads these then.
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

from cluster_fakes import small_plan

from cluster.plan import Plan
from cluster.store import ResultStore


@pytest.fixture(scope="session")
def local_ray():
    """Two cores, as on the smallest machine; the object store is small, since the images are."""
    import ray

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the workers import the fakes
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(str(tmp_path / "results"), "r1")
