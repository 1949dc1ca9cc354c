"""The actors of a run and what each asks Ray for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from cluster.evaluator import EvaluatorActor
from cluster.plan import Plan
from cluster.pool_size import HELPER_CPUS, REPLICA_CPUS, GpuType, uses_gpus
from cluster.profile import Profile
from cluster.replica import ReplicaActor
from cluster.store import ResultStore
from cluster.text_encoder import TextEncoderActor

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles


@dataclass(frozen=True)
class Workers:
    """How to make one actor of each kind: functions that return a fresh Ray actor handle, and how many evaluators.

    Their methods: `start(variant)` and `draw` of a replica, `start()` and `encode` of a text encoder, `start()` and
    `score` of an evaluator, as ReplicaActor, TextEncoderActor and EvaluatorActor have them. `replica` is called with
    the type of GPU to run on where the profile names any, else without an argument.
    """

    replica: Callable[..., Any]
    text_encoder: Callable[[], Any]
    evaluator: Callable[[], Any]
    evaluators: int = 1


def model_workers(plan: Plan, profile: Profile, files: "ModelFiles", store: ResultStore) -> Workers:
    """The actors that hold real models."""
    asked = profile.resources
    on_gpus = uses_gpus(asked)
    text_encoder = actor_class(TextEncoderActor, HELPER_CPUS, asked.text_encoder_gpus if on_gpus else 0)

    @cache
    def replica(gpu_type: GpuType = None) -> Any:
        return actor_class(ReplicaActor, REPLICA_CPUS, asked.replica_gpus if on_gpus else 0, gpu_type)

    return Workers(
        lambda *gpu_type: replica(*gpu_type).remote(files.pipeline, files.ternary, plan.dtype, plan.sampling),
        lambda: text_encoder.remote(files.pipeline, plan.dtype, plan.sampling.max_sequence_length),
        evaluator_actors(plan, profile, files.scoring, store),
        asked.evaluators,
    )


def evaluator_actors(
    plan: Plan, profile: Profile, models: Mapping[str, Path | str], store: ResultStore
) -> Callable[[], Any]:
    """How to make an evaluator of the plan's benchmarks; `models` are what it needs, by role."""
    asked = profile.resources
    evaluator = actor_class(EvaluatorActor, HELPER_CPUS, asked.evaluator_gpus if uses_gpus(asked) else 0)
    evaluators = {workload.name: workload.evaluator for workload in plan.workloads.values()}
    return lambda: evaluator.remote(evaluators, models, store)


def actor_class(cls: type, cpus: float, gpus: float = 0, gpu_type: GpuType = None) -> Any:
    """`cls` as the scheduler's actors are to be, and what each asks Ray for; its `remote` makes one."""
    # The scheduler replaces actors itself, and queues a second call on each: Ray must neither restart nor interleave.
    options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
    return ray.remote(cls).options(num_cpus=cpus, num_gpus=gpus, accelerator_type=gpu_type, **options)
