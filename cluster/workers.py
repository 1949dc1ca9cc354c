"""The actors of a run and what each asks Ray for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from bitflux_core.errors import UserError
from cluster.evaluator import EvaluatorActor
from cluster.plan import Plan
from cluster.profile import Profile, Resources
from cluster.replica import ReplicaActor
from cluster.store import ResultStore
from cluster.text_encoder import TextEncoderActor

if TYPE_CHECKING:
    from cluster.model_files import ModelFiles

# A replica a core, and the helpers beside them, fit on any machine. Not 0: a head node without cores runs no models.
REPLICA_CPUS = 0.8
HELPER_CPUS = 0.1


@dataclass(frozen=True)
class Workers:
    """How to make one actor of each kind: functions that return a fresh Ray actor handle.

    Their methods: `start(variant)` and `draw` of a replica, `start()` and `encode` of a text encoder, `start()` and
    `score` of an evaluator, as ReplicaActor, TextEncoderActor and EvaluatorActor have them.
    """

    replica: Callable[[], Any]
    text_encoder: Callable[[], Any]
    evaluator: Callable[[], Any]


def model_workers(plan: Plan, profile: Profile, files: "ModelFiles", store: ResultStore) -> Workers:
    """The actors that hold real models."""
    asked = profile.resources
    replica = _actor(ReplicaActor, REPLICA_CPUS, asked.replica_gpus)
    text_encoder = _actor(TextEncoderActor, HELPER_CPUS, asked.text_encoder_gpus)
    evaluator = _actor(EvaluatorActor, HELPER_CPUS, asked.evaluator_gpus)
    evaluators = {workload.name: workload.evaluator for workload in plan.workloads.values()}
    models = {"detector": files.detector, "clip": files.clip}
    return Workers(
        lambda: replica.remote(files.pipeline, files.ternary, plan.dtype, plan.sampling),
        lambda: text_encoder.remote(files.pipeline, plan.dtype, plan.sampling.max_sequence_length),
        lambda: evaluator.remote(evaluators, models, store),
    )


def _actor(cls: type, cpus: float, gpus: float) -> Any:
    # The scheduler replaces actors itself, and queues a second call on each: Ray must neither restart nor interleave.
    options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 1}
    return ray.remote(cls).options(num_cpus=cpus, num_gpus=gpus if cluster_gpus() else 0, **options)


def cluster_gpus() -> float:
    """GPUs of the whole cluster, busy ones included."""
    return ray.cluster_resources().get("GPU", 0.0)


def default_replicas(resources: Resources, variants: int) -> int:
    """As many replicas as the GPUs hold beside the helpers; without GPUs one a variant, as far as the cores go.

    Raises UserError where the GPUs hold none.
    """
    gpus = cluster_gpus()
    if not gpus:
        return max(1, min(int(ray.cluster_resources().get("CPU", 1.0)), variants))
    if not resources.replica_gpus:
        return variants
    helpers = resources.text_encoder_gpus + resources.evaluator_gpus
    if resources.replica_gpus >= 1:
        replicas = math.floor((gpus - math.ceil(helpers)) / resources.replica_gpus)
    else:
        a_gpu = math.floor(1 / resources.replica_gpus + 1e-6)
        spare = 1 - a_gpu * resources.replica_gpus
        taken = 0 if helpers <= spare + 1e-6 else math.ceil((helpers - spare) / resources.replica_gpus - 1e-6)
        replicas = int(gpus) * a_gpu - taken
    if replicas < 1:
        raise UserError(
            f"{gpus:g} GPUs hold no replica of {resources.replica_gpus:g} beside {helpers:g} for the text encoder and "
            "the evaluator; give smaller fractions under `resources` in the profile"
        )
    return replicas
