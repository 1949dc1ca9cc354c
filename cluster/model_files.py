"""Finding the weights that a profile names, before any of them is loaded, and their fingerprints."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from bitflux_core.errors import UserError
from bitflux_core.files import fingerprint
from bitflux_core.variants import model_fingerprint
from cluster.manifests import REPOSITORY
from cluster.profile import Profile

# The file by which each kind of model folder is recognised.
MARKERS = {
    "pipeline": "model_index.json",
    "ternary": "config.json",
    "detector": "config.json",
    "clip": "open_clip_config.json",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ModelFiles:
    """Folders of the models, all present. `ternary` is None where no ternary variant runs."""

    pipeline: Path
    ternary: Path | None
    detector: Path
    clip: Path


def locate_models(profile: Profile, variants: Iterable[str]) -> ModelFiles:
    """The folders of every model that `variants` need. UserError names all missing ones and how to get each."""
    roles = ["pipeline", "detector", "clip"]
    if any(variant != "bf16" for variant in variants):
        roles.insert(1, "ternary")
    found = locate(profile, roles)
    return ModelFiles(found["pipeline"], found.get("ternary"), found["detector"], found["clip"])


def locate(profile: Profile, roles: Iterable[str]) -> dict[str, Path]:
    """The folders of these models of a profile, by role. UserError names all missing ones and how to get each."""
    declared = {role: getattr(profile.models, role) for role in roles}
    if None in declared.values():
        raise UserError(
            f"profile {profile.name}: models.ternary is needed for a ternary variant; add it to the profile"
        )
    found = {role: _find(name, MARKERS[role]) for role, name in declared.items()}
    missing = [
        f"{role} {declared[role]} ({_remedy(role, profile)})" for role, folder in found.items() if folder is None
    ]
    if missing:
        raise UserError(f"profile {profile.name}: models not found: {'; '.join(missing)}")
    return {role: folder for role, folder in found.items() if folder is not None}


def fingerprints(files: ModelFiles, variants: Iterable[str]) -> dict[str, str]:
    """What the results depend on: all that draws each variant, and the models that score every one of them."""
    scoring = {role: fingerprint(getattr(files, role)) for role in ("detector", "clip")}
    drawing = {
        variant: model_fingerprint(variant, pipeline_dir=files.pipeline, ternary_dir=files.ternary)
        for variant in variants
    }
    return {**scoring, **drawing}


def _find(name: str, marker: str) -> Path | None:
    """The folder called `name` that holds `marker`: a path, or a snapshot in the local Hugging Face cache."""
    folder = REPOSITORY / Path(name).expanduser()
    if not folder.is_dir() and HUB_ID.fullmatch(name):
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
    return folder if (folder / marker).is_file() else None


def _remedy(role: str, profile: Profile) -> str:
    if role == "ternary":
        return f"make it: python jobs/quantize.py --profile {profile.name}"
    name = getattr(profile.models, role)
    if HUB_ID.fullmatch(name):
        return f"get it: hf download {name}; or name a local folder in the profile"
    return f"no folder of that name holds a {MARKERS[role]}; correct models.{role} in the profile"
