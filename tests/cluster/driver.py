"""A run in a process of its own, for tests that end it: python driver.py RAY_ADDRESS FOLDER."""

import sys
from pathlib import Path

import ray
from cluster_fakes import PROFILE, Faults, ray_workers, small_plan

from cluster.run import run
from cluster.store import ResultStore

if __name__ == "__main__":
    address, folder = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    store = ResultStore(f"{folder}/results", "r1")
    workers = ray_workers(Faults(Path(folder), seconds=0.1), store)
    summary = run(small_plan(), PROFILE, None, store, workers=workers, replicas=1)
    print(summary.complete, summary.reason)
