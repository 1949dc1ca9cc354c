"""Scoring images that were made elsewhere: an official folder, its plan, and an actor that reads files in place of
drawing.

A file that is missing or no image becomes a row with an error at once: trying again would not mend it. Such images are
samples of one variant, with the profile's settings in their ids, so that they pair with images drawn here; the noise
and the settings that they were really made with are not known.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import fsspec
import numpy as np
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from bitflux_core.errors import UserError
from cluster.device import worker_host
from cluster.failing_storage import StorageError, describe, patiently
from cluster.image_files import decode_image
from cluster.image_layouts import GenEvalLayout, ImageLayout, Place
from cluster.output import on_nodes
from cluster.pieces import DrawBatch
from cluster.plan import Plan, build_plan
from cluster.profile import Profile
from cluster.rows import DrawReport
from cluster.workload import PromptRecord, Protocol, Workload
from evaluators.base import NoImage

READERS = 16


class ImageFolder:
    """A folder of image files at a local path or an fsspec URI. Holds no connection state, so it travels to actors."""

    def __init__(self, uri: str) -> None:
        """Raises UserError where no installed file system serves the URI."""
        try:
            self._fs, root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            raise UserError(f"folder {uri}: {error}") from error
        self.uri, self.root = uri, root.rstrip("/")
        self.local = isinstance(self._fs, LocalFileSystem)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name relative to the folder. UserError where there is no such folder."""
        fs: AbstractFileSystem = self._fs
        try:
            files = patiently(lambda: fs.find(self.root, detail=True) if fs.isdir(self.root) else None)
        except OSError as error:
            raise UserError(f"folder {self.uri}: cannot be read ({describe(error)})") from error
        if files is None:
            raise UserError(f"folder {self.uri}: no such folder; name the one that holds the images")
        return {path[len(self.root) + 1 :]: about["size"] for path, about in sorted(files.items())}

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError, of a local file PermissionError and IsADirectoryError as well, and
        StorageError."""
        fs: AbstractFileSystem = self._fs
        try:
            return patiently(lambda: fs.cat_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            raise
        except OSError as error:
            # Of a remote storage they are no single file's fault.
            if self.local and isinstance(error, PermissionError | IsADirectoryError):
                raise
            raise StorageError(f"{self.uri}/{name}: cannot be read ({describe(error)})") from error


@dataclass(frozen=True)
class ImportedImages:
    """A plan's images in a folder: each one's file by its noise seed, or why there is none; and the layout's files by
    prompt and image. `left_over` counts image files that the plan does not ask for."""

    folder: ImageFolder
    files: dict[int, str | NoImage]
    found: dict[Place, str]
    left_over: int

    @property
    def fingerprint(self) -> str:
        """Stands for the weights that drew them: 16 hex digits of a SHA-256 over the files' names and sizes."""
        listed = sorted((name, self.folder.sizes[name]) for name in self.files.values() if isinstance(name, str))
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


class ImportedReplica:
    """Has a replica's methods; what it draws are the folder's images."""

    def __init__(self, images: ImportedImages) -> None:
        self._images = images

    def start(self, variant: str) -> None:
        """Nothing to load."""

    def draw(
        self, variant: str, batches: tuple[DrawBatch, ...], *prompts: str
    ) -> tuple[DrawReport, list[np.ndarray | NoImage]]:
        """The kept images, or why there is none. Raises StorageError."""
        seeds = [batch.noise_seeds[slot] for batch in batches for slot in batch.kept]
        report = DrawReport((None,) * len(seeds), worker_host(), None)
        return report, [self._image(self._images.files[seed]) for seed in seeds]

    def _image(self, name: str | NoImage) -> np.ndarray | NoImage:
        if isinstance(name, NoImage):
            return name
        try:
            return decode_image(self._images.folder.read(name), name)
        except FileNotFoundError:
            return NoImage(f"{name}: no such file")
        except OSError as error:
            return NoImage(f"{name}: cannot be read ({describe(error)})")


def import_plan(
    profile: Profile, workload: Workload, variant: str, limit: int | None, images_per_prompt: int | None
) -> Plan:
    """The plan of scoring images made elsewhere as `variant`; it knows no fingerprints yet."""
    # Noise of an image's own, whatever the benchmark's rule: here the seed is only what tells the files apart.
    foreign = replace(workload, seed_rule="pair", protocol=Protocol())
    plan = build_plan(profile, [foreign], (variant,), limit, images_per_prompt)
    notes = [note for note in plan.assumptions if note not in profile.assumptions]
    made = f"{workload.name}'s images were made elsewhere: size, steps and guidance in the results are the profile's"
    return replace(plan, assumptions=(made, *notes))


def find_images(folder: ImageFolder, layout: ImageLayout, plan: Plan) -> ImportedImages:
    """The files of the plan's only benchmark. UserError where there are none, where two are the same image, and where
    GenEval's metadata are missing or of other prompts."""
    (workload,) = plan.workloads.values()
    found = layout.find(folder.sizes)
    if isinstance(layout, GenEvalLayout):
        _check_metadata(folder, layout, workload.prompts, found)
    files: dict[int, str | NoImage] = {}
    for sample in (sample for shard in plan.shards for sample in shard.samples):
        name = found.get((sample.prompt_index, sample.image_index))
        files[sample.noise_seed] = name or _missing(layout, workload.prompts[sample.prompt_index], sample.image_index)
    n_found = sum(isinstance(name, str) for name in files.values())
    if not n_found:
        raise UserError(
            f"folder {folder.uri}: none of its {len(folder.sizes):,} files is an image of {workload.name} by this "
            "layout; correct the folder, --layout or --benchmark"
        )
    n_images = sum(name.endswith(".png") for name in folder.sizes)
    return ImportedImages(folder, files, found, n_images - n_found)


def check_seen(folder: ImageFolder, nodes: Sequence[str]) -> None:
    """UserError where one of `nodes` (Ray's ids) does not see a local folder: there every image would be missing."""
    if len(nodes) < 2 or not folder.local:
        return
    answers = on_nodes(nodes, os.path.isdir, folder.root)
    if not all(answers):
        raise UserError(
            f"folder {folder.uri}: {answers.count(False)} of {len(nodes)} nodes do not see it; "
            "put it on a shared volume, or give a URI that every node reaches"
        )


def _missing(layout: ImageLayout, prompt: PromptRecord, image_index: int) -> NoImage:
    try:
        return NoImage(f"{layout.image_name(prompt, image_index)}: no such file")
    except ValueError as error:
        return NoImage(str(error))


def _check_metadata(
    folder: ImageFolder, layout: GenEvalLayout, prompts: Mapping[int, PromptRecord], found: Mapping[Place, str]
) -> None:
    """A folder's number alone does not say of which list its prompt is."""

    def check(index: int) -> None:
        name = layout.metadata_name(prompts[index])
        try:
            about = json.loads(folder.read(name))
            theirs = about["prompt"]
        except FileNotFoundError as error:
            raise UserError(
                f"{folder.uri}/{name}: no such file; it must hold the prompt of the images there"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder.uri}/{name}: must be a JSON object with the key prompt") from error
        if theirs != prompts[index].text:
            raise UserError(
                f"{folder.uri}/{name}: its prompt is '{theirs}', the benchmark's is '{prompts[index].text}'; "
                "name the benchmark that the images are of"
            )

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(check, sorted({index for index, _ in found} & prompts.keys())))
