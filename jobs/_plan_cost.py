"""What a plan will take: device-hours and bytes of each variant, before anything runs."""

from dataclasses import dataclass
from pathlib import Path

from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.samples import Sampling
from cluster.plan import Plan
from cluster.profile import Profile

REMEDY = "name a file that jobs/bench.py images wrote"


@dataclass(frozen=True)
class VariantCost:
    """One variant's share of a plan. `draw_s`: seconds to draw an image, `measured` or as the profile declares;
    `hours`: of drawing and scoring, one device at a time; `image_bytes`, `result_bytes`: of all its files."""

    variant: str
    images: int
    draw_s: float
    measured: bool
    hours: float
    image_bytes: int
    result_bytes: int


def plan_costs(plan: Plan, profile: Profile, measured_s: dict[str, float]) -> list[VariantCost]:
    """By variant, in the plan's order. `measured_s`: seconds to draw an image, of the variants that were measured."""
    images = {name: len(w.prompts) * w.images_per_prompt for name, w in plan.workloads.items()}
    scoring_s = sum(n * profile.scoring_seconds(plan.workloads[name].evaluator) for name, n in images.items())
    n_images, pixels = sum(images.values()), plan.sampling.width * plan.sampling.height
    costs = []
    for variant in plan.variants:
        draw_s = measured_s.get(variant, profile.drawing_seconds)
        costs.append(
            VariantCost(
                variant,
                n_images,
                draw_s,
                variant in measured_s,
                (n_images * draw_s + scoring_s) / 3600,
                round(n_images * pixels * profile.cost.png_bytes_per_pixel),
                round(n_images * profile.cost.row_bytes),
            )
        )
    return costs


def measured_seconds(file: Path, sampling: Sampling) -> dict[str, float]:
    """Seconds an image of each variant that the file of `jobs/bench.py images` has, at the plan's size.

    The denoising seconds of the row with the nearest number of steps are taken in proportion. UserError for a file that
    has no such row.
    """
    document = read_json(file, REMEDY)
    seconds: dict[str, float] = {}
    try:
        if document["section"] != "images" or document["settings"]["tiny"]:
            raise UserError(f"{file} holds no images of full size: {REMEDY}")
        # Last the nearest number of steps, whose seconds then stay.
        rows = sorted(document["rows"], key=lambda row: -abs(row["steps"] - sampling.steps))
        for row in rows:
            if row["error"] is None and row["resolution"] ** 2 == sampling.width * sampling.height:
                denoise_s = row["denoise_s"] * sampling.steps / row["steps"]
                seconds[row["mode"]] = row["text_s"] + denoise_s + row["decode_s"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no table of images ({type(error).__name__}: {error}): {REMEDY}") from error
    if not seconds:
        raise UserError(f"{file} holds no image of {sampling.width}x{sampling.height} pixels: {REMEDY} at that size")
    return seconds
