"""Block sizes of the ternary matrix products, and safe choices for every supported GPU."""

import dataclasses
from typing import Any, Literal

Kind = Literal["int8", "16bit"]
SMALL_M = 16  # up to so many tokens the product waits for the weight's bytes alone


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How a product is cut. A tile is block_n x block_m of the result; a step reads block_j packed bytes of a row,
    which are 4 x block_j codes. `kernel` "hopper" is the warp-specialized one of kernels/_gemm_hopper.py (compute
    capability 9.0, block_n 64 a warpgroup or 128), "tile" runs anywhere.
    """

    block_n: int
    block_m: int
    block_j: int
    warps: int
    stages: int
    group: int = 8  # tiles of tokens that share a strip of weights before the next strip is begun
    flatten: bool = False  # "tile": the first loads of the next tile overlap the last step of this one
    subtiles: int = 1  # parts of a tile that are turned round and stored one after the other
    kernel: Literal["tile", "pointers", "hopper"] = "tile"
    residents: int = 1  # thread blocks that share a multiprocessor, each with its tiles


def config_to_dict(config: GemmConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)


def config_from_dict(fields: dict[str, Any]) -> GemmConfig:
    return GemmConfig(**fields)


def default_config(kind: Kind, tokens: int, out_features: int, in_features: int, capability: int) -> GemmConfig:
    """A choice that compiles without spilling and fits the shared memory of `capability` (80, 86, 89, 90, 100)."""
    byte = kind == "int8"
    loads: Literal["tile", "pointers"] = "pointers" if capability < 90 else "tile"
    if capability == 90:
        return _hopper_config(byte, tokens)
    if tokens <= SMALL_M:
        wide = capability not in (86, 89)
        stages = (5 if byte else 4) if wide else (3 if byte else 2)
        return GemmConfig(128 if wide else 64, 16, 64, warps=4, stages=stages, kernel=loads)
    if tokens <= 128:
        return GemmConfig(64, 64, 32, warps=4, stages=3, subtiles=2, kernel=loads)
    if capability >= 100 and not byte:  # of twice as many tokens Triton 3.6 and 3.7 make a kernel that only traps
        return GemmConfig(128, 64, 32, warps=4, stages=3, subtiles=2)
    return GemmConfig(128, 128, 32, warps=8, stages=3 if byte else 2, subtiles=4, kernel=loads)


def _hopper_config(byte: bool, tokens: int) -> GemmConfig:
    """What was fastest on an H200 at nearly every shape."""
    narrow = 8 if tokens <= 8 else 16
    if tokens <= SMALL_M and byte:
        return GemmConfig(128, narrow, 128, warps=4, stages=4, kernel="hopper", residents=2)
    if tokens <= SMALL_M:
        return GemmConfig(128, narrow, 64, warps=4, stages=4, kernel="hopper", residents=3)
    if tokens <= 128:
        return GemmConfig(128, 64, 64 if byte else 32, warps=4, stages=3, subtiles=2, kernel="hopper", residents=2)
    return GemmConfig(
        128, 128, 64 if byte else 32, warps=4, stages=2 if byte else 3, subtiles=4, kernel="hopper", residents=2
    )
