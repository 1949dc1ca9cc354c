"""Scoring a complete run again with today's evaluators: the plan of it, made from what the run says of itself."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bitflux_core.errors import UserError
from cluster.manifests import REPOSITORY
from cluster.plan import Plan, build_plan
from cluster.profile import Profile, changed
from cluster.provenance import code_digest
from cluster.store import ResultStore
from cluster.workload import Workload


def complete_plan(store: ResultStore) -> dict[str, Any]:
    """The plan of a complete run, in plain values. UserError for a run that is not there or not complete."""
    manifest = store.manifest()
    if manifest is None:
        raise UserError(f"output {store.uri}: no complete run {store.run_id} there; finish it, or correct --run-id")
    return manifest["plan"]


def drawn_benchmark(store: ResultStore, workload: Workload) -> dict[str, Any]:
    """What a complete run says of a benchmark. UserError where it drew none of that name, or other prompts."""
    benchmarks = {each["name"]: each for each in complete_plan(store)["benchmarks"]}
    drawn = benchmarks.get(workload.name)
    if drawn is None:
        raise UserError(f"run {store.run_id} drew no benchmark '{workload.name}': choose from {', '.join(benchmarks)}")
    if drawn["source_digest"] != workload.digest:
        raise UserError(
            f"run {store.run_id} drew {workload.name} from prompt files of the digest {drawn['source_digest'][:16]}, "
            f"those here have {workload.digest[:16]}; name the run's own by --data-dir or the benchmark's file"
        )
    return drawn


def rescoring_plan(store: ResultStore, profile: Profile, workloads: Sequence[Workload]) -> Plan:
    """The samples of a complete run as a plan, which knows the fingerprints of its variants only.

    All that decides a sample's ids is the run's own; the profile says what scores, and on what. UserError where the
    workloads are not the run's.
    """
    drawn = complete_plan(store)
    indices: dict[str, set[int]] = {}
    for row in store.read_rows().select(["benchmark", "prompt_index"]).to_pylist():
        indices.setdefault(row["benchmark"], set()).add(row["prompt_index"])
    theirs = []
    for workload in workloads:
        about = drawn_benchmark(store, workload)
        theirs.append(
            replace(
                workload,
                prompts=tuple(prompt for prompt in workload.prompts if prompt.index in indices[workload.name]),
                images_per_prompt=about["images_per_prompt"],
                seed=about["seed"],
                seed_rule=about.get("seed_rule", "pair"),
                protocol=None,
            )
        )
    own = changed(profile, {key: drawn[key] for key in ("sampling", "dtype", "batch_size", "variants")})
    fingerprints = {variant: drawn["fingerprints"][variant] for variant in drawn["variants"]}
    plan = build_plan(own, theirs, drawn["variants"], fingerprints=fingerprints)
    return replace(plan, assumptions=(f"the images are those of run {store.run_id}", *drawn["assumptions"]))


def rescoring_run_id(plan: Plan, store: ResultStore) -> str:
    """A name for the run: the same as long as images, evaluators and code are."""
    parts = json.dumps([store.run_id, plan.digest, code_digest(REPOSITORY)])
    return f"{store.run_id}-rescored-{hashlib.sha256(parts.encode()).hexdigest()[:8]}"
