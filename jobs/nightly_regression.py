"""Draws the ternary variants anew and says whether they got worse since the last accepted night.

Compares tonight's images with full precision's (drawn once, then only a few again) and with the accepted night's, by
the gates in manifests/gates. Exit code 0: pass, 1: regression, 2: bad input, 3: incomplete, or too little drawn to
decide.
"""

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitflux_core.errors import UserError
from cluster.plan import Plan
from cluster.profile import Profile
from cluster.store import ResultStore
from jobs import _ray
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, Parser, console_on, exit_code_of, names, output_of, positive, run_id
from jobs._inputs import check_variants, chosen_profile, chosen_workloads, located
from jobs._progress import ProgressReport

if TYPE_CHECKING:
    from cluster.night_files import NightFiles
    from cluster.run import RunSummary
    from cluster.stored_images import StoredImages

BASELINE = "bf16"
TONIGHT = ""  # --accept without a value
SHOWN_PAIRS = 10  # in the terminal; the report has more


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    add = parser.add_argument
    add("--profile", default="mini", help="mini, flux-dev or the path of a profile (%(default)s)")
    add("--benchmarks", type=names, metavar="A,B", help="names, or paths of workload files (the profile's)")
    add("--variants", type=names, metavar="A,B", help="ternary, ternary-int8, ternary-reference (the profile's)")
    add("--limit", type=positive, metavar="N", help="prompts a tag (the profile's)")
    add("--images-per-prompt", type=positive, metavar="N", help="images a prompt (the profile's)")
    add("--output", metavar="URI", help=f"where nights lie (./{DEFAULT_OUTPUT}; required in a Ray job)")
    add("--gates", help="an embedded gates file or the path of one (that of the profile's name)")
    add("--night", type=run_id, metavar="ID", help="continue this night, or name a new one so (the time, in UTC)")
    add(
        "--accept",
        nargs="?",
        const=TONIGHT,
        metavar="NIGHT",
        help="later nights compare with tonight, if it passes; or with this finished night, drawing nothing",
    )
    add("--replicas", type=positive, metavar="N", help="replicas of the model (as many as the machines hold)")
    add("--data-dir", type=Path, metavar="DIR", help="benchmarks' prompt files, for machines without internet")
    add("--self-test", action="store_true", help="a night drawn twice must pass, one of a damaged model must not")
    add("--json", action="store_true", help="the verdict on standard output, all else on standard error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _nightly(parse(argv)))


def _nightly(args: Namespace) -> int:
    _ray.prepare()
    console = console_on(sys.stderr if args.json else sys.stdout)
    if args.self_test and (args.accept is not None or args.night):
        raise UserError("--self-test names and accepts its own nights; leave out --accept and --night")
    if args.accept and args.night:
        raise UserError("--accept NIGHT draws nothing; leave out --night")
    if args.accept:
        return _accept(console, _files(_output(args)), args.accept)
    # Whatever a library prints must not land in the JSON document.
    with contextlib.redirect_stdout(sys.stderr):
        profile = chosen_profile(args)
        check_variants(profile.variants)
        job = _self_test if args.self_test else _night
        answer = job(args, console, profile)
    if args.json:
        print(json.dumps(answer, indent=2))
    return answer["exit_code"]


def _night(args: Namespace, console: Console, profile: Profile) -> dict[str, Any]:
    output, name = _output(args), args.night or f"nightly-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    files = _files(output)
    verdict = files.verdict(name) if args.night else None
    if verdict is None or verdict["verdict"] == "incomplete":
        prepared = _Prepared(args, profile)
        with _ray_over(args):
            verdict = prepared.night(files, name, prepared.profile)
    _print_verdict(console, verdict, files)
    if args.accept == TONIGHT and verdict["verdict"] == "pass":
        _accept(console, files, name)
    elif verdict["verdict"] == "incomplete":
        console.print(f"--night {name} continues it")
    elif verdict["accepted"] is None or args.accept == TONIGHT:
        console.print(f"--accept {name} records this night as the one that later nights compare with")
    return verdict


def _self_test(args: Namespace, console: Console, profile: Profile) -> dict[str, Any]:
    from cluster.self_test import self_test

    folder = f"{_output(args).rstrip('/')}/self-test-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    if "://" in folder:
        raise UserError(f"output {args.output}: --self-test writes a checkpoint; give it a path that every node sees")
    prepared = _Prepared(args, profile)
    files = _files(folder)

    def night(name: str, ternary: Path | None) -> dict[str, Any]:
        models = profile.models.model_copy(update={"ternary": str(ternary)} if ternary else {})
        verdict = prepared.night(files, name, profile.model_copy(update={"models": models}))
        _print_verdict(console, verdict, files)
        return verdict

    with _ray_over(args):
        result = self_test(night, files.accept, prepared.ternary, Path(folder))
    console.print(f"self-test: {result.message}\nself-test: {'as it must be' if not result.exit_code else 'FAILED'}")
    return {"exit_code": result.exit_code, "message": result.message, "nights": list(result.nights), "results": folder}


class _Prepared:
    """All that is checked before anything is drawn: gates, plans, models."""

    def __init__(self, args: Namespace, profile: Profile) -> None:
        from cluster.nightly import load_gates, night_plans

        self.profile, self._replicas = profile, args.replicas
        self._workloads = chosen_workloads(profile, args.data_dir)
        variants = tuple(variant for variant in profile.variants if variant != BASELINE)
        if not variants:
            raise UserError("no ternary variant to test: name one with --variants")
        self._plans = night_plans(profile, self._workloads, variants)
        self._gates = load_gates(_gates_of(args, profile), self._plans.baseline)
        self._variants = (BASELINE, *variants)
        files, _ = located(profile, self._plans.baseline, self._variants)
        assert files.ternary is not None  # a ternary variant runs
        self.ternary = files.ternary

    def night(self, files: "NightFiles", name: str, profile: Profile) -> dict[str, Any]:
        """Draws, judges and writes a night of `profile`, which may name other models than the prepared one."""
        from cluster.metrics import RayMetrics
        from cluster.night_report import write_night
        from cluster.nightly import run_night
        from cluster.run import run
        from cluster.stored_images import with_stored_images
        from cluster.workers import model_workers

        models, fingerprints = located(profile, self._plans.baseline, self._variants)

        def draw(plan: Plan, store: ResultStore, stored: "StoredImages | None") -> "RunSummary":
            workers = with_stored_images(model_workers(plan, profile, models, store), stored) if stored else None
            with ProgressReport(console_on(sys.stderr)) as progress:
                return run(
                    plan,
                    profile,
                    models,
                    store,
                    replicas=self._replicas,
                    progress=progress,
                    workers=workers,
                    observer=RayMetrics(store.run_id),
                )

        plans = self._plans.with_canary(profile, self._workloads, self._gates.canary).known(fingerprints)
        night = run_night(name, plans, self._gates, files, draw)
        return write_night(night, self._gates, profile.name, plans.variants.variants, files)


def _gates_of(args: Namespace, profile: Profile) -> str:
    if args.gates:
        return args.gates
    from cluster.manifests import FOLDERS

    if not (FOLDERS["gates"] / f"{profile.name}.yaml").is_file():
        raise UserError(f"profile {profile.name} has no gates in {FOLDERS['gates']}: name a file with --gates")
    return profile.name


def _output(args: Namespace) -> str:
    from cluster.output import check_output

    return check_output(output_of(args), [], _ray.in_submitted_job())


@contextlib.contextmanager
def _ray_over(args: Namespace) -> Iterator[None]:
    """Ray, on nodes that all reach the output."""
    from cluster.output import alive_nodes, check_output

    with _ray.connected():
        check_output(output_of(args), alive_nodes(), _ray.in_submitted_job())
        yield


def _files(output: str) -> "NightFiles":
    from cluster.night_files import NightFiles

    return NightFiles(output)


def _accept(console: Console, files: "NightFiles", night: str) -> int:
    number, new = files.accept(night)
    console.print(f"{night} is accepted night {number}" + ("" if new else " already"))
    return COMPLETE


def _print_verdict(console: Console, verdict: dict[str, Any], files: "NightFiles") -> None:
    table = Table("gate", "verdict", "variant", "against", "benchmark", "tag", title=verdict["night"])
    table.add_column("what was found", overflow="fold")
    for finding in verdict["findings"]:
        columns = ("kind", "status", "variant", "against", "benchmark", "tag", "message")
        style = {"pass": None, "regression": "bold red"}.get(finding["status"], "yellow")
        table.add_row(*(escape(finding[column] or "-") for column in columns), style=style)
    console.print(table)
    for note in verdict["notes"]:
        console.print(escape(note))
    for pair in verdict["regressed_pairs"][:SHOWN_PAIRS]:
        where = f"{pair['tag']}, image {pair['image_index']}"
        images = f"{pair['reference_image']} and {pair['image']}"
        console.print(escape(f"{pair['prompt']} ({where}): {images}"), soft_wrap=True)
    console.print(f"{verdict['night']}: [bold]{verdict['verdict']}[/bold]")
    console.print(f"report: {files.folder_uri(verdict['night'])}/report.md", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
