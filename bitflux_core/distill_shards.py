"""Teacher and latents spread over several GPUs by FSDP2, and how one rank sees its part.

Legend: N rows of a weight.
"""

import math

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from bitflux_core.layers import BLOCKS
from bitflux_core.linear import TernaryLinear


def shard(model: FluxTransformer2DModel, mesh: DeviceMesh, whole: set[nn.Parameter]) -> None:
    """Leaves this rank's rows of every weight but those of `whole`; a block's are gathered while it is computed."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for kind in BLOCKS:
        for block in getattr(model, kind):
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


def whole_linear(linear: nn.Linear | TernaryLinear) -> nn.Linear | TernaryLinear:
    """A sharded model's layer with its weights from all ranks, each of which must call it; any other layer itself."""
    if isinstance(linear, TernaryLinear) or not isinstance(linear.weight, DTensor):
        return linear
    whole = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    state = {name: whole_of(parameter.detach()) for name, parameter in linear.named_parameters()}
    whole.load_state_dict(state, assign=True)
    return whole


def whole_of(tensor: Tensor) -> Tensor:
    """A sharded tensor from all ranks, each of which must call it; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_rows(row_N: Tensor, latent: Tensor) -> Tensor:
    """The row moments of all ranks."""
    if not isinstance(latent, DTensor):
        return row_N
    whole = torch.Size([latent.shape[0]])
    return DTensor.from_local(row_N, latent.device_mesh, [Shard(0)], shape=whole, stride=(1,)).full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole `local` gives: FSDP2 cuts rows as torch.chunk does."""
    if not isinstance(tensor, DTensor):
        return slice(0, tensor.shape[0])
    rows, rank = tensor.shape[0], tensor.device_mesh.get_local_rank()
    size = math.ceil(rows / tensor.device_mesh.size())
    return slice(min(rank * size, rows), min((rank + 1) * size, rows))


def over_ranks(latent: Tensor, partial: Tensor) -> Tensor:
    """The sum over the ranks that share `latent`."""
    if isinstance(latent, DTensor):
        dist.all_reduce(partial, group=latent.device_mesh.get_group())
    return partial
