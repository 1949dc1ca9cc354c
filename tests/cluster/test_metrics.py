"""The metrics of a run: the busy share, and what really comes out of a Ray node's endpoint."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.metrics import COUNTERS, GAUGES, HISTOGRAMS, BusyShare


def test_the_busy_share_follows_a_changing_pool():
    now = 0.0
    busy = BusyShare(lambda: now)
    now = 100.0
    assert busy.share() is None  # waiting for the first replica counts for nothing
    busy.resize(1)
    now = 110.0
    busy.busy(8.0)
    assert busy.share() == pytest.approx(0.8)
    busy.resize(3)
    now = 120.0
    busy.busy(12.0)
    assert busy.share() == pytest.approx(20 / 40)
    busy.resize(0)
    now = 1000.0
    assert busy.share() == pytest.approx(20 / 40)


@pytest.mark.slow  # a Ray of its own, with its metrics agent
def test_a_runs_metrics_come_out_of_the_nodes_endpoint(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    driver = Path(__file__).with_name("metrics_driver.py")
    path = f"{driver.parent}:{driver.parents[2]}"
    done = subprocess.run(
        [sys.executable, str(driver), str(port), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for name in COUNTERS:
        assert found[f"ray_{name}_total"] > 0
    for name in GAUGES:
        assert f"ray_{name}" in found
    for name in HISTOGRAMS:
        assert found[f"ray_{name}_count"] > 0
        assert found[f"ray_{name}_sum"] > 0
        assert f"ray_{name}_bucket" in found
    assert found["ray_bitflux_images_total"] == 40
    assert found["ray_bitflux_shards_total"] == 6
    assert found["ray_bitflux_quarantined_total"] == 2  # one poisoned seed, two variants
    assert found["ray_bitflux_replica_busy_seconds_total"] == pytest.approx(0.5 * 38)
