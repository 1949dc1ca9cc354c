"""On what an actor computes. Heavy imports stay inside functions here and in the actors: the driver needs none."""

import gc
import os
import socket

import ray


def claim_device() -> str:
    """`cuda` where Ray gave this actor a GPU, else `cpu` with a single thread. Call it before any model is loaded.

    From then on this process asks no model hub: what a model's folder lacks is an error. Many actors at once would
    each download it, and what they got could differ from what the run's fingerprints say.

    Sums split over threads differ in their last bits, so one thread makes the results the same however many actors
    share the machine.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # the variable is read on import, which may be past
    if ray.get_gpu_ids():
        return "cuda"
    import torch

    torch.set_num_threads(1)
    return "cpu"


def free_memory(device: str) -> None:
    """Hands back what nothing refers to any more, the CUDA allocator's reserve included."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def device_name(device: str) -> str:
    """The GPU's model name, or `cpu`."""
    if device != "cuda":
        return device
    import torch

    return torch.cuda.get_device_name()


def worker_host() -> str:
    """This process, for people who look for its logs: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"
