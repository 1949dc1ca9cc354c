"""What the jobs that score share: a run with its progress, its report, its verdict and its exit code."""

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.plan import Plan
from cluster.profile import Profile
from cluster.store import ResultStore
from jobs import _ray
from jobs._cli import COMPLETE, INCOMPLETE, console_on, output_of
from jobs._fidelity_report import fidelity_document, fidelity_of, print_fidelity
from jobs._progress import ProgressReport
from jobs._report import counts, document, print_report, scores_of
from jobs._verdict import Verdict

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles
    from cluster.run import RunSummary
    from cluster.workers import Workers


@dataclass(frozen=True)
class Prepared:
    """A run that is checked and may begin. `plan` knows its models; `workers` makes the actors, once Ray is there,
    where they are not those that hold the models of `files`."""

    profile: Profile
    plan: Plan
    store: ResultStore
    replicas: int | None
    files: "ModelFiles | None" = None
    workers: "Callable[[], Workers] | None" = None


def run_and_report(args: Namespace, prepare: Callable[[str], Prepared]) -> int:
    """Runs what `prepare` makes for an output, prints the report and returns the exit code.

    `args` has the options `output` and `json`.
    """
    # Before anything else can go wrong: an earlier job's verdict must not stand for this one.
    from cluster.output import check_output

    output = check_output(output_of(args), [], _ray.in_submitted_job())
    with Verdict(output) as verdict:
        # Whatever a library prints must not land in the JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            prepared = prepare(output)
            plan, store = prepared.plan, prepared.store
            summary = _run(args, prepared, verdict)
            if not summary.complete:
                verdict.end(
                    INCOMPLETE, summary.reason, counts(summary)
                )  # a stopped job may be killed before the scores
            scores = scores_of(plan, store)
            fidelity = fidelity_of(plan, store) if summary.complete else []
        console = console_on(sys.stderr if args.json else sys.stdout)
        print_fidelity(console, fidelity)
        print_report(console, plan, store, summary, scores)
        exit_code = COMPLETE if summary.complete else INCOMPLETE
        answer = verdict.end(exit_code, summary.reason, document(summary, scores) | fidelity_document(fidelity))
        if args.json:
            print(json.dumps(answer, indent=2))
        return exit_code


def _run(args: Namespace, prepared: Prepared, verdict: Verdict) -> "RunSummary":
    """Draws and scores what the store lacks."""
    from cluster.fidelity import unmeasured
    from cluster.metrics import RayMetrics
    from cluster.output import alive_nodes, check_output
    from cluster.run import run

    plan, store = prepared.plan, prepared.store
    store.open(plan)
    verdict.begin(store)
    complete = store.manifest() is not None  # then it is only read
    uncompared = unmeasured(plan, store) if complete else []
    with contextlib.nullcontext() if complete and not uncompared else _ray.connected():
        if not complete:
            check_output(output_of(args), alive_nodes(), _ray.in_submitted_job())
        workers = prepared.workers() if prepared.workers and not complete else None
        with ProgressReport(console_on(sys.stderr)) as progress:
            summary = run(
                plan,
                prepared.profile,
                prepared.files,
                store,
                replicas=prepared.replicas,
                progress=progress,
                workers=workers,
                observer=None if complete else RayMetrics(store.run_id),
            )
        if summary.complete:
            _compare_images(prepared)
    return summary


def _compare_images(prepared: Prepared) -> None:
    """Compares the images that have not been compared with their full-precision twins."""
    from cluster.fidelity import measure_fidelity, unmeasured

    plan, store = prepared.plan, prepared.store
    if missing := unmeasured(plan, store):
        models = prepared.files.scoring if prepared.files else {}
        clip = models.get("clip") or models.get("clip_score")
        measure_fidelity(plan, missing, prepared.profile, Path(clip) if clip else None, store)
