"""The matrix products of FLUX.1-dev's blocks as they are run, against cuBLAS in bf16 and fp8.

Legend: M tokens, N output features, K input features, J packed bytes a row (see kernels/packing.py).

A result is compared with the reference before it is timed; a wrong one gets no time.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import ops, reference
from kernels.packing import packed_width, unpack_planes
from kernels.timing import Timer

TOKENS = (1, 2, 4, 512, 4096, 4608, 18432)
SMALL_M = 16  # up to here a product waits for the weight's bytes, so its bandwidth says more than its TFLOP/s
FP8 = torch.float8_e4m3fn
FP8_ROWS = 16  # fp8 products want multiples of it
CHUNK = 8192  # output features that the reference computes at a time, in float64

# The reference is float32. bf16 keeps 8 bits, so rounding once errs by 2^-9 of the value; twice that is allowed, and
# for sums that cancel a share of the largest value.
RELATIVE_TOLERANCE = 2**-8
TOLERANCE_OF_LARGEST = 2**-12


class Layer(NamedTuple):
    """A product of the blocks: weight [out_features, in_features], at each of these numbers of tokens."""

    name: str
    out_features: int
    in_features: int
    tokens: tuple[int, ...] = TOKENS


# Layers that share an input run as one product (bitflux_core/fused.py). Modulation sees a token an image.
FLUX_DEV = (
    Layer("q, k, v", 9216, 3072),
    Layer("attention out", 3072, 3072),
    Layer("MLP in", 12288, 3072),
    Layer("q, k, v, MLP in (single block)", 21504, 3072),
    Layer("MLP out", 3072, 12288),
    Layer("out (single block)", 3072, 15360),
    Layer("all modulations", 1050624, 3072, (1, 2, 4)),
)
TINY = (Layer("tiny", 48, 64, (1, 24)), Layer("tiny, wide", 96, 32, (2,)))  # a smoke run on a CPU


@dataclass
class GemmRow:
    """One layer at one number of tokens. None: not measured, for the reason in `error` or for want of hardware.

    Attributes:
        layer, out_features, in_features, tokens: what was multiplied; in_features x out_features is the weight.
        bf16_ms: cuBLAS in bf16, normally distributed weights. All times are medians in milliseconds, bias included.
        fp8_ms: `torch._scaled_mm` in float8_e4m3fn with a scale a row of both, activations quantized beforehand.
        unpack_fp8_ms: the whole ternary weight unpacked to fp8, then that product.
        ternary_ms: ours, activations in bf16.
        ternary_int8_ms: ours, activations quantized to int8 beforehand.
        ternary_int8_quantize_ms: the same with their quantization in it.
        gemlite_ms: GemLite's A8W158, its quantization included; only where GemLite is installed.
        bf16_tflops, fp8_tflops, ternary_tflops, ternary_int8_tflops: 2 M N K operations by those times.
        ternary_speed_of_bf16, int8_speed_of_bf16, int8_speed_of_fp8: ours against theirs; 1 is as fast, 2 twice.
        packed_mb: bytes / 1e6 of the packed weight.
        ternary_gb_s, int8_gb_s: those bytes by those times, up to SMALL_M tokens.
        ternary_of_copy, int8_of_copy: share of the bandwidth (read and written bytes) of a copy in the same run.
        ternary_error, int8_error: largest difference from the reference, as a share of its largest value.
        error: what went wrong, a line.
    """

    layer: str
    out_features: int
    in_features: int
    tokens: int
    bf16_ms: float | None = None
    fp8_ms: float | None = None
    unpack_fp8_ms: float | None = None
    ternary_ms: float | None = None
    ternary_int8_ms: float | None = None
    ternary_int8_quantize_ms: float | None = None
    gemlite_ms: float | None = None
    bf16_tflops: float | None = None
    fp8_tflops: float | None = None
    ternary_tflops: float | None = None
    ternary_int8_tflops: float | None = None
    ternary_speed_of_bf16: float | None = None
    int8_speed_of_bf16: float | None = None
    int8_speed_of_fp8: float | None = None
    packed_mb: float = 0.0
    ternary_gb_s: float | None = None
    int8_gb_s: float | None = None
    ternary_of_copy: float | None = None
    int8_of_copy: float | None = None
    ternary_error: float | None = None
    int8_error: float | None = None
    error: str | None = None


def measure_layers(
    layers: tuple[Layer, ...], device: torch.device, measure: Timer, copy_gb_s: float
) -> Iterator[GemmRow]:
    """A row a layer and number of tokens, over fresh random data; `copy_gb_s` from timing.copy_bandwidth."""
    for layer in layers:
        weights = Weights(layer, device)
        for tokens in layer.tokens:
            row = GemmRow(*layer[:3], tokens, packed_mb=weights.packed_NJ.nbytes / 1e6)
            x_MK = torch.randn(tokens, layer.in_features, dtype=torch.bfloat16, device=device)
            _measure_row(row, weights, x_MK, measure)
            _derive(row, copy_gb_s)
            yield row


class Weights:
    """Random weights of a layer, in every form; normal ones for cuBLAS, whose power depends on what it multiplies."""

    def __init__(self, layer: Layer, device: torch.device):
        rows, columns = layer.out_features, layer.in_features
        self.dense_NK = torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        self.bias_N = torch.randn(rows, dtype=torch.bfloat16, device=device)
        self.packed_NJ = random_packed(rows, columns, device)
        self.scale_N = torch.rand(rows, device=device).add_(0.5).mul_(0.02)
        self.fp8 = fp8_rows(self.dense_NK) if has_fp8(device) else None

    @property
    def ternary(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed_NJ, self.scale_N, self.bias_N


def random_packed(rows: int, columns: int, device: torch.device | str) -> Tensor:
    """Uniformly random packed codes [N, J]; `columns` is a multiple of 4, so that no padding has a rule to keep."""
    packed_NJ = torch.zeros(rows, packed_width(columns), dtype=torch.uint8, device=device)
    for plane in range(4):
        packed_NJ |= torch.randint(0, 3, packed_NJ.shape, dtype=torch.uint8, device=device) << (2 * plane)
    return packed_NJ


def has_fp8(device: torch.device) -> bool:
    """Whether there are fp8 products: tensor cores from compute capability 8.9 on, and torch's own on the CPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """(values float8 [M, K], scale float32 [M, 1]) of a bf16 matrix, the largest of each row at fp8's largest."""
    scale_M1 = x_MK.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(FP8).max
    return (x_MK * scale_M1.reciprocal().to(x_MK.dtype)).to(FP8), scale_M1


def fp8_product(x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias_N: Tensor) -> Tensor:
    """[M, N] in bf16."""
    return torch._scaled_mm(
        x[0], weight[0].t(), x[1], weight[1].t(), bias=bias_N, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def unpacked_fp8(packed_NJ: Tensor, in_features: int) -> Tensor:
    """The codes [N, K] as float8."""
    if packed_NJ.device.type != "cuda":
        return unpack_planes(packed_NJ, in_features).to(FP8)
    from kernels.gemm import unpack  # needs Triton, which CPU-only platforms may lack

    return unpack(packed_NJ, in_features, FP8)


def _measure_row(row: GemmRow, weights: Weights, x_MK: Tensor, measure: Timer) -> None:
    """Fills in the times. What fails in one is said in `row.error` and leaves the others alone."""
    quantized = reference.quantize(x_MK)
    in_features, dtype = x_MK.shape[1], x_MK.dtype

    def dense() -> Tensor:
        return F.linear(x_MK, weights.dense_NK, weights.bias_N)

    def ternary() -> Tensor:
        return ops.matmul(x_MK, *weights.ternary)

    def int8() -> Tensor:
        return ops.matmul_int8(quantized, *weights.ternary, in_features=in_features, dtype=dtype)

    def quantize_int8() -> Tensor:
        return ops.matmul_int8(ops.quantize(x_MK), *weights.ternary, in_features=in_features, dtype=dtype)

    def check_ternary() -> None:
        def expected(packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return reference.matmul(x_MK.float(), packed, scale, bias, None, None, in_features)

        row.ternary_error = _checked(ternary(), weights, expected)

    def check_int8() -> None:
        def expected(packed: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return reference.matmul_int8(quantized, packed, scale, bias, None, None, in_features, torch.float32)

        row.int8_error = _checked(int8(), weights, expected)

    def check_quantize() -> None:
        if not torch.equal(ops.quantize(x_MK).values_MP, quantized.values_MP):
            raise ArithmeticError("wrong result: the quantized activations differ")

    jobs: list[tuple[str, Callable[[], object], Callable[[], None] | None]] = [
        ("bf16_ms", dense, None),
        ("ternary_ms", ternary, check_ternary),
        ("ternary_int8_ms", int8, check_int8),
        ("ternary_int8_quantize_ms", quantize_int8, check_quantize),
    ]
    weight8 = weights.fp8
    if weight8 is not None:
        x8 = fp8_rows(F.pad(x_MK, (0, 0, 0, -len(x_MK) % FP8_ROWS)))
        scale_N1 = weights.scale_N[:, None]

        def unpack_fp8() -> Tensor:
            return fp8_product(x8, (unpacked_fp8(weights.packed_NJ, in_features), scale_N1), weights.bias_N)

        jobs.append(("fp8_ms", lambda: fp8_product(x8, weight8, weights.bias_N), None))
        jobs.append(("unpack_fp8_ms", unpack_fp8, lambda: _check_unpacked(weights.packed_NJ, in_features)))
    if importlib.util.find_spec("gemlite") and x_MK.device.type == "cuda":
        jobs.append(("gemlite_ms", _gemlite(weights, x_MK), None))

    errors = []
    for column, call, check in jobs:
        try:
            if check is not None:
                check()
            setattr(row, column, measure(call))
        except Exception as error:  # whatever a library or a kernel raises: the other columns still count
            if "CUBLAS_STATUS_NOT_SUPPORTED" in str(error):
                continue  # cuBLAS has no fp8 product for few tokens and many inputs: a dash, and no failure of ours
            errors.append(f"{column.removesuffix('_ms')}: {' '.join(str(error).split())[:200]}")
    row.error = "; ".join(errors) or None


def _checked(y_MN: Tensor, weights: Weights, expected: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """The largest error as a share of the reference's largest value. ArithmeticError where it is too large."""
    largest, worst, wrong = 0.0, 0.0, 0
    parts = (part.split(CHUNK) for part in (*weights.ternary, y_MN.t()))
    for packed, scale, bias, y_NM in zip(*parts, strict=True):
        reference_MN = expected(packed, scale, bias)
        error_MN = (y_NM.t().float() - reference_MN).abs()
        top = float(reference_MN.abs().max())
        allowed_MN = RELATIVE_TOLERANCE * reference_MN.abs() + TOLERANCE_OF_LARGEST * top
        wrong += int((~(error_MN <= allowed_MN)).sum())  # a NaN is wrong too
        largest, worst = max(largest, top), max(worst, float(error_MN.max()))
    if wrong:
        raise ArithmeticError(f"wrong result: {wrong} of {y_MN.numel()} values, by up to {worst / largest:.2g}")
    return worst / largest


def _check_unpacked(packed_NJ: Tensor, in_features: int) -> None:
    for packed in packed_NJ.split(CHUNK):
        if not torch.equal(unpacked_fp8(packed, in_features).float(), unpack_planes(packed, in_features).float()):
            raise ArithmeticError("wrong result: the unpacked codes differ")


def _gemlite(weights: Weights, x_MK: Tensor) -> Callable[[], object]:
    """GemLite's layer over the same codes; it takes one scale for the whole weight. Built at the first call."""
    layers: list[Callable[[Tensor], Tensor]] = []

    def call() -> object:
        if not layers:
            from gemlite import helper

            kind = getattr(helper, "A8W158_INT_dynamic", None) or helper.A8W158
            codes_NK = unpack_planes(weights.packed_NJ, x_MK.shape[1]).to(x_MK.dtype)
            layers.append(kind(device=str(x_MK.device)).from_weights(codes_NK, weights.scale_N.mean(), weights.bias_N))
        return layers[0](x_MK)

    return call


def _derive(row: GemmRow, copy_gb_s: float) -> None:
    operations = 2 * row.tokens * row.out_features * row.in_features
    for kind in ("bf16", "fp8", "ternary", "ternary_int8"):
        setattr(row, f"{kind}_tflops", _quotient(operations / 1e9, getattr(row, f"{kind}_ms")))
    row.ternary_speed_of_bf16 = _quotient(row.bf16_ms, row.ternary_ms)
    row.int8_speed_of_bf16 = _quotient(row.bf16_ms, row.ternary_int8_ms)
    row.int8_speed_of_fp8 = _quotient(row.fp8_ms, row.ternary_int8_ms)
    if row.tokens <= SMALL_M:
        row.ternary_gb_s = _quotient(row.packed_mb, row.ternary_ms)
        row.int8_gb_s = _quotient(row.packed_mb, row.ternary_int8_ms)
        row.ternary_of_copy = _quotient(row.ternary_gb_s, copy_gb_s)
        row.int8_of_copy = _quotient(row.int8_gb_s, copy_gb_s)


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None
