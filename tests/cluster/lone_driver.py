"""A run over fake actors in a process of its own, for tests that kill it: python lone_driver.py URI FOLDER SECONDS."""

import sys
from pathlib import Path

from cluster_fakes import PROFILE, Faults, fake_workers, small_plan

from cluster import actor_slot
from cluster.run import run
from cluster.store import ResultStore

if __name__ == "__main__":
    uri, folder, seconds = sys.argv[1:]
    actor_slot.ray.kill = lambda actor: actor.kill()  # type: ignore[attr-defined]
    store = ResultStore(uri, "r1")
    workers = fake_workers(Faults(Path(folder), seconds=float(seconds)), store)
    summary = run(small_plan(), PROFILE, None, store, workers=workers, replicas=1)
    print(summary.complete, summary.reason)
