"""The plan: every image to draw, its shard and its fixed batch, decided before any worker starts.

The samples of a benchmark are cut into batches, and the batches into shards of like duration, in the same way for every
variant. Durations are those that the profile declares: the workers' number or real speed changes nothing. The plan's
digest names the run: equal digests mean equal results.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from bitflux_core.errors import UserError
from bitflux_core.samples import Sample, Sampling, SeedRule
from cluster.profile import Profile
from cluster.workload import PromptRecord, Workload

# Part of the digest: raise it where the same declarations begin to mean different work.
PLAN_VERSION = 2

# A shard's images travel from replica to evaluator as one object of Ray's store.
MOST_SHARD_BYTES = 256_000_000

T = TypeVar("T")


class ShardKey(NamedTuple):
    """What a shard's file is named by. The number counts within one variant and benchmark."""

    variant: str
    benchmark: str
    number: int

    def __str__(self) -> str:
        return f"{self.variant}/{self.benchmark}/{self.number}"


@dataclass(frozen=True)
class Shard:
    """The images of one result file. Every batch is full but for the last one of its benchmark.

    `expected_s`: seconds to draw and score them at the cost that the profile declares.
    """

    key: ShardKey
    batches: tuple[tuple[Sample, ...], ...]
    expected_s: float

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """All samples in the order of their batches; a sample's place here is its position in the shard."""
        return tuple(sample for batch in self.batches for sample in batch)


@dataclass(frozen=True)
class PlannedWorkload:
    """The part of a workload that is drawn: prompts by their index in the benchmark."""

    name: str
    evaluator: str
    seed: int
    images_per_prompt: int
    source_digest: str
    batches_per_shard: int
    prompts: dict[int, PromptRecord]
    seed_rule: SeedRule = "pair"

    @cached_property
    def prompts_digest(self) -> str:
        """SHA-256 of all that is drawn and scored: index, tag, text and metadata of each prompt."""
        return _digest([[p.index, p.tag, p.text, p.metadata] for p in self.prompts.values()])

    @property
    def identity(self) -> list[Any]:
        """All of it that the results depend on. The default seed rule adds nothing, so that earlier runs go on."""
        parts = [self.name, self.evaluator, self.seed, self.images_per_prompt, self.batches_per_shard]
        return [*parts, self.prompts_digest, *(() if self.seed_rule == "pair" else (self.seed_rule,))]


@dataclass(frozen=True)
class Plan:
    """All shards of a run. `fingerprints` (of each variant, and of the shared models) is None in a dry run."""

    profile: str
    variants: tuple[str, ...]
    sampling: Sampling
    dtype: str
    batch_size: int
    workloads: dict[str, PlannedWorkload]
    shards: tuple[Shard, ...]
    fingerprints: dict[str, str] | None
    assumptions: tuple[str, ...]

    @cached_property
    def digest(self) -> str | None:
        """SHA-256, in hex, of all that the results depend on; None where the models are not known."""
        if self.fingerprints is None:
            return None
        return _digest(
            {
                "version": PLAN_VERSION,
                "variants": sorted(self.variants),
                "sampling": asdict(self.sampling),
                "dtype": self.dtype,
                "batch_size": self.batch_size,
                "workloads": sorted(w.identity for w in self.workloads.values()),
                "fingerprints": self.fingerprints,
            }
        )

    @property
    def run_id(self) -> str | None:
        """The run's default name."""
        return self.digest[:16] if self.digest else None

    @cached_property
    def n_samples(self) -> int:
        """Images to draw, all variants together."""
        return sum(len(shard.samples) for shard in self.shards)

    @cached_property
    def prompts(self) -> list[str]:
        """The distinct prompts in the order of the plan."""
        return list(dict.fromkeys(p.text for w in self.workloads.values() for p in w.prompts.values()))

    def fingerprint(self, variant: str) -> str:
        """Fingerprint of the weights that draw `variant`. Only of a plan that knows its models."""
        if self.fingerprints is None:
            raise ValueError("a dry run's plan knows no fingerprints")
        return self.fingerprints[variant]

    def sample_ids(self, shard: Shard) -> list[str]:
        """Ids of the shard's samples, by position."""
        variant = shard.key.variant
        fingerprint = self.fingerprint(variant)
        return [sample.sample_id(variant, self.dtype, fingerprint) for sample in shard.samples]

    def describe(self) -> dict[str, Any]:
        """The plan in plain values, for people and for the run's manifest."""
        return {
            "digest": self.digest,
            "profile": self.profile,
            "variants": list(self.variants),
            "sampling": asdict(self.sampling),
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "images": self.n_samples,
            "shards": len(self.shards),
            "benchmarks": [
                {
                    "name": w.name,
                    "evaluator": w.evaluator,
                    "seed": w.seed,
                    "seed_rule": w.seed_rule,
                    "prompts": len(w.prompts),
                    "images_per_prompt": w.images_per_prompt,
                    "batches_per_shard": w.batches_per_shard,
                    "prompts_digest": w.prompts_digest,
                    "source_digest": w.source_digest,
                }
                for w in self.workloads.values()
            ],
            "fingerprints": self.fingerprints,
            "assumptions": list(self.assumptions),
        }


def build_plan(
    profile: Profile,
    workloads: Sequence[Workload],
    variants: Sequence[str],
    limit: int | None = None,
    images_per_prompt: int | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> Plan:
    """Plans `variants` over `workloads`: the first `limit` prompts of each tag, `images_per_prompt` images of each.

    None means all prompts, the workload's own number of images, and a dry run without models. Raises UserError where
    two workloads share a name, since their results would share a folder.
    """
    names = [workload.name for workload in workloads]
    if len(set(names)) < len(names):
        raise UserError(f"benchmarks {', '.join(names)}: a name stands there twice; name each benchmark once")
    planned = {w.name: _planned(profile, w, limit, images_per_prompt or w.images_per_prompt) for w in workloads}
    shards: list[Shard] = []
    for workload in planned.values():
        samples = [
            Sample(workload.name, p.tag, p.index, p.text, image, workload.seed, profile.sampling, workload.seed_rule)
            for p in workload.prompts.values()
            for image in range(workload.images_per_prompt)
        ]
        batches = _chunks(samples, profile.batch_size)
        image_s = profile.image_seconds(workload.evaluator)
        # The variants alternate, so that both of a pair are drawn soon after each other.
        shards += [
            Shard(ShardKey(variant, workload.name, number), part, image_s * sum(map(len, part)))
            for number, part in enumerate(_chunks(batches, workload.batches_per_shard))
            for variant in variants
        ]
    return Plan(
        profile.name,
        tuple(variants),
        profile.sampling,
        profile.dtype,
        profile.batch_size,
        planned,
        tuple(shards),
        dict(fingerprints) if fingerprints is not None else None,
        (*profile.assumptions, *(note for w in workloads for note in _departures(profile, w, planned[w.name]))),
    )


def _departures(profile: Profile, workload: Workload, planned: PlannedWorkload) -> list[str]:
    """In which ways the plan is not what the benchmark's own harness would draw, a line each."""
    if workload.protocol is None:
        return []
    ours = {**asdict(profile.sampling), "seed_rule": planned.seed_rule, "images_per_prompt": planned.images_per_prompt}
    theirs = {**workload.protocol.model_dump(), "images_per_prompt": workload.images_per_prompt}
    lines = [
        f"{workload.name} is drawn with {name} {ours[name]}, not its protocol's {value}"
        for name, value in theirs.items()
        if value is not None and value != ours[name]
    ]
    if len(planned.prompts) < len(workload.prompts):
        lines.append(f"{workload.name} is drawn with {len(planned.prompts):,} of its {len(workload.prompts):,} prompts")
    return lines


def _planned(profile: Profile, workload: Workload, limit: int | None, images_per_prompt: int) -> PlannedWorkload:
    prompts = _first_of_each_tag(workload.prompts, limit)
    return PlannedWorkload(
        workload.name,
        workload.evaluator,
        workload.seed,
        images_per_prompt,
        workload.digest,
        _batches_per_shard(profile, workload.evaluator),
        {prompt.index: prompt for prompt in prompts},
        workload.seed_rule,
    )


def _batches_per_shard(profile: Profile, evaluator: str) -> int:
    """As many batches as should take the profile's `shard_seconds`, whatever the machines turn out to need."""
    wanted = round(profile.shard_seconds / (profile.batch_size * profile.image_seconds(evaluator)))
    bytes_a_batch = profile.batch_size * profile.sampling.width * profile.sampling.height * 3
    return max(1, min(wanted, MOST_SHARD_BYTES // bytes_a_batch))


def _first_of_each_tag(prompts: Iterable[PromptRecord], limit: int | None) -> list[PromptRecord]:
    taken: Counter[str] = Counter()
    kept = []
    for prompt in prompts:
        if limit is None or taken[prompt.tag] < limit:
            taken[prompt.tag] += 1
            kept.append(prompt)
    return kept


def _chunks(items: Sequence[T], size: int) -> list[tuple[T, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
