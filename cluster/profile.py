"""A profile: which models to run, how they draw, and on what. Declared in manifests/profiles or a user's YAML."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

from bitflux_core.distill_recipe import Optimizer
from bitflux_core.errors import UserError
from bitflux_core.samples import PIXELS_PER_TOKEN, Sampling
from cluster.manifests import MANIFESTS, MOST_IMAGES, describe, find_manifest, read_manifest

LONGEST_TEXT = 512  # T5 tokens
MINI_WORLD = "mini-world"  # calibration prompts that are made, not read

Gpus = Annotated[float, Field(ge=0)]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class _Declaration(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Declaration):
    """Where the weights are: a folder (absolute, or relative to the profile's file or the repository) or a hub id.

    GenEval is scored by `detector` and `clip`, T2I-CompBench by `vqa`, `named_detector`, `depth` and `clip_score`, or
    by `judge` alone; what no benchmark of a run needs may be missing. `language` is no model of a folder but the tool
    that takes prompts apart: spaCy, our rules, or spaCy where it is installed.
    """

    pipeline: str
    ternary: str | None = None
    detector: str | None = None
    clip: str | None = None
    vqa: str | None = None
    named_detector: str | None = None
    depth: str | None = None
    clip_score: str | None = None
    judge: str | None = None
    language: Literal["auto", "spacy", "rules"] = "auto"


class Resources(_Declaration):
    """GPUs that one actor asks Ray for where the cluster has any; without GPUs each actor takes one CPU.

    `needs_gpu`: the actors ask for GPUs even where the cluster has none yet, so that an autoscaler brings them.
    `gpu_types`: the kinds of GPU that replicas may run on, by Ray's names (H100, A100, L40S, ...), with the speed of
    each relative to the others; empty for any kind, all alike.
    """

    replica_gpus: Gpus = 1.0
    text_encoder_gpus: Gpus = 0.0
    evaluator_gpus: Gpus = 0.0
    evaluators: PositiveInt = 1
    needs_gpu: bool = False
    gpu_types: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}


class Cost(_Declaration):
    """Expected seconds, as on the machines that the profile is meant for, and bytes. The seconds cut the work into
    shards of like duration; nothing here changes an image.

    `megapixel_step`: of drawing one megapixel for one denoising step. `evaluators`: of scoring one image, by the
    evaluator's name; nothing for those not named. `png_bytes_per_pixel`, `row_bytes`: of an image's file and of its row
    in the results.
    """

    megapixel_step: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.13
    evaluators: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    png_bytes_per_pixel: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.5
    row_bytes: PositiveInt = 1_000


class Recipe(_Declaration):
    """How jobs/quantize.py makes the ternary weights where its command line says nothing else.

    Numbers of calibration prompts, of training steps for each block and end to end, and of the latter's images a step
    and prompts; None: the profile's batch_size, and all prompts there are. The optimizer and learning rate of its
    latent weights: see bitflux_core/distill_recipe.py.
    """

    calibration_prompts: PositiveInt = 64
    reconstruction_steps: NonNegativeInt = 0
    distill_steps: NonNegativeInt = 0
    distill_batch: PositiveInt | None = None
    distill_prompts: PositiveInt | None = None
    distill_optimizer: Optimizer | None = None
    distill_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Profile(_Declaration):
    """A model pair, its sampler settings and the benchmarks it runs. `batch_size` is the fixed size of every batch,
    `shard_seconds` how long a shard should take at the declared `cost`.

    `mode`: how T2I-CompBench is judged, see evaluators/modes.py. `calibration` names the prompts to quantize with:
    `mini-world`, or a workload; without it they are a file of the user's. `quantize` is how they are used.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    models: Models
    sampling: Sampling
    batch_size: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"]
    benchmarks: Names
    variants: Names
    mode: Literal["official", "compatible", "corrected", "judge"] = "compatible"
    limit: PositiveInt | None = None
    images_per_prompt: Annotated[int, Field(ge=1, le=MOST_IMAGES)] | None = None
    resources: Resources = Resources()
    cost: Cost = Cost()
    shard_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 240.0
    assumptions: tuple[str, ...] = ()
    calibration: Annotated[str, Field(min_length=1)] | None = None
    quantize: Recipe = Recipe()

    def image_seconds(self, evaluator: str) -> float:
        """Expected seconds to draw one image and have `evaluator` score it."""
        return self.drawing_seconds + self.scoring_seconds(evaluator)

    @property
    def drawing_seconds(self) -> float:
        """Expected seconds to draw one image."""
        megapixels = self.sampling.width * self.sampling.height / 1e6
        return megapixels * self.sampling.steps * self.cost.megapixel_step

    def scoring_seconds(self, evaluator: str) -> float:
        """Expected seconds to score one image."""
        return self.cost.evaluators.get(evaluator, 0.0)

    @field_validator("sampling")
    @classmethod
    def _can_be_drawn(cls, sampling: Sampling) -> Sampling:
        for side in ("width", "height"):
            if getattr(sampling, side) < 1 or getattr(sampling, side) % PIXELS_PER_TOKEN:
                raise ValueError(f"{side} must be a positive multiple of {PIXELS_PER_TOKEN} pixels")
        if sampling.steps < 1:
            raise ValueError("steps must be at least 1")
        if not 1 <= sampling.max_sequence_length <= LONGEST_TEXT:
            raise ValueError(f"max_sequence_length must be from 1 to {LONGEST_TEXT}, FLUX's longest text")
        if not 0 <= sampling.guidance < float("inf"):
            raise ValueError("guidance must be a number of at least 0")
        return sampling

    @field_validator("benchmarks", "variants")
    @classmethod
    def _named_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{', '.join(repeated)} named more than once; name each once")
        return names


def load_profile(name_or_path: str) -> Profile:
    """The embedded profile of that name, or the one in a user's YAML file. Raises UserError for any fault in it."""
    path = find_manifest("profile", name_or_path)
    profile = read_manifest(path, Profile, defaults={"name": path.stem})
    return profile if path.is_relative_to(MANIFESTS) else _anchored(profile, path.resolve().parent)


def changed(profile: Profile, changes: dict[str, object]) -> Profile:
    """The profile with other values for some of its fields. Raises UserError as for a profile's file."""
    try:
        return Profile.model_validate({**profile.model_dump(), **changes})
    except ValidationError as error:
        raise UserError(describe(error)) from error


def _anchored(profile: Profile, folder: Path) -> Profile:
    """Model folders and workload files that lie beside a user's profile, as absolute paths; other names stay.

    A name that begins with `./` or `../` means a place beside the profile also where nothing is there yet, such as the
    ternary model that is still to be made. Any other may be a hub id, or lie in the repository.
    """

    def anchor(name: str) -> str:
        beside = folder / name
        return str(beside) if beside.exists() or name.startswith(("./", "../")) else name

    folders = {role: anchor(name) for role, name in profile.models if name is not None and role != "language"}
    benchmarks = tuple(anchor(name) for name in profile.benchmarks)
    calibration = anchor(profile.calibration) if profile.calibration else None
    changes = {
        "models": profile.models.model_copy(update=folders),
        "benchmarks": benchmarks,
        "calibration": calibration,
    }
    return profile.model_copy(update=changes)
