"""What the jobs that draw check before anything is drawn: the profile, the variants, the models, the prompts."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.plan import Plan
from cluster.profile import Profile, changed, load_profile

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles


SCORING = ("detector", "clip")  # roles of the models that score images


def chosen_profile(args: Namespace) -> Profile:
    """The profile with what the command line changes in it."""
    fields = ("benchmarks", "variants", "limit", "images_per_prompt")
    given = {field: getattr(args, field) for field in fields if getattr(args, field, None) is not None}
    return changed(load_profile(args.profile), given)


def check_variants(variants: Sequence[str]) -> None:
    """UserError for a variant that there is not."""
    from bitflux_core.variants import VARIANTS

    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise UserError(f"unknown variant '{unknown[0]}': choose from {', '.join(VARIANTS)}")


def located(profile: Profile, plan: Plan, variants: Sequence[str]) -> "tuple[ModelFiles, dict[str, str]]":
    """The models' folders and fingerprints. UserError for one that is missing and for prompts that they cannot take."""
    # Importing torch takes longest: only after what can be refused without it.
    from bitflux_core.prompts import check_prompt_lengths
    from cluster.model_files import fingerprints, locate_models

    models = locate_models(profile, variants)
    check_prompt_lengths(models.pipeline, plan.prompts, profile.sampling.max_sequence_length)
    _check_metadata(plan, models.detector)
    return models, fingerprints(models, variants)


def located_evaluators(profile: Profile, plan: Plan) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders and fingerprints of the models that score, by role; errors as of `located`."""
    from bitflux_core.files import fingerprint
    from cluster.model_files import locate

    models = locate(profile, SCORING)
    _check_metadata(plan, models["detector"])
    return models, {role: fingerprint(folder) for role, folder in models.items()}


def _check_metadata(plan: Plan, detector: Path) -> None:
    from evaluators.registry import check_prompts

    for workload in plan.workloads.values():
        metadata = {prompt.text: prompt.metadata for prompt in workload.prompts.values()}
        check_prompts(workload.evaluator, metadata, workload.name, detector)
