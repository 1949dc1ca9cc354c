"""Says how often the mini world's evaluators are wrong, on rendered scenes of which the truth is known.

Every prompt of the mini benchmarks is judged on a scene that shows it and on one that contradicts it in one thing.
False fail: the right scene does not pass; false pass: the wrong one does. GenEval says itself what is right; of
T2I-CompBench's scores those above a category's bar pass, and where a score has no scale of its own (CLIPScore, and the
mean that contains it) the right scene passes where it scores more than the wrong one.
"""

import json
import random
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import track
from rich.table import Table

from jobs._cli import COMPLETE, Parser, console_on, exit_code_of, positive, seed

if TYPE_CHECKING:
    import numpy as np

    from bitflux_core.mini.world import PromptSpec
    from evaluators.base import Evaluator

# Of a category's score, what passes. Attributes: every answer more likely yes than no. Places: what upstream's own cut
# leaves. Depth: more than two certain objects score alone, which is one half. Numbers: every one right.
BARS = {"color": 0.25, "shape": 0.25, "texture": 0.25, "spatial": 0.5, "3d_spatial": 0.5, "numeracy": 0.999}
BATCH = 32


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n", 1)[1])
    add = parser.add_argument
    add("--profile", default="mini", help="whose models judge: mini or the path of a profile (%(default)s)")
    add("--benchmark", choices=("geneval", "t2i-compbench", "all"), default="all", help="(%(default)s)")
    add("--limit", type=positive, metavar="N", help="prompts of a tag (all)")
    add("--seed", type=seed, default=0, metavar="N", help="of the scenes (%(default)s)")
    add("--json", action="store_true", help="the rates on standard output, the table on standard error")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _validate(parse(argv)))


def _validate(args: Namespace) -> int:
    from bitflux_core.mini import compositions, world
    from cluster.profile import load_profile

    profile = load_profile(args.profile)
    wanted = {
        "geneval": ("mini-geneval", world.benchmark_prompts(), world.PromptSpec.metadata),
        "t2i-compbench": (f"t2i-compbench-{profile.mode}", compositions.benchmark_prompts(), compositions.metadata),
    }
    rates: list[dict[str, Any]] = []
    for name, (evaluator, specs, metadata) in wanted.items():
        if args.benchmark in (name, "all"):
            judge = _built(profile, evaluator)
            rates += _rates(name, judge, _some(specs, args.limit), metadata, args.seed)
    table = Table("benchmark", "tag", title="wrong judgments on rendered scenes")
    for heading in ("scenes", "false fail", "false pass"):
        table.add_column(heading, justify="right")
    for rate in rates:
        shares = (f"{100 * rate[kind]:.1f} %" for kind in ("false_fail", "false_pass"))
        table.add_row(rate["benchmark"], rate["tag"], str(2 * rate["prompts"]), *shares)
    console_on(sys.stderr if args.json else sys.stdout).print(table)
    if args.json:
        print(json.dumps(rates, indent=2))
    return COMPLETE


def _built(profile: Any, evaluator: str) -> "Evaluator":
    import torch

    from cluster.model_files import locate_models
    from evaluators.registry import build_evaluator

    models = locate_models(profile, ["bf16"], [evaluator]).scoring
    return build_evaluator(evaluator, models, "cuda" if torch.cuda.is_available() else "cpu")


def _some(specs: Sequence["PromptSpec"], limit: int | None) -> list["PromptSpec"]:
    by_tag: dict[str, list[PromptSpec]] = defaultdict(list)
    for spec in specs:
        by_tag[spec.tag].append(spec)
    return [spec for same in by_tag.values() for spec in same[:limit]]


def _rates(name: str, judge: "Evaluator", specs: list["PromptSpec"], metadata: Any, seed: int) -> list[dict[str, Any]]:
    """False rates by tag, the mean over the tags last."""
    from bitflux_core.mini.contradictions import contradicted

    rng = random.Random(seed)
    about = [metadata(spec) for spec in specs]
    right = _scores(f"{name}, right", judge, rendered(specs, seed), about)
    wrong = _scores(f"{name}, wrong", judge, rendered([contradicted(spec, rng) for spec in specs], seed + 1), about)
    fails: dict[str, list[bool]] = defaultdict(list)
    passes: dict[str, list[bool]] = defaultdict(list)
    for spec, good, bad in zip(specs, right, wrong, strict=True):
        false_fail, false_pass = misjudged(name, spec.tag, good, bad)
        fails[spec.tag].append(false_fail)
        passes[spec.tag].append(false_pass)
    rows: list[dict[str, Any]] = []
    for tag, found in fails.items():
        shares = {"false_fail": _mean(found), "false_pass": _mean(passes[tag])}
        rows.append({"benchmark": name, "tag": tag, "prompts": len(found), **shares})
    overall = {kind: _mean([row[kind] for row in rows]) for kind in ("false_fail", "false_pass")}
    return [*rows, {"benchmark": name, "tag": "overall", "prompts": len(specs), **overall}]


def misjudged(benchmark: str, tag: str, right: float, wrong: float) -> tuple[bool, bool]:
    """Whether the right scene fails by its score, and whether the wrong one passes."""
    bar = 0.5 if benchmark == "geneval" else BARS.get(tag)
    return (right <= wrong, wrong >= right) if bar is None else (right < bar, wrong >= bar)


def rendered(specs: Sequence["PromptSpec"], seed: int) -> list["np.ndarray"]:
    """One scene of each spec, uint8 RGB [H, W, 3]."""
    import torch

    from bitflux_core.mini.render import PromptTable, render, sample_scenes

    generator = torch.Generator().manual_seed(seed)
    table = PromptTable.build(list(specs), "cpu")
    images: list[np.ndarray] = []
    for index in torch.arange(len(specs)).split(BATCH):
        pixels, _ = render(sample_scenes(table, index, generator), generator)
        images += [(image.permute(1, 2, 0) * 255).round().byte().numpy() for image in pixels]
    return images


def _scores(name: str, judge: "Evaluator", images: Sequence["np.ndarray"], about: Sequence[dict]) -> list[float]:
    scores: list[float] = []
    console = console_on(sys.stderr)
    batches = range(0, len(images), BATCH)
    for start in track(batches, name, console=console, transient=True, disable=not console.is_terminal):
        part = slice(start, start + BATCH)
        for score in judge.score(images[part], about[part]):
            if score.score is None:
                raise ValueError(f"a rendered scene could not be judged: {score.error}")
            scores.append(score.score)
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
