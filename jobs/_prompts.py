"""Prompts to quantize with: those of a file, of a workload, or of the mini world."""

import random
from argparse import ArgumentParser
from pathlib import Path

from bitflux_core.errors import UserError
from cluster.manifests import is_manifest
from cluster.profile import MINI_WORLD
from cluster.workload import load_prompts
from jobs._cli import nonempty


def add_prompt_options(parser: ArgumentParser) -> None:
    """`--calibration` and `--data-dir`, the `source` and `data_dir` of `prompts_of`."""
    parser.add_argument(
        "--calibration",
        type=nonempty,
        metavar="PROMPTS",
        help="a file, one a line, or a workload of prompts (the profile's own)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="workloads' prompt files, for machines without internet"
    )


def prompts_of(source: str, count: int | None, *, seed: int, data_dir: Path | None, option: str) -> tuple[str, ...]:
    """`count` prompts of `source`, or all: the first of a file (one a line), a drawing by `seed` of a workload, whose
    categories follow each other, or of the mini world as its models are trained.

    UserError for a source that cannot be read or holds too few, which `option` can mend.
    """
    if source == MINI_WORLD:
        from bitflux_core.mini.compositions import training_prompts

        specs, weights = training_prompts()
        return tuple(spec.text for spec in random.Random(seed).choices(specs, weights, k=count or len(specs)))
    if is_manifest("benchmark", source):
        prompts = tuple(dict.fromkeys(prompt.text for prompt in load_prompts(source, data_dir)))
        _check_enough(prompts, source, count, option)
        return prompts if count is None else tuple(random.Random(seed).sample(prompts, count))
    try:
        lines = Path(source).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}): name a text file of prompts") from error
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    _check_enough(prompts, source, count, option)
    return prompts[:count]


def _check_enough(prompts: tuple[str, ...], source: str, count: int | None, option: str) -> None:
    if not prompts:
        raise UserError(f"{source} holds no prompts: write one a line")
    if count is not None and len(prompts) < count:
        raise UserError(f"{source} holds {len(prompts)} prompts of {count}: set {option}")
