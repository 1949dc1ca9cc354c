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


@pytest.fixture(scope="module")  # other modules run jobs, which start a Ray of their own
def ray_cluster():
    """One head of two cores, as on the smallest machine; the object store is small, since the images are. Tests may add
    nodes, and remove what they added."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # the workers import the fakes
    head = {"num_cpus": 2, "num_gpus": 0, "resources": {"head": 1}, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def local_ray(ray_cluster):
    """A Ray that is there."""


@pytest.fixture
def plan() -> Plan:
    return small_plan()


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(str(tmp_path / "results"), "r1")


@pytest.fixture(scope="session")
def s3_server():
    from s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The S3 endpoint with an empty bucket, as pods see it: all by the standard variables."""
    import fsspec

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3_server.failures.clear()
    filesystem = fsspec.filesystem("s3")
    filesystem.call_s3("create_bucket", Bucket="bucket")
    yield s3_server
    s3_server.failures.clear()
    filesystem.rm("bucket", recursive=True)
