"""A run with metrics on a Ray of its own: python metrics_driver.py PORT FOLDER.

Prints what the node's endpoint says of it: each metric's name and the sum over its labels, as JSON.
"""

import json
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import ray
from cluster_fakes import Faults, finished_run, ray_workers, small_plan

from cluster.metrics import RayMetrics
from cluster.store import ResultStore

LAST = "ray_bitflux_shards_total"


def scrape(port: str) -> dict[str, float]:
    url = f"http://{ray.util.get_node_ip_address()}:{port}/metrics"
    found: dict[str, float] = defaultdict(float)
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("ray_bitflux_"):
                assert 'run_id="r1"' in line
                found[line.partition("{")[0]] += float(line.rpartition(" ")[2])
    return found


if __name__ == "__main__":
    port, folder = sys.argv[1:]
    ray.init(
        address="local",
        num_cpus=2,
        resources={"head": 1},  # where the stand-ins for encoder and evaluator want to be
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        _metrics_export_port=int(port),
        _system_config={"metrics_report_interval_ms": 1000},
    )
    plan, store = small_plan(), ResultStore(f"{folder}/results", "r1")
    poisoned = frozenset({plan.shards[0].samples[2].noise_seed})
    workers = ray_workers(Faults(Path(folder), raise_on=poisoned), store)
    finished_run(plan, store, workers=workers, replicas=1, observer=RayMetrics(store.run_id))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(1)
        try:
            found = scrape(port)
        except OSError:
            continue
        if found[LAST] == len(plan.shards):
            break
    print(json.dumps(found))
    ray.shutdown()
