"""Makes the ternary twin of a profile's FLUX transformer: codes and scales by least squares or absmean, no training."""

import sys
from argparse import Namespace
from pathlib import Path

from bitflux_core.errors import UserError
from jobs._cli import COMPLETE, Parser, exit_code_of

METHODS = ("least_squares", "absmean")


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--profile", default="mini", help="an embedded profile or the path of one (%(default)s)")
    add("--method", choices=METHODS, default=METHODS[0], help="how codes and scales are chosen (%(default)s)")
    add("--output", type=Path, help="folder of the checkpoint, new or empty (the profile's models.ternary)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _quantize(parse(argv)))


def _quantize(args: Namespace) -> int:
    import torch  # after parsing: a mistake on the command line is answered at once

    from bitflux_core.accounting import size_report
    from bitflux_core.checkpoint import check_unused, save_ternary
    from bitflux_core.convert import quantize_transformer
    from bitflux_core.files import fingerprint
    from bitflux_core.loading import load_transformer
    from cluster.manifests import REPOSITORY
    from cluster.model_files import locate
    from cluster.profile import load_profile

    profile = load_profile(args.profile)
    source = locate(profile, ["pipeline"])["pipeline"]
    if args.output is None and profile.models.ternary is None:
        raise UserError(f"profile {profile.name} names no models.ternary: give --output a folder")
    output = check_unused(args.output or REPOSITORY / str(profile.models.ternary))  # before the work, not after
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer = load_transformer("bf16", pipeline_dir=source, ternary_dir=output, device=device, dtype=torch.bfloat16)
    layers = quantize_transformer(transformer, args.method)
    provenance = {"profile": profile.name, "teacher": fingerprint(source / "transformer")}
    save_ternary(transformer, output, provenance, method=args.method)

    sizes = size_report(transformer)
    print(f"{len(layers)} layers, {sizes.ternary_share:.2%} of {sizes.total_params:,} parameters ternary")
    print(f"signal to noise: {min(layer.snr_db for layer in layers):.1f} dB in the worst layer")
    megabytes = f"{sizes.bf16_bytes / 1e6:,.1f} MB in bf16, {sizes.storage_bytes / 1e6:,.1f} MB ternary"
    print(f"storage: {megabytes} ({sizes.ratio:.2f}x)")
    print(f"written to {output}")
    return COMPLETE


if __name__ == "__main__":
    sys.exit(main())
