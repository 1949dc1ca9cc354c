"""Makes the ternary twin of a profile's FLUX transformer, without images and block by block; a killed run goes on.

python jobs/quantize.py --profile mini                                  as `quantize` in the profile says; wants a GPU
python jobs/quantize.py --profile mini --output DIR --distill-steps 0   compensated codes, no training: on a CPU too
python jobs/quantize.py --profile flux-dev --data-dir DIR               a draw of the paper's prompts
python jobs/quantize.py --profile flux-dev --calibration prompts.txt    prompts of yours, one a line
python jobs/quantize.py --profile flux-dev --low-rank 16                and what was lost put back, in part
python jobs/quantize.py --profile flux-dev --reconstruction-steps 300   and each block trained on its own
python jobs/quantize.py --profile flux-dev --distill-steps 10000        and then the whole, end to end
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.profile import MINI_WORLD, Profile
from jobs import _ray
from jobs._cli import COMPLETE, Parser, exit_code_of, natural, positive, seed
from jobs._prompts import add_prompt_options, prompts_of

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from bitflux_core.distill_recipe import EndToEndSettings
    from bitflux_core.quantizer.end_to_end import EndToEndTask
    from bitflux_core.quantizer.snr import Snr

INITS = ("compensated", "least-squares", "absmean")
CODES = ("trits", "planes")
OPTIMIZERS = ("factored", "adam")
EVALUATIONS = 40  # of a training end to end, at most


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", default="mini", help="an embedded profile or the path of one (%(default)s)")
    add("--init", choices=INITS, default=INITS[0], help="how codes and scales are chosen (%(default)s)")
    add_prompt_options(parser)
    add("--calibration-prompts", type=positive, metavar="N", help="how many to use (the profile's, else 64)")
    add("--states-a-prompt", type=positive, default=4, metavar="N", help="points of each trajectory (%(default)s)")
    add("--low-rank", type=positive, metavar="R", help="a correction of this rank beside every layer, in bf16 (none)")
    add("--codes", choices=CODES, default=CODES[0], help="on disk: five a byte, or as the kernels want (%(default)s)")
    add("--reconstruction-steps", type=natural, metavar="N", help="training of each block (the profile's, else 0)")
    add("--distill-steps", type=natural, metavar="N", help="training end to end, at the end (the profile's, else 0)")
    add("--distill-int8-steps", type=natural, metavar="N", help="of them with int8 activations, last (a quarter)")
    add("--distill-batch", type=positive, metavar="N", help="images a step, on all GPUs (the profile's)")
    add("--distill-prompts", type=positive, metavar="N", help="prompts for it (the profile's, else all there are)")
    add(
        "--distill-images",
        type=natural,
        default=0,
        metavar="N",
        help="drawn at intervals while it trains (%(default)s)",
    )
    add("--distill-optimizer", choices=OPTIMIZERS, help="adam takes 16 bytes a weight, and is better (factored)")
    add("--distill-rate", type=rate, metavar="R", help="learning rate of latent weights, in scales (0.005)")
    add("--distill-gpus", type=positive, default=1, metavar="N", help="GPUs for it, by Ray from two on (%(default)s)")
    add("--seed", type=seed, default=0, metavar="N", help="of noise, states and training (%(default)s)")
    add("--output", type=Path, help="folder of the checkpoint, new or empty (see below)")
    parser.epilog = (
        "Without --output the checkpoint becomes the profile's models.ternary or, where there is one already, "
        "ternary-PROFILE in this folder."
    )
    return parser.parse_args(argv)


def rate(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
    return number


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _quantize(parse(argv)))


def _quantize(args: argparse.Namespace) -> int:
    import torch  # after parsing: a mistake on the command line is answered at once

    from bitflux_core.accounting import size_report
    from bitflux_core.prompts import check_prompt_lengths
    from bitflux_core.quantizer.quantize import LOG, PLOT, TABLE, QuantizeSettings, check_output, quantize
    from cluster.manifests import REPOSITORY
    from cluster.model_files import locate
    from cluster.profile import load_profile

    profile = load_profile(args.profile)
    pipeline_dir = locate(profile, ["pipeline"])["pipeline"]
    fill(args, profile)
    known = REPOSITORY / profile.models.ternary if profile.models.ternary else None
    output = args.output or _free(profile.name, known)
    check_output(output)  # before the work, not after
    prompts = calibration_prompts(profile, args)
    check_prompt_lengths(pipeline_dir, prompts, profile.sampling.max_sequence_length)
    end_to_end = training_of(profile, args)
    trained_on = distill_prompts(profile, args) if end_to_end else ()
    check_prompt_lengths(pipeline_dir, trained_on, profile.sampling.max_sequence_length)
    settings = QuantizeSettings(
        init=args.init,
        prompts=prompts,
        states_a_prompt=min(args.states_a_prompt, profile.sampling.steps),
        reconstruction_steps=args.reconstruction_steps,
        sampling=profile.sampling,
        batch=profile.batch_size,
        seed=args.seed,
        end_to_end=end_to_end,
        distill_prompts=trained_on,
        distill_images=args.distill_images,
        low_rank=args.low_rank or 0,
        codes=args.codes,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if end_to_end and device.type == "cpu":
        steps = f"{end_to_end.steps:,} steps of {end_to_end.batch} images"
        print(f"training end to end without a GPU, {steps}: --distill-steps 0 leaves it out", flush=True)
    with _several(args.distill_gpus if end_to_end else 1) as train:
        transformer = quantize(pipeline_dir, output, settings, device, _report, args.distill_gpus, train)

    sizes = size_report(transformer, args.codes)
    print(f"{sizes.ternary_share:.2%} of {sizes.total_params:,} parameters ternary")
    megabytes = f"{sizes.bf16_bytes / 1e6:,.1f} MB in bf16, {sizes.storage_bytes / 1e6:,.1f} MB ternary"
    print(f"storage: {megabytes} ({sizes.ratio:.2f}x)")
    if args.low_rank:
        print(f"corrections of rank {args.low_rank}: {sizes.correction_bytes / 1e6:,.1f} MB of them")
    if end_to_end:
        print(f"log of the training end to end: {output / LOG}")
    if known and known != output and (known / "config.json").is_file():
        print(_alike(transformer, known))
    before = ", before the training end to end" if end_to_end else ""
    print(f"written to {output}; signal-to-noise ratios of all layers{before}: {TABLE}, {PLOT}")
    return COMPLETE


def fill(args: argparse.Namespace, profile: Profile) -> None:
    """Takes from the profile what the command line leaves open; of the batch an image for each GPU at least."""
    if args.distill_batch is None:
        args.distill_batch = max(profile.quantize.distill_batch or profile.batch_size, args.distill_gpus)
    for name, value in profile.quantize:
        if getattr(args, name) is None:
            setattr(args, name, value)


def _free(name: str, known: Path | None) -> Path:
    """`known`, the place of the profile's ternary weights, or another if there is something already."""
    from bitflux_core.quantizer.quantize import check_output

    if known is None:
        raise UserError(f"profile {name} names no models.ternary: give --output a folder")
    try:
        check_output(known)
        return known
    except UserError:
        return Path(f"ternary-{name}")


def _alike(transformer: "FluxTransformer2DModel", known: Path) -> str:
    """What share of the codes the checkpoint `known` has too, or why they cannot be compared."""
    try:
        return f"{_codes_alike(transformer, known):.2%} of the codes are those of {known}"
    except UserError as error:
        return f"not compared with the codes of {known}: {error}"


def _codes_alike(transformer: "FluxTransformer2DModel", known: Path) -> float:
    """The share of the codes that the checkpoint `known` has too. UserError for a damaged one, or of other layers."""
    import torch

    from bitflux_core.checkpoint import load_ternary
    from bitflux_core.layers import block_linears
    from bitflux_core.linear import TernaryLinear
    from kernels.packing import unpack_planes

    others = block_linears(load_ternary(known, dtype=torch.bfloat16, device="cpu"))
    alike = total = 0
    for name, layer in block_linears(transformer).items():
        other = others.get(name)
        assert isinstance(layer, TernaryLinear)
        if not isinstance(other, TernaryLinear) or other.packed.shape != layer.packed.shape:
            raise UserError(f"it is of another model ({name})")
        mine, theirs = (unpack_planes(each.packed, layer.in_features) for each in (layer, other))
        alike += int((mine == theirs).sum())
        total += mine.numel()
    return alike / total


def calibration_prompts(profile: Profile, args: argparse.Namespace) -> tuple[str, ...]:
    """As many prompts as asked for; none where codes need no calibration and none is named on the command line.

    UserError for prompts that cannot be read or are too few, and where `compensated` or training would have none.
    """
    needed = args.init == "compensated" or args.reconstruction_steps > 0
    source = args.calibration or (profile.calibration if needed or profile.calibration == MINI_WORLD else None)
    if source:
        return _prompts(source, args.calibration_prompts, args, "--calibration-prompts")
    if needed:
        raise UserError(
            f"profile {profile.name} has no calibration prompts: give --calibration a file of them, "
            "or take --init least-squares"
        )
    return ()


def training_of(profile: Profile, args: argparse.Namespace) -> "EndToEndSettings | None":
    """How to train end to end, if at all. UserError for options that contradict each other."""
    from bitflux_core.distill_recipe import EndToEndSettings

    if not args.distill_steps:
        return None
    int8_steps = args.distill_steps // 4 if args.distill_int8_steps is None else args.distill_int8_steps
    if int8_steps > args.distill_steps:
        raise UserError(f"--distill-int8-steps {int8_steps} of --distill-steps {args.distill_steps}: give fewer")
    batch = args.distill_batch
    return EndToEndSettings(
        steps=args.distill_steps,
        int8_steps=int8_steps,
        batch=batch,
        sampler_steps=profile.sampling.steps,
        guidance=profile.sampling.guidance,
        held_out=max(EndToEndSettings.held_out, batch // 8),  # seeing them takes no longer than a few steps
        interval=max(EndToEndSettings.interval, args.distill_steps // EVALUATIONS),
        optimizer=args.distill_optimizer or EndToEndSettings.optimizer,
        latent_lr=args.distill_rate or EndToEndSettings.latent_lr,
        seed=args.seed,
    )


def distill_prompts(profile: Profile, args: argparse.Namespace) -> tuple[str, ...]:
    """As many as asked for, or all there are; they may repeat. UserError where there is no file of them, or too few."""
    source = args.calibration or profile.calibration
    if source is None:
        raise UserError(f"profile {profile.name} has no prompts to train on: give --calibration a file of them")
    return _prompts(source, args.distill_prompts, args, "--distill-prompts")


def _prompts(source: str, count: int | None, args: argparse.Namespace, option: str) -> tuple[str, ...]:
    return prompts_of(source, count, seed=args.seed, data_dir=args.data_dir, option=option)


@contextlib.contextmanager
def _several(gpus: int) -> "Iterator[Callable[[EndToEndTask], None] | None]":
    """What trains on so many GPUs; None for a single one. UserError where there are not as many."""
    if gpus == 1:
        yield None
        return
    _ray.prepare()
    from cluster.distill_train import check_gpus, train

    with _ray.connected():
        check_gpus(gpus)  # before the blocks, which take hours
        yield train


def _report(name: str, rows: "list[Snr]") -> None:
    block, layers = rows[-1], rows[:-1]
    # Weights of zero have no ratio.
    measured = [(row.weight_snr_db, row.name) for row in layers if row.weight_snr_db is not None]
    if measured:
        worst, layer = min(measured)
        line = f"{name}: weights {worst:.1f} dB at worst ({layer.removeprefix(f'{name}.')})"
    else:
        line = f"{name}: all weights are zero"
    if block.output_snr_db is not None:
        line += f", output {block.output_snr_db:.1f} dB"
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
