"""Draws the benchmarks with each variant of a FLUX, scores every image and says what the variants lost.

The results are the checkpoint: the same command continues a run that was interrupted, and only reports one that is
complete. Exit code 0: complete, 2: bad input, 3: incomplete; verdict.json beside the results says the same, and why.
"""

import contextlib
import json
import sys
from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.plan import Plan, build_plan
from cluster.profile import Profile
from cluster.store import ResultStore
from evaluators.modes import MODES
from jobs import _ray
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, INCOMPLETE, Parser, console_on, exit_code_of, names, positive, run_id
from jobs._fidelity_report import fidelity_document, fidelity_of, print_fidelity
from jobs._inputs import check_variants, chosen_profile, chosen_workloads, located
from jobs._model_report import check_models
from jobs._plan_cost import measured_seconds, plan_costs
from jobs._plan_report import print_plan
from jobs._progress import ProgressReport
from jobs._report import counts, document, print_report, scores_of
from jobs._verdict import Verdict

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles
    from cluster.run import RunSummary


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    add = parser.add_argument
    add("--profile", default="mini", help="mini, flux-dev or the path of a profile (%(default)s)")
    add("--benchmarks", type=names, metavar="A,B", help="names, or paths of workload files (the profile's)")
    add("--variants", type=names, metavar="A,B", help="bf16, ternary, ternary-int8, ternary-reference (the profile's)")
    add("--mode", choices=MODES, help="how T2I-CompBench is judged (the profile's)")
    add("--limit", type=positive, metavar="N", help="prompts a tag (the profile's)")
    add("--images-per-prompt", type=positive, metavar="N", help="images a prompt (the profile's)")
    add("--output", metavar="URI", help=f"where the results go (./{DEFAULT_OUTPUT}; required in a Ray job)")
    add("--run-id", type=run_id, metavar="ID", help="name of the run (the digest of its plan)")
    add("--fresh", action="store_true", help="start a new run, whatever is there")
    add("--replicas", type=positive, metavar="N", help="replicas of the model (as many as the machines hold)")
    add("--data-dir", type=Path, metavar="DIR", help="benchmarks' prompt files, for machines without internet")
    add("--check-models", action="store_true", help="say which models the run needs and how to get them, and stop")
    add("--dry-run", action="store_true", help="print the plan and stop; needs no weights")
    add("--measured", type=Path, metavar="FILE", help="what --dry-run counts with: a table of bench.py images")
    add("--json", action="store_true", help="the verdict on standard output, all else on standard error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _evaluate(parse(argv)))


def _evaluate(args: Namespace) -> int:
    _ray.prepare()
    console = console_on(sys.stderr if args.json else sys.stdout)
    if args.dry_run:
        profile, plan = _planned(args)
        costs = plan_costs(plan, profile, measured_seconds(args.measured, plan.sampling) if args.measured else {})
        hours = "GPU-hours" if profile.resources.needs_gpu else "hours of one device"
        print_plan(console, plan, costs, hours=hours, as_json=args.json)
        return COMPLETE
    if args.check_models:
        return check_models(console, chosen_profile(args))
    if args.measured:
        raise UserError("--measured tells --dry-run what to count with: give both or neither")
    # Before anything else can go wrong: an earlier job's verdict must not stand for this one.
    from cluster.output import check_output

    with Verdict(check_output(_asked(args), [], _ray.in_submitted_job())) as verdict:
        profile, plan = _planned(args)
        # Whatever a library prints must not land in the JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            plan, store, summary = _draw(args, profile, plan, verdict)
            if not summary.complete:
                verdict.end(
                    INCOMPLETE, summary.reason, counts(summary)
                )  # a stopped job may be killed before the scores
            scores = scores_of(plan, store)
        print_report(console, plan, store, summary, scores)
        fidelity = fidelity_of(plan, store) if summary.complete else []
        print_fidelity(console, fidelity)
        exit_code = COMPLETE if summary.complete else INCOMPLETE
        answer = verdict.end(exit_code, summary.reason, document(summary, scores) | fidelity_document(fidelity))
        if args.json:
            print(json.dumps(answer, indent=2))
        return exit_code


def _planned(args: Namespace) -> tuple[Profile, Plan]:
    """What is to be drawn. The plan knows no models yet."""
    profile = chosen_profile(args)
    workloads = chosen_workloads(profile, args.data_dir)
    check_variants(profile.variants)
    return profile, build_plan(profile, workloads, profile.variants, profile.limit, profile.images_per_prompt)


def _draw(args: Namespace, profile: Profile, plan: Plan, verdict: Verdict) -> tuple[Plan, ResultStore, "RunSummary"]:
    """Draws and scores what the store lacks; the plan that comes back knows the models' fingerprints."""
    # Importing torch takes longest: only after what can be refused without it.
    from cluster.metrics import RayMetrics
    from cluster.output import alive_nodes, check_output
    from cluster.run import run

    models, fingerprints = located(profile, plan, profile.variants)
    plan = replace(plan, fingerprints=fingerprints)
    submitted = _ray.in_submitted_job()
    store = ResultStore(check_output(_asked(args), [], submitted), _run_id(args, plan))
    if args.fresh and store.plan_digest():
        raise UserError(f"run {store.run_id} exists and --fresh replaces nothing; leave out --fresh or --run-id")
    store.open(plan)
    verdict.begin(store)
    complete = store.manifest() is not None  # then it is only read
    with contextlib.nullcontext() if complete else _ray.connected():
        if not complete:
            check_output(_asked(args), alive_nodes(), submitted)
        with ProgressReport(console_on(sys.stderr)) as progress:
            observer = None if complete else RayMetrics(store.run_id)
            summary = run(plan, profile, models, store, replicas=args.replicas, progress=progress, observer=observer)
        if summary.complete:
            _compare_images(plan, profile, models, store, connected=not complete)
    return plan, store, summary


def _compare_images(plan: Plan, profile: Profile, models: "ModelFiles", store: ResultStore, connected: bool) -> None:
    """Compares the images that have not been compared with their full-precision twins."""
    from cluster.fidelity import measure_fidelity, unmeasured

    if missing := unmeasured(plan, store):
        clip = models.scoring.get("clip") or models.scoring.get("clip_score")
        with contextlib.nullcontext() if connected else _ray.connected():
            measure_fidelity(plan, missing, profile, Path(clip) if clip else None, store)


def _asked(args: Namespace) -> str:
    return DEFAULT_OUTPUT if args.output is None else args.output


def _run_id(args: Namespace, plan: Plan) -> str:
    if args.run_id:
        return args.run_id
    return f"{plan.run_id}-{datetime.now(UTC):%Y%m%dT%H%M%S}" if args.fresh else str(plan.run_id)


if __name__ == "__main__":
    sys.exit(main())
