"""Draws the benchmarks with each variant of a FLUX, scores every image and says what the variants lost.

The results are the checkpoint: the same command continues a run that was interrupted, and only reports one that is
complete. Exit code 0: complete, 2: bad input, 3: incomplete; verdict.json beside the results says the same, and why.
"""

import sys
from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bitflux_core.errors import UserError
from cluster.plan import Plan, build_plan
from cluster.profile import Profile
from cluster.store import ResultStore
from evaluators.modes import MODES, check_loadable
from jobs import _ray
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, Parser, console_on, exit_code_of, names, positive, run_id
from jobs._inputs import check_variants, chosen_profile, chosen_workloads, located
from jobs._model_report import check_models
from jobs._plan_cost import measured_seconds, plan_costs
from jobs._plan_report import print_plan
from jobs._run import Prepared, run_and_report


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
    return run_and_report(args, lambda output: _prepared(args, output))


def _planned(args: Namespace) -> tuple[Profile, Plan]:
    """What is to be drawn. The plan knows no models yet."""
    profile = chosen_profile(args)
    workloads = chosen_workloads(profile, args.data_dir)
    check_variants(profile.variants)
    for workload in workloads:
        check_loadable(workload.evaluator)
    return profile, build_plan(profile, workloads, profile.variants, profile.limit, profile.images_per_prompt)


def _prepared(args: Namespace, output: str) -> Prepared:
    profile, plan = _planned(args)
    files, fingerprints = located(profile, plan, profile.variants)
    plan = replace(plan, fingerprints=fingerprints)
    store = ResultStore(output, _run_id(args, plan))
    if args.fresh and store.plan_digest():
        raise UserError(f"run {store.run_id} exists and --fresh replaces nothing; leave out --fresh or --run-id")
    return Prepared(profile, plan, store, args.replicas, files)


def _run_id(args: Namespace, plan: Plan) -> str:
    if args.run_id:
        return args.run_id
    return f"{plan.run_id}-{datetime.now(UTC):%Y%m%dT%H%M%S}" if args.fresh else str(plan.run_id)


if __name__ == "__main__":
    sys.exit(main())
