"""What the jobs that draw check before anything is drawn: the profile, the variants, the models, the prompts."""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.plan import Plan
from cluster.profile import Profile, changed, load_profile

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles


def chosen_profile(args: Namespace) -> Profile:
    """The profile with what the command line changes in it."""
    fields = ("benchmarks", "variants", "limit", "images_per_prompt")
    given = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
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
    from evaluators.registry import check_prompts

    models = locate_models(profile, variants)
    check_prompt_lengths(models.pipeline, plan.prompts, profile.sampling.max_sequence_length)
    for workload in plan.workloads.values():
        metadata = {prompt.text: prompt.metadata for prompt in workload.prompts.values()}
        check_prompts(workload.evaluator, metadata, workload.name, models.detector)
    return models, fingerprints(models, variants)
