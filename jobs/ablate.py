"""What each step of the ternary method gains: score kept, PSNR to the teacher at the same noise, and storage.

python jobs/ablate.py --output DIR                                  every row; on a GPU
python jobs/ablate.py --output DIR --limit 2 --rows absmean,"+ compensation"
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from jobs._cli import COMPLETE, Parser, console_on, exit_code_of, names, positive, seed
from jobs._prompts import add_prompt_options
from jobs.quantize import calibration_prompts, distill_prompts

if TYPE_CHECKING:
    import numpy as np
    from diffusers import FluxTransformer2DModel

    from cluster.profile import Profile

RESULTS = "ablation.json"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profile", default="mini", help="an embedded profile or the path of one (%(default)s)")
    add("--output", type=Path, required=True, help=f"folder of {RESULTS}; a stopped run goes on in it")
    add("--rows", type=names, help="names of rows, separated by commas (all)")
    add("--limit", type=positive, metavar="N", help="prompts of each tag that are drawn (the profile's)")
    add("--images-per-prompt", type=positive, default=1, metavar="N", help="(%(default)s)")
    add_prompt_options(parser)
    add("--calibration-prompts", type=positive, default=64, metavar="N", help="how many to use (%(default)s)")
    add("--states-a-prompt", type=positive, default=4, metavar="N", help="points of each trajectory (%(default)s)")
    add("--reconstruction-steps", type=positive, default=300, metavar="N", help="of each block (%(default)s)")
    add("--steps", type=positive, default=1000, metavar="N", help="of training end to end (%(default)s)")
    add("--batch", type=positive, default=256, metavar="N", help="of training end to end (%(default)s)")
    add("--distill-prompts", type=positive, metavar="N", help="prompts for it (the profile's, else all there are)")
    add("--seed", type=seed, default=0, metavar="N", help="(%(default)s)")
    args = parser.parse_args(argv)
    args.init = "compensated"  # some rows need calibration
    return args


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _ablate(parse(argv)))


def _ablate(args: argparse.Namespace) -> int:
    import torch

    from bitflux_core.distill_recipe import EndToEndSettings
    from bitflux_core.files import write_json
    from bitflux_core.quantizer.ablation import VARIANTS, Ablation, TrainingBudget
    from bitflux_core.quantizer.quantize import QuantizeSettings
    from cluster.model_files import locate
    from cluster.profile import load_profile

    profile = load_profile(args.profile)
    unknown = set(args.rows or ()) - {variant.name for variant in VARIANTS}
    if unknown:
        raise UserError(f"no row '{min(unknown)}': choose from {', '.join(variant.name for variant in VARIANTS)}")
    args.distill_prompts = args.distill_prompts or profile.quantize.distill_prompts
    models = locate(profile, ["pipeline", "detector", "clip"])
    settings = QuantizeSettings(
        init="compensated",
        prompts=calibration_prompts(profile, args),
        states_a_prompt=min(args.states_a_prompt, profile.sampling.steps),
        reconstruction_steps=args.reconstruction_steps,
        sampling=profile.sampling,
        batch=profile.batch_size,
        seed=args.seed,
        distill_prompts=distill_prompts(profile, args),
    )
    optimizer = profile.quantize.distill_optimizer or EndToEndSettings.optimizer
    budget = TrainingBudget(args.reconstruction_steps, args.steps, args.batch, optimizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ablation = Ablation(models["pipeline"], args.output / "work", settings, budget, device)
    recipe = {**ablation.recipe, "limit": args.limit, "images_per_prompt": args.images_per_prompt}
    done = _rows_done(args.output / RESULTS, recipe)

    wanted = [v for v in VARIANTS if v.name not in done and (not args.rows or v.name in args.rows)]
    for variant in wanted:
        ablation.check(variant)  # before the rows, each of which takes minutes
    bench = _Bench(profile, models, args.limit or profile.limit, args.images_per_prompt, device)
    reference = bench.draw(ablation.teacher())
    teacher_score = bench.score(reference)
    for variant in wanted:
        images = bench.draw(ablation.transformer(variant))
        score = bench.score(images)
        done[variant.name] = {
            "score": score,
            "score_kept": score / teacher_score if teacher_score else None,
            "psnr_db": bench.psnr_db(reference, images),
            "storage_bytes": ablation.storage_bytes(variant),
        }
        write_json(args.output / RESULTS, {"recipe": recipe, "teacher_score": teacher_score, "rows": done})
        print(f"{variant.name}: {done[variant.name]['psnr_db']:.1f} dB", flush=True)
    _print_table(done, teacher_score, len(reference))
    return COMPLETE


class _Bench:
    """Draws the profile's first benchmark with one transformer after the other, at the same noise, and scores it."""

    def __init__(self, profile: "Profile", models: dict[str, Path], limit: int | None, images: int, device):
        import torch

        from bitflux_core.generate import TextEncoder
        from bitflux_core.samples import Sample
        from cluster.workload import load_workload
        from evaluators.registry import build_evaluator

        workload = load_workload(profile.benchmarks[0])
        taken: dict[str, int] = {}
        self.samples: list[Sample] = []
        self.metadata: list[dict] = []
        for prompt in workload.prompts:
            taken[prompt.tag] = taken.get(prompt.tag, 0) + 1
            if limit is None or taken[prompt.tag] <= limit:
                for image in range(images):
                    place = (workload.name, prompt.tag, prompt.index, prompt.text, image, workload.seed)
                    self.samples.append(Sample(*place, profile.sampling))
                    self.metadata.append(prompt.metadata)
        self.device, self.dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        self.pipeline_dir, self.batch, self.sampling = models["pipeline"], profile.batch_size, profile.sampling
        encoder = TextEncoder(self.pipeline_dir, device, self.dtype, profile.sampling.max_sequence_length)
        self.embeddings = encoder.encode([sample.prompt for sample in self.samples])
        self.evaluator = build_evaluator(workload.evaluator, models, str(device), self.batch)

    def draw(self, transformer: "FluxTransformer2DModel") -> "np.ndarray":
        """Images uint8 [samples, H, W, 3]."""
        import numpy as np

        from bitflux_core.generate import ImageGenerator

        generator = ImageGenerator(transformer.to(self.device, self.dtype), self.pipeline_dir, self.device, self.dtype)
        parts = []
        for start in range(0, len(self.samples), self.batch):
            part = slice(start, start + self.batch)
            seeds = [sample.noise_seed for sample in self.samples[part]]
            parts.append(generator.draw(self.embeddings[part], seeds, self.sampling))
        return np.concatenate(parts)

    def score(self, images: "np.ndarray") -> float:
        """The mean score; a mistake of the evaluator's is an error, not a zero."""
        scores = self.evaluator.score(list(images), self.metadata)
        failed = [score.error for score in scores if score.score is None]
        if failed:
            raise UserError(f"{len(failed)} images could not be scored ({failed[0]}): mend the profile's models")
        return sum(score.score for score in scores if score.score is not None) / len(scores)

    @staticmethod
    def psnr_db(reference: "np.ndarray", images: "np.ndarray") -> float:
        """The mean over images."""
        from evaluators.regression import psnr_db

        return sum(psnr_db(*pair) for pair in zip(reference, images, strict=True)) / len(images)


def _rows_done(file: Path, recipe: dict) -> dict[str, dict]:
    """The rows in `file`. UserError where they were made in another way."""
    from bitflux_core.files import read_json

    if not file.exists():
        return {}
    found = read_json(file, "remove it")
    if found.get("recipe") != json.loads(json.dumps(recipe)):
        raise UserError(f"{file} holds rows made with other options: name another --output")
    return found["rows"]


def _print_table(rows: dict[str, dict], teacher_score: float, images: int) -> None:
    from rich.table import Table

    table = Table("ternary by", title=f"{images} images; the teacher scores {100 * teacher_score:.1f} %")
    for heading in ("score, %", "score kept, %", "PSNR to the teacher, dB", "storage, MB"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        kept = "-" if row["score_kept"] is None else f"{100 * row['score_kept']:.1f}"
        psnr, size = f"{row['psnr_db']:.1f}", f"{row['storage_bytes'] / 1e6:,.2f}"
        table.add_row(name, f"{100 * row['score']:.1f}", kept, psnr, size)
    console_on(sys.stdout).print(table)


if __name__ == "__main__":
    sys.exit(main())
