"""Exchanges images with the benchmarks' own harnesses: writes a run's in their layouts, scores images made elsewhere.

`score` and `rescore` draw nothing. They end as eval_all.py does: the same results, report, verdict.json and exit codes
(0: complete, 2: bad input, 3: incomplete), and the same command continues an interrupted run.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import Progress

from bitflux_core.errors import UserError
from cluster.image_layouts import CompBenchLayout, GenEvalLayout, ImageLayout
from cluster.plan import Plan
from cluster.profile import changed
from cluster.store import ResultStore
from cluster.workload import Workload, load_workloads
from evaluators.modes import MODES
from jobs import _ray
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, Parser, console_on, exit_code_of, names, output_of, positive, run_id
from jobs._inputs import chosen_profile, chosen_workloads, located_evaluators
from jobs._run import Prepared, run_and_report

if TYPE_CHECKING:
    from cluster.workers import Workers

LAYOUTS = ("geneval", "t2i-compbench")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    commands = parser.add_subparsers(dest="command", required=True, metavar="export|score|rescore")
    export = commands.add_parser("export", help="write a complete run's images and scores in an official layout")
    score = commands.add_parser("score", help="score a folder of images that were made elsewhere")
    rescore = commands.add_parser("rescore", help="score a complete run's images again, as a new run")
    for command in (export, score):
        command.add_argument("--layout", required=True, choices=LAYOUTS, help="whose layout the folder has")
    for command in (export, rescore):
        command.add_argument("--run-id", type=run_id, required=True, metavar="ID", help="the complete run")

    export.add_argument("--to", required=True, metavar="DIR", help="an empty or new folder, or a URI")
    export.add_argument("--variant", metavar="NAME", help="whose images (the run's only one)")
    export.add_argument("--benchmark", metavar="NAME", help="a name, or the path of its file (the run's only one)")

    score.add_argument("--from", dest="folder", required=True, metavar="DIR", help="the folder of images, or a URI")
    score.add_argument("--benchmark", required=True, metavar="NAME", help="a name, or the path of a workload file")
    score.add_argument("--variant", type=run_id, default="imported", help="what results call the images (%(default)s)")
    score.add_argument("--limit", type=positive, metavar="N", help="prompts a tag (the profile's)")
    score.add_argument("--images-per-prompt", type=positive, metavar="N", help="images a prompt (the profile's)")
    score.add_argument("--run-id", type=run_id, metavar="ID", help="name of the run (the digest of its plan)")

    score.add_argument(
        "--their-scores", action="store_true", help="those of the folder's result files; no evaluator runs"
    )

    rescore.add_argument("--benchmarks", type=names, metavar="A,B", help="names, or paths of their files (the run's)")
    rescore.add_argument("--new-run-id", type=run_id, metavar="ID", help="name of the new run (made from the old one)")

    for command in (score, rescore):
        command.add_argument("--profile", default="mini", help="whose evaluators score: a name or path (%(default)s)")
        command.add_argument("--mode", choices=MODES, help="how T2I-CompBench is judged (the profile's)")
    for command in (export, score, rescore):
        _add_common(command)
    return parser.parse_args(argv)


def _add_common(command: ArgumentParser) -> None:
    command.add_argument("--output", metavar="URI", help=f"where runs lie (./{DEFAULT_OUTPUT}; required in a Ray job)")
    command.add_argument("--data-dir", type=Path, metavar="DIR", help="prompt files, for machines without internet")
    command.add_argument(
        "--json", action="store_true", help="the result on standard output, all else on standard error"
    )


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _images(parse(argv)))


def _images(args: Namespace) -> int:
    _ray.prepare()
    if args.command == "export":
        return _export(args)
    prepare = _prepared_folder if args.command == "score" else _prepared_run
    return run_and_report(args, lambda output: prepare(args, output))


def _export(args: Namespace) -> int:
    from cluster.exported_images import planned_export, write_export
    from cluster.rescoring import complete_plan

    store = ResultStore(output_of(args), args.run_id)
    plan = complete_plan(store)
    variant = _chosen("variant", args.variant, plan["variants"])
    name = args.benchmark or _chosen("benchmark", None, [benchmark["name"] for benchmark in plan["benchmarks"]])
    export = planned_export(store, _only(load_workloads([name], args.data_dir), name), variant, args.layout)
    with Progress(console=console_on(sys.stderr), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("images", total=len(export.names))
        write_export(export, store, args.to, lambda: progress.advance(task))
    answer = {
        "folder": args.to,
        "layout": args.layout,
        "run_id": store.run_id,
        "variant": variant,
        "n_expected": export.n_expected,
        "n_images": len(export.names),
        "n_scored": export.n_scored,
    }
    if args.json:
        print(json.dumps(answer, indent=2))
    console = console_on(sys.stderr if args.json else sys.stdout)
    counts = f"{len(export.names)} images and {export.n_scored} scores of {export.n_expected} {variant} samples"
    console.print(escape(f"{args.to}: {counts}"), soft_wrap=True)
    return COMPLETE


def _prepared_folder(args: Namespace, output: str) -> Prepared:
    profile = changed(chosen_profile(args), {"benchmarks": (args.benchmark,)})
    workload = _only(chosen_workloads(profile, args.data_dir), args.benchmark)
    # Importing ray takes longest: only after what can be refused without it.
    from cluster.imported_images import ImageFolder, ImportedReplica, check_seen, find_images, import_plan
    from cluster.imported_results import RecordedEvaluator, read_results
    from cluster.output import alive_nodes
    from cluster.pool_size import HELPER_CPUS
    from cluster.stored_images import reading_workers
    from cluster.workers import actor_class, evaluator_actors

    plan = import_plan(profile, workload, args.variant, profile.limit, profile.images_per_prompt)
    folder = ImageFolder(args.folder)
    images = find_images(folder, _layout(args.layout, workload, plan), plan)
    if args.their_scores:
        recorded = read_results(folder, args.layout, images.found)
        scoring = {"results": recorded.fingerprint}
    else:
        models, scoring = located_evaluators(profile, plan)
    if args.variant in scoring:
        raise UserError(f"--variant {args.variant} is what the results call a model; choose another name")
    plan = replace(plan, fingerprints={**scoring, args.variant: images.fingerprint})
    if images.left_over:
        note = f"{images.left_over:,} image files of {folder.uri} are not in the plan and were not scored"
        plan = replace(plan, assumptions=(*plan.assumptions, note))
    store = ResultStore(output, args.run_id or str(plan.run_id))

    def workers() -> "Workers":
        check_seen(folder, alive_nodes())
        if args.their_scores:
            reader = actor_class(RecordedEvaluator, HELPER_CPUS)
            return reading_workers(ImportedReplica, images, lambda: reader.remote(workload.name, recorded, store), 1)
        evaluator = evaluator_actors(plan, profile, models, store)
        return reading_workers(ImportedReplica, images, evaluator, profile.resources.evaluators)

    return Prepared(profile, plan, store, profile.resources.evaluators, workers=workers)


def _prepared_run(args: Namespace, output: str) -> Prepared:
    source = ResultStore(output, args.run_id)
    # Importing ray takes longest: only after what can be refused without it.
    from cluster.rescoring import complete_plan, rescoring_plan, rescoring_run_id
    from cluster.stored_images import StoredReplica, reading_workers, stored_images
    from cluster.workers import evaluator_actors

    drawn = [benchmark["name"] for benchmark in complete_plan(source)["benchmarks"]]
    profile = changed(chosen_profile(args), {"benchmarks": args.benchmarks or drawn})
    plan = rescoring_plan(source, profile, chosen_workloads(profile, args.data_dir))
    models, scoring = located_evaluators(profile, plan)
    plan = replace(plan, fingerprints={**scoring, **(plan.fingerprints or {})})
    try:
        images = stored_images(source, plan)
    except LookupError as error:
        raise UserError(f"{error}: there is nothing to score") from error
    new = args.new_run_id or rescoring_run_id(plan, source)
    if new == source.run_id:
        raise UserError(f"--new-run-id {new} is the run itself; give the new one another name, or none")
    store = ResultStore(output, new)

    def workers() -> "Workers":
        evaluator = evaluator_actors(plan, profile, models, store)
        return reading_workers(StoredReplica, images, evaluator, profile.resources.evaluators)

    return Prepared(profile, plan, store, profile.resources.evaluators, workers=workers)


def _layout(name: str, workload: Workload, plan: Plan) -> ImageLayout:
    if name == "geneval":
        return GenEvalLayout(workload.prompts)
    planned = plan.workloads[workload.name].images_per_prompt
    return CompBenchLayout(workload.prompts, [planned, workload.images_per_prompt])


def _only(workloads: Sequence[Workload], name: str) -> Workload:
    if len(workloads) > 1:
        members = ", ".join(workload.name for workload in workloads)
        raise UserError(f"--benchmark {name} stands for {members}: name one of them")
    return workloads[0]


def _chosen(what: str, name: str | None, known: Iterable[str]) -> str:
    """The one that was named, or the only one."""
    known = list(known)
    if name is None and len(known) == 1:
        return known[0]
    if name not in known:
        raise UserError(f"choose one with --{what}: the run has {', '.join(known)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
