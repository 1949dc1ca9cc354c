"""What the jobs that draw check before anything is drawn: the profile, the variants, the models, the prompts."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitflux_core.errors import UserError
from cluster.plan import Plan
from cluster.profile import Profile, changed, load_profile
from cluster.workload import Workload, load_workloads
from evaluators.modes import in_mode

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles


def chosen_profile(args: Namespace) -> Profile:
    """The profile with what the command line changes in it."""
    fields = ("benchmarks", "variants", "mode", "limit", "images_per_prompt")
    given = {field: value for field in fields if (value := getattr(args, field, None)) is not None}
    return changed(load_profile(args.profile), given)


def chosen_workloads(profile: Profile, data_dir: Path | None) -> list[Workload]:
    """The profile's benchmarks, judged in its mode."""
    workloads = load_workloads(profile.benchmarks, data_dir)
    return [replace(workload, evaluator=in_mode(workload.evaluator, profile.mode)) for workload in workloads]


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

    models = locate_models(profile, variants, [workload.evaluator for workload in plan.workloads.values()])
    check_prompt_lengths(models.pipeline, plan.prompts, profile.sampling.max_sequence_length)
    _check_metadata(plan, models.scoring)
    return models, fingerprints(models, variants)


def located_evaluators(profile: Profile, plan: Plan) -> tuple[dict[str, Path | str], dict[str, str]]:
    """What the plan's evaluators need, by role, and its fingerprints; errors as of `located`."""
    from cluster.model_files import LANGUAGE, ModelFiles, fingerprints, locate, needed_roles
    from evaluators.language import language

    roles = needed_roles([workload.evaluator for workload in plan.workloads.values()], ())
    models: dict[str, Path | str] = {**locate(profile, [role for role in roles if role not in ("pipeline", LANGUAGE)])}
    if LANGUAGE in roles:
        models[LANGUAGE] = language(profile.models.language).name
    _check_metadata(plan, models)
    return models, fingerprints(ModelFiles(Path(), None, models), ())  # no variant draws: the pipeline is not read


def _check_metadata(plan: Plan, models: Mapping[str, Path | str]) -> None:
    from evaluators.registry import check_prompts

    for workload in plan.workloads.values():
        metadata = {prompt.text: prompt.metadata for prompt in workload.prompts.values()}
        check_prompts(workload.evaluator, metadata, workload.name, models)
