"""Makes the embedded mini FLUX and its evaluators again, from a seed, on one GPU. jobs/quantize.py makes the twin.

python jobs/train_mini.py --output DIR                                          everything, stage after stage
python jobs/train_mini.py --output DIR --stages detector,clip                   some stages
torchrun --nproc-per-node 2 jobs/train_mini.py --output DIR --stages teacher    the long stage on two GPUs
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from jobs._cli import COMPLETE, Parser, exit_code_of, names, positive


def parse(argv: list[str] | None) -> argparse.Namespace:
    from bitflux_core.mini.stages import STAGES, TrainSettings

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that the stages read and write")
    parser.add_argument("--stages", type=names, default=tuple(STAGES), help=f"of {','.join(STAGES)} (all)")
    for field in fields(TrainSettings)[1:]:
        kind = float if field.name.endswith(("seconds", "lr")) else int if field.name == "seed" else positive
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=field.default, help=f"({field.default})", metavar="N")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _train(argv))


def _train(argv: list[str] | None) -> int:
    from bitflux_core.mini.stages import TrainSettings, run_stages

    options = vars(parse(argv))
    stages = list(options.pop("stages"))
    run_stages(stages, TrainSettings(**options))
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
