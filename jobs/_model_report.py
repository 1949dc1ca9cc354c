"""Which models a run needs, which are here, and how to get the others: before any time is spent on it."""

from rich.console import Console
from rich.table import Table

from cluster.profile import Profile
from cluster.workload import evaluators_of
from evaluators.modes import in_mode
from jobs._cli import BAD_INPUT, COMPLETE


def check_models(console: Console, profile: Profile) -> int:
    """Prints every model of the profile's benchmarks and variants. COMPLETE where none is missing, else BAD_INPUT."""
    from cluster.model_files import LANGUAGE, needed_roles, survey
    from evaluators.language import INSTALL_SPACY, language

    evaluators = [in_mode(evaluator, profile.mode) for evaluator in evaluators_of(profile.benchmarks)]
    roles = needed_roles(evaluators, profile.variants)
    needs = survey(profile, [role for role in roles if role != LANGUAGE])
    table = Table("role", "model", "found", title=f"models of profile {profile.name}")
    for need in needs:
        table.add_row(need.role, need.name, str(need.folder) if need.folder else f"missing: {need.remedy}")
    if LANGUAGE in roles:
        tool = language(profile.models.language)
        better = "" if tool.name == "spacy" else f"; the published scores were taken with spaCy: {INSTALL_SPACY}"
        table.add_row(LANGUAGE, profile.models.language, f"{tool.name}{better}")
    console.print(table)
    return COMPLETE if all(need.folder for need in needs) else BAD_INPUT
