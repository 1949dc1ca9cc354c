"""Training end to end on several GPUs: Ray Train starts a rank on each, and all of them share the models (FSDP2).

Ray must be initialised. On a cluster without GPUs the ranks run on its cores.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from bitflux_core.errors import UserError
from bitflux_core.files import read_json, write_json

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh

    from bitflux_core.benchmark.distill import DistillRow
    from bitflux_core.benchmark.models import Sizes
    from bitflux_core.quantizer.end_to_end import EndToEndTask

Work = Callable[["torch.device", "DeviceMesh"], None]


def check_gpus(gpus: int) -> None:
    """UserError for more GPUs than the cluster has; on one without GPUs, for more than it has cores."""
    kind = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
    here = int(ray.cluster_resources().get(kind, 0))
    if gpus > here:
        raise UserError(f"training on {gpus} {kind}s and {here} here: ask for no more")


def train(task: "EndToEndTask") -> None:
    """Runs the task to its end on `task.gpus` GPUs; its folder must be one that all nodes see. UserError as its own."""
    on_ranks(task.run, task.gpus)


def measure_training(row: "DistillRow", sizes: "Sizes", folder: Path) -> "DistillRow":
    """`row` with the figures of rank 0, or its error.

    UserError for more GPUs than there are and too little memory on one.
    """
    from bitflux_core.benchmark import distill

    with tempfile.TemporaryDirectory(prefix="distill-ranks-", dir=folder) as made:
        file = Path(made) / "row.json"

        def measure(device: "torch.device", mesh: "DeviceMesh") -> None:
            measured = distill.measure_training(row, sizes, device, Path(made), mesh)
            if mesh.get_local_rank() == 0:
                write_json(file, asdict(measured))

        try:
            on_ranks(measure, row.gpus)
        except UserError:
            raise
        except Exception as error:  # whatever a library raises: the other rows still count
            return replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return distill.DistillRow(**read_json(file, "measure again"))


def on_ranks(work: Work, gpus: int) -> None:
    """Calls `work` on every rank with its device and the mesh of all. A UserError of a rank is raised here."""
    check_gpus(gpus)
    use_gpu = bool(ray.cluster_resources().get("GPU"))

    def rank() -> None:
        from torch.distributed.device_mesh import init_device_mesh

        device = get_device()
        work(device, init_device_mesh(device.type, (gpus,)))

    with tempfile.TemporaryDirectory(prefix="ray-train-") as storage:  # work keeps its own checkpoints
        trainer = TorchTrainer(
            rank,
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=gpus, use_gpu=use_gpu),
            run_config=RunConfig(name="distill", storage_path=storage, failure_config=FailureConfig(max_failures=0)),
        )
        try:
            trainer.fit()
        except Exception as error:
            mistake = _user_error_in(error)
            if mistake:
                raise mistake from error
            raise


def _user_error_in(error: BaseException) -> UserError | None:
    """The mistake of the user's that made a rank fail, wherever Ray has put it."""
    pending: list[object] = [error]
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if isinstance(part, UserError):
            return UserError(str(part))
        if not isinstance(part, BaseException) or id(part) in seen:
            continue
        seen.add(id(part))
        pending += [part.__cause__, part.__context__, getattr(part, "cause", None)]
        pending += getattr(part, "worker_failures", {}).values()
    return None
