"""Makes the ternary twin of a profile's FLUX transformer, without images and block by block; a killed run goes on.

python jobs/quantize.py --profile mini --output DIR                              compensated codes, no training
python jobs/quantize.py --profile flux-dev --data-dir DIR                        a draw of the paper's prompts
python jobs/quantize.py --profile flux-dev --calibration prompts.txt             prompts of yours, one a line
python jobs/quantize.py --profile mini --output DIR --reconstruction-steps 300   and each block trained on its own
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.manifests import is_manifest
from cluster.profile import MINI_WORLD, Profile
from cluster.workload import load_prompts
from jobs._cli import COMPLETE, Parser, exit_code_of, positive

if TYPE_CHECKING:
    from bitflux_core.quantizer.snr import Snr

INITS = ("compensated", "least-squares", "absmean")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", default="mini", help="an embedded profile or the path of one (%(default)s)")
    add("--init", choices=INITS, default=INITS[0], help="how codes and scales are chosen (%(default)s)")
    add("--calibration", metavar="PROMPTS", help="a file, one a line, or a workload of prompts (the profile's own)")
    add("--data-dir", type=Path, metavar="DIR", help="workloads' prompt files, for machines without internet")
    add("--calibration-prompts", type=positive, default=64, metavar="N", help="how many to use (%(default)s)")
    add("--states-a-prompt", type=positive, default=4, metavar="N", help="points of each trajectory (%(default)s)")
    add("--reconstruction-steps", type=natural, default=0, metavar="N", help="training of each block (%(default)s)")
    add("--seed", type=natural, default=0, metavar="N", help="of noise, states and training (%(default)s)")
    add("--output", type=Path, help="folder of the checkpoint, new or empty (the profile's models.ternary)")
    return parser.parse_args(argv)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _quantize(parse(argv)))


def _quantize(args: argparse.Namespace) -> int:
    import torch  # after parsing: a mistake on the command line is answered at once

    from bitflux_core.accounting import size_report
    from bitflux_core.checkpoint import check_unused
    from bitflux_core.prompts import check_prompt_lengths
    from bitflux_core.quantizer.quantize import PLOT, TABLE, QuantizeSettings, quantize
    from cluster.manifests import REPOSITORY
    from cluster.model_files import locate
    from cluster.profile import load_profile

    profile = load_profile(args.profile)
    pipeline_dir = locate(profile, ["pipeline"])["pipeline"]
    if args.output is None and profile.models.ternary is None:
        raise UserError(f"profile {profile.name} names no models.ternary: give --output a folder")
    output = check_unused(args.output or REPOSITORY / str(profile.models.ternary))  # before the work, not after
    prompts = calibration_prompts(profile, args)
    check_prompt_lengths(pipeline_dir, prompts, profile.sampling.max_sequence_length)
    settings = QuantizeSettings(
        init=args.init,
        prompts=prompts,
        states_a_prompt=min(args.states_a_prompt, profile.sampling.steps),
        reconstruction_steps=args.reconstruction_steps,
        sampling=profile.sampling,
        batch=profile.batch_size,
        seed=args.seed,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = quantize(pipeline_dir, output, settings, device, _report)

    sizes = size_report(transformer)
    print(f"{sizes.ternary_share:.2%} of {sizes.total_params:,} parameters ternary")
    megabytes = f"{sizes.bf16_bytes / 1e6:,.1f} MB in bf16, {sizes.storage_bytes / 1e6:,.1f} MB ternary"
    print(f"storage: {megabytes} ({sizes.ratio:.2f}x)")
    print(f"written to {output}; signal-to-noise ratios of all layers: {TABLE}, {PLOT}")
    return COMPLETE


def calibration_prompts(profile: Profile, args: argparse.Namespace) -> tuple[str, ...]:
    """As many distinct prompts as asked for: the first of a file, a drawing by the seed of a workload, whose categories
    follow each other. None where codes need no calibration and none is named on the command line.

    UserError for prompts that cannot be read or are too few, and where `compensated` or training would have none.
    """
    count = args.calibration_prompts
    needed = args.init == "compensated" or args.reconstruction_steps > 0
    if args.calibration:
        if is_manifest("benchmark", args.calibration):
            return _drawn_from(args.calibration, args)
        try:
            lines = Path(args.calibration).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.calibration} cannot be read ({error}): name a text file of prompts") from error
        prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
        _check_enough(prompts, args.calibration, count)
        return prompts[:count]
    if profile.calibration == MINI_WORLD:
        from bitflux_core.mini.world import training_prompts

        specs, weights = training_prompts()
        return tuple(spec.text for spec in random.Random(args.seed).choices(specs, weights, k=count))
    if profile.calibration and needed:
        return _drawn_from(profile.calibration, args)
    if needed:
        raise UserError(
            f"profile {profile.name} has no calibration prompts: give --calibration a file of them, "
            "or take --init least-squares"
        )
    return ()


def _drawn_from(workload: str, args: argparse.Namespace) -> tuple[str, ...]:
    prompts = tuple(dict.fromkeys(prompt.text for prompt in load_prompts(workload, args.data_dir)))
    _check_enough(prompts, workload, args.calibration_prompts)
    return tuple(random.Random(args.seed).sample(prompts, args.calibration_prompts))


def _check_enough(prompts: Sequence[str], source: str, count: int) -> None:
    if len(prompts) < count:
        raise UserError(f"{source} holds {len(prompts)} prompts of {count}: set --calibration-prompts")


def _report(name: str, rows: "list[Snr]") -> None:
    block, layers = rows[-1], rows[:-1]
    worst = min(layers, key=lambda row: row.weight_snr_db or 0)
    line = f"{name}: weights {worst.weight_snr_db:.1f} dB at worst ({worst.name.removeprefix(f'{name}.')})"
    if block.output_snr_db is not None:
        line += f", output {block.output_snr_db:.1f} dB"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
