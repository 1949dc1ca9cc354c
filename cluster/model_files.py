"""Finding the weights that a profile names, before any of them is loaded, and their fingerprints."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from bitflux_core.errors import UserError
from bitflux_core.files import fingerprint
from bitflux_core.variants import model_fingerprint
from cluster.manifests import REPOSITORY
from cluster.profile import Profile

if TYPE_CHECKING:
    from evaluators.base import Language

# The file by which each kind of model folder is recognised; mmdet's detectors are pickled checkpoints.
MARKERS = {
    "pipeline": ("model_index.json",),
    "ternary": ("config.json",),
    "detector": ("config.json", "*.pth"),
    "clip": ("open_clip_config.json",),
    "vqa": ("config.json",),
    "named_detector": ("config.json",),
    "depth": ("config.json",),
    "clip_score": ("open_clip_config.json",),
    "judge": ("config.json",),
}
LANGUAGE = "language"  # a role that is no folder
UNNAMED = "(not named)"
# Upstream's ShareGPT4V-7B is of LLaVA's architecture, but not in transformers' format.
JUDGE_EXAMPLE = "llava-hf/llava-1.5-7b-hf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """Folders of the models, all present. `ternary` is None where no ternary variant runs.

    `scoring` maps the roles that the run's evaluators need to folders, and `language` to the tool's name.
    """

    pipeline: Path
    ternary: Path | None
    scoring: dict[str, Path | str]


@dataclass(frozen=True)
class Need:
    """A model that a run needs: its role, what the profile calls it (`UNNAMED` where it does not), where it was found,
    and else how to get it."""

    role: str
    name: str
    folder: Path | None
    remedy: str


def needed_roles(evaluators: Iterable[str], variants: Iterable[str]) -> list[str]:
    """The roles of all models that draw `variants` and that these evaluators score with, drawing first."""
    from evaluators.registry import roles_of

    drawing = ["pipeline", *(["ternary"] if any(variant != "bf16" for variant in variants) else [])]
    scoring = [role for evaluator in evaluators for role in roles_of(evaluator)]
    return list(dict.fromkeys([*drawing, *scoring]))


def locate_models(profile: Profile, variants: Iterable[str], evaluators: Iterable[str]) -> ModelFiles:
    """The folders of every model that is needed. UserError names all missing ones and how to get each."""
    roles = needed_roles(evaluators, variants)
    found = locate(profile, [role for role in roles if role != LANGUAGE])
    scoring: dict[str, Path | str] = {
        role: folder for role, folder in found.items() if role not in ("pipeline", "ternary")
    }
    if LANGUAGE in roles:
        scoring[LANGUAGE] = _language(profile).name
    return ModelFiles(found["pipeline"], found.get("ternary"), scoring)


def locate(profile: Profile, roles: Iterable[str]) -> dict[str, Path]:
    """The folders of these models of a profile, by role. UserError names all missing ones and how to get each."""
    needs = survey(profile, roles)
    missing = [f"{need.role} {need.name} ({need.remedy})" for need in needs if need.folder is None]
    if missing:
        raise UserError(f"profile {profile.name}: models not found: {'; '.join(missing)}")
    return {need.role: need.folder for need in needs if need.folder is not None}


def survey(profile: Profile, roles: Iterable[str]) -> list[Need]:
    """Each of these models of a profile, found or not; one that the profile does not name is not found."""
    declared: dict[str, str | None] = {role: getattr(profile.models, role) for role in roles}
    return [
        Need(role, name or UNNAMED, _find(name, MARKERS[role]) if name else None, _remedy(role, profile))
        for role, name in declared.items()
    ]


def fingerprints(files: ModelFiles, variants: Iterable[str]) -> dict[str, str]:
    """What the results depend on: all that draws each variant, and the models that score every one of them."""
    from evaluators.language import language

    scoring = {
        role: language(str(model)).fingerprint if role == LANGUAGE else fingerprint(model)
        for role, model in files.scoring.items()
    }
    drawing = {
        variant: model_fingerprint(variant, pipeline_dir=files.pipeline, ternary_dir=files.ternary)
        for variant in variants
    }
    return {**scoring, **drawing}


def _language(profile: Profile) -> "Language":
    """The tool that the profile names, resolved here so that all machines of a run take the same one."""
    from evaluators.language import language

    return language(profile.models.language)


def _find(name: str, markers: Iterable[str]) -> Path | None:
    """The folder called `name` that holds one of `markers`: a path, or a snapshot in the local Hugging Face cache."""
    folder = REPOSITORY / Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return folder if any(any(folder.glob(marker)) for marker in markers) else None


def _remedy(role: str, profile: Profile) -> str:
    name: str | None = getattr(profile.models, role)
    if name is None:
        example = f", such as {JUDGE_EXAMPLE}" if role == "judge" else ""
        return f"add models.{role} to the profile: a hub id or a local folder{example}"
    if role == "ternary":
        return f"make it: python jobs/quantize.py --profile {profile.name}"
    if HUB_ID.fullmatch(name):
        return f"get it: hf download {name}; or name a local folder in the profile"
    return f"no folder of that name holds a {' or '.join(MARKERS[role])}; correct models.{role} in the profile"
