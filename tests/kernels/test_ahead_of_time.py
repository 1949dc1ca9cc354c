"""Every kernel compiled without a GPU for each supported compute capability: nothing spills, everything fits.

Processes of their own compile them and run this file: with `TRITON_INTERPRET` set there is nothing to compile.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # what a thread block may have
STACK_BYTES = 32  # a few registers that an epilogue spills cost nothing
REGISTERS = 16  # with fewer a kernel is a trap


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`signature` has Triton's type of each parameter, `constants` the others. Integers are multiples of 16."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    fp_fusion: bool = True


POINTERS = {"y_ptr": "*bf16", "scale_ptr": "*fp32", "bias_ptr": "*bf16", "gate_ptr": "*bf16", "residual_ptr": "*bf16"}
# Compiled without contracting multiplication and addition.
EXACT = ("_quantize_kernel", "_digits_kernel", "_rounded_kernel")
SIZES = ("tokens", "features", "plane_width", "tokens_an_image", "residual_stride")


def product(kind: str, tokens: int, capability: int, config: Any = None, digits: int = 1) -> Kernel:
    from kernels._gemm_config import default_config

    config = config or default_config(kind, tokens, 9216, 3072, capability)
    x_type = "i8" if kind == "int8" else "bf16"
    signature = POINTERS | dict.fromkeys(SIZES, "i32")
    constants = {
        "ONE_IMAGE": True, "DIGITS": digits, "GROUP": config.group, "STAGES": config.stages, "SUBTILES": config.subtiles
    }  # fmt: skip
    if kind == "int8":
        signature |= {"token_scale_ptr": "*fp32", "token_sum_ptr": "*i32"}
    else:
        constants |= {"token_scale_ptr": None, "token_sum_ptr": None}
    n, m, j = config.block_n, config.block_m, config.block_j
    if config.kernel == "hopper":
        from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, int8, uint8

        layout = NVMMASharedLayout.get_default_for([4, m, j], int8 if kind == "int8" else bfloat16)
        signature["x_desc"] = f"tensordesc<{x_type}[4, {m}, {j}],{layout!r}>"
        signature["packed_desc"] = f"tensordesc<u8[{n}, {j}],{NVMMASharedLayout.get_default_for([n, j], uint8)!r}>"
        return Kernel("_gemm_hopper", "gemm_hopper", signature, constants, config.warps)
    descriptors = config.kernel == "tile"
    signature["x_source"] = f"tensordesc<{x_type}[1, {m}, {j}]>" if descriptors else f"*{x_type}"
    signature["packed_source"] = f"tensordesc<u8[{n}, {j}]>" if descriptors else "*u8"
    signature |= {"x_stride": "i32", "packed_stride": "i32"}
    constants |= {"BN": n, "BM": m, "BJ": j, "FLATTEN": config.flatten}
    constants |= {"DESCRIPTORS": descriptors, "ASSEMBLY": True}
    return Kernel("_gemm_tile", "gemm_tile", signature, constants, config.warps, config.stages)


def hopper(kind: str, n: int, m: int, j: int, warps: int, stages: int) -> Kernel:
    from kernels._gemm_config import GemmConfig

    return product(kind, 0, 90, GemmConfig(n, m, j, warps, stages, subtiles=4 if m >= 64 else 1, kernel="hopper"))


def unpack(capability: int) -> Kernel:
    codes = "*fp8e4nv" if capability >= 89 else "*i8"
    signature = {"packed_ptr": "*u8", "codes_ptr": codes, "width": "i32", "in_features": "i32"}
    return Kernel("_unpack", "unpack_kernel", signature, {"BLOCK": 1024})


def rowwise(name: str, constants: dict[str, Any], warps: int, x: tuple[str, ...], strides: tuple[str, ...]) -> Kernel:
    outputs = {"y_ptr": "*i8", "token_scale_ptr": "*fp32", "token_sum_ptr": "*i32"}
    if name in EXACT:
        outputs = {"values_ptr": "*i8", "scale_ptr": "*fp32", "sum_ptr": "*i32", "y_ptr": "*bf16"}
    elif not constants["QUANTIZE"]:
        outputs = dict.fromkeys(outputs, "*bf16")
    signature = dict.fromkeys(x, "*bf16") | outputs | dict.fromkeys(strides, "i32")
    if name == "_norm_kernel":
        signature |= {"tokens_an_image": "i32", "eps": "fp32"}
    return Kernel("rowwise", name, signature, constants, warps, fp_fusion=name not in EXACT)


def quantize(name: str) -> Kernel:
    return rowwise(name, {"WIDTH": 3072, "BLOCK": 1024}, 4, ("x_ptr",), ("x_stride",))


def norm(quantized: bool) -> Kernel:
    constants = {"WIDTH": 3072, "BLOCK": 1024, "QUANTIZE": quantized}
    strides = ("x_stride", "shift_stride", "scale_stride")
    return rowwise("_norm_kernel", constants, 4, ("x_ptr", "shift_ptr", "scale_ptr"), strides)


def gelu(quantized: bool) -> Kernel:
    constants = {"WIDTH": 12288, "BLOCK": 4096, "HEAD_WIDTH": 3072, "HEAD_BLOCK": 4096, "QUANTIZE": quantized}
    return rowwise("_gelu_kernel", constants, 16, ("x_ptr", "head_ptr"), ("x_stride", "head_stride"))


def rotary(_: int) -> Kernel:
    weights = [f"{text}{part}_weight_ptr" for text in ("", "text_") for part in ("query", "key")]
    signature = dict.fromkeys(["qkv_ptr", "text_qkv_ptr", *weights, "query_ptr", "key_ptr"], "*bf16")
    signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "text_tokens": "i32", "eps": "fp32"}
    signature |= dict.fromkeys(["image_stride", "token_stride", "text_image_stride", "text_token_stride"], "i32")
    return Kernel("rotary", "_norm_rope_kernel", signature, {"HEADS": 24, "SIZE": 128, "BLOCK": 8})


def norm_rope(backward: bool) -> Kernel:
    tensors = ["x_ptr", "y_ptr"] if not backward else ["x_ptr", "grad_ptr", "grad_x_ptr"]
    signature = dict.fromkeys(tensors, "*bf16") | {"weight_ptr": "*fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    signature |= {"rows": "i32", "heads": "i32", "tokens": "i32", "eps": "fp32"}
    if backward:
        signature["grad_weight_ptr"] = "*fp32"
    name = "_norm_rope_backward_kernel" if backward else "_norm_rope_forward_kernel"
    return Kernel("_training_kernels", name, signature, {"SIZE": 128, "BLOCK": 16})


def latent_weight(backward: bool) -> Kernel:
    signature = {"latent_ptr": "*bf16", "log_scale_ptr": "*fp32", "K": "i32"}
    if backward:
        signature |= {"grad_ptr": "*bf16", "grad_latent_ptr": "*bf16", "grad_log_scale_ptr": "*fp32"}
    else:
        signature["weight_ptr"] = "*bf16"
    name = "_latent_weight_backward_kernel" if backward else "_latent_weight_kernel"
    return Kernel("_training_kernels", name, signature, {"BLOCK": 2048})


def factored(name: str) -> Kernel:
    pointers = ["row_parts", "column_parts", "row", "column", "sum", "rate", "dampening"]
    signature = dict.fromkeys([f"{pointer}_ptr" for pointer in pointers], "*fp32")
    signature |= {"latent_ptr": "*bf16", "gradient_ptr": "*bf16", "seed_ptr": "*i64", "place": "i32"}
    signature |= {"N": "i32", "K": "i32"}
    constants = {"ROWS": 16, "COLUMNS": 256, "STRIP": 8} if "sums" in name else {"BLOCK": 2048}
    if "step" in name:
        constants["ROUNDED"] = True
    return Kernel("_factored_kernels", name, signature, constants)


def columns(descend: bool) -> Kernel:
    matrix, block = ("covariance", "slope") if descend else ("factor", "rest")
    made = "step" if descend else "error"
    signature = dict.fromkeys([f"{name}_ptr" for name in (block, "scale", matrix, "codes", made)], "*fp32")
    signature |= dict.fromkeys([f"{name}_stride" for name in (block, matrix, "codes")], "i32") | {
        "N": "i32",
        "B": "i32",
    }
    name = "_descend_kernel" if descend else "_round_kernel"
    return Kernel("_column_kernels", name, signature, {"ROWS": 16, "COLUMNS": 128})


ANYWHERE: dict[str, Callable[[int], Kernel]] = {
    "int8": lambda capability: product("int8", 4608, capability),
    "int8, 100 tokens": lambda capability: product("int8", 100, capability),
    "int8, 4 tokens": lambda capability: product("int8", 4, capability),
    "digits, 2 tokens": lambda capability: product("int8", 8, capability, digits=4),
    "digits, 4 tokens": lambda capability: product("int8", 16, capability, digits=4),
    "16bit": lambda capability: product("16bit", 4608, capability),
    "16bit, 100 tokens": lambda capability: product("16bit", 100, capability),
    "16bit, 4 tokens": lambda capability: product("16bit", 4, capability),
    "unpack": unpack,
    "quantize": lambda _: quantize("_quantize_kernel"),
    "digits": lambda _: quantize("_digits_kernel"),
    "rounded": lambda _: quantize("_rounded_kernel"),
    "norm": lambda _: norm(False),
    "norm, quantized": lambda _: norm(True),
    "gelu": lambda _: gelu(False),
    "gelu, quantized": lambda _: gelu(True),
    "rotary": rotary,
    "norm and rotary in training": lambda _: norm_rope(False),
    "norm and rotary in training, backward": lambda _: norm_rope(True),
    "weight of latents": lambda _: latent_weight(False),
    "weight of latents, backward": lambda _: latent_weight(True),
    "factored step, sums of squares": lambda _: factored("_square_sums_kernel"),
    "factored step, size of the update": lambda _: factored("_update_square_sum_kernel"),
    "factored step": lambda _: factored("_step_kernel"),
    "columns, rounded": lambda _: columns(False),
    "columns, descent": lambda _: columns(True),
}
HOPPER: dict[str, Callable[[int], Kernel]] = {
    "hopper int8": lambda _: hopper("int8", 256, 128, 64, 8, 4),
    "hopper int8, 4 tokens": lambda _: hopper("int8", 128, 16, 128, 4, 4),
    "hopper 16bit": lambda _: hopper("16bit", 256, 128, 32, 8, 4),
    "hopper 16bit, 4 tokens": lambda _: hopper("16bit", 128, 16, 64, 4, 4),
}
CASES = [(name, capability) for name in ANYWHERE for capability in SHARED_KIB] + [(name, 90) for name in HOPPER]


def compiled(name: str, capability: int) -> dict[str, int]:
    """Compiles a kernel of the tables: its registers, bytes of stack and of shared memory, and serialized products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = (ANYWHERE | HOPPER)[name](capability)
    function = getattr(importlib.import_module(f"kernels.{kernel.module}"), kernel.name)
    types = {name: kernel.signature.get(name, "constexpr") for name in function.arg_names}
    constants = {(place,): kernel.constants[name] for place, name in enumerate(types) if name in kernel.constants}
    divisible = [["tt.divisibility", 16]]
    aligned = {(place,): divisible for place, type in enumerate(types.values()) if type[0] == "*" or type == "i32"}
    source = (GluonASTSource if kernel.name == "gemm_hopper" else ASTSource)(function, types, constants, aligned)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": kernel.fp_fusion}
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin, ptx = Path("kernel.cubin"), Path("kernel.ptx")
    cubin.write_bytes(result.asm["cubin"])
    usage = output(tools / "cuobjdump", "--dump-resource-usage", cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    serialized = 0
    if capability == 90:
        ptx.write_text(result.asm["ptx"])
        # C7510 to C7519: the assembler could not leave products of a warpgroup under way.
        serialized = output(tools / "ptxas", "-arch=sm_90a", "--verbose", ptx, "-o", cubin).count("(C751")
    return {"shared": result.metadata.shared, "serialized": serialized, **found}


def output(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


class Compiler:
    """A process that runs `compiled` for one case after another."""

    def __init__(self, folder: Path) -> None:
        root = str(Path(__file__).parents[2])
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self._said = folder / "stderr"
        with self._said.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                cwd=folder,
                env=environment | {"PYTHONPATH": root},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def ask(self, name: str, capability: int) -> dict[str, Any]:
        """What `compiled` found, or an `error`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([name, capability]), file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline():
            return json.loads(answer)
        return {"error": f"exit code {self.process.wait()}: {self._said.read_text()[-3000:]}"}


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> Iterator[dict[tuple[str, int], Future]]:
    """What is found for each selected case. A core has one compiler, and another after a case that ended it."""
    cases = [
        (item.callspec.params["name"], item.callspec.params["capability"])
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    compilers: list[Compiler] = []
    idle: queue.SimpleQueue[Compiler] = queue.SimpleQueue()

    def start() -> None:
        compilers.append(Compiler(tmp_path_factory.mktemp("compiler")))
        idle.put(compilers[-1])

    def ask(case: tuple[str, int]) -> dict[str, Any]:
        compiler = idle.get()
        found = compiler.ask(*case)
        if compiler.process.poll() is None:
            idle.put(compiler)
        else:
            start()
        return found

    count = min(len(cases), os.cpu_count() or 1, 4)
    for _ in range(count):
        start()
    with ThreadPoolExecutor(count) as pool:
        yield {case: pool.submit(ask, case) for case in cases}
        pool.shutdown(wait=False, cancel_futures=True)
        for compiler in compilers:
            compiler.process.kill()


@pytest.mark.parametrize(
    ("name", "capability"),
    [pytest.param(*case, marks=[] if case == ("hopper int8", 90) else pytest.mark.slow) for case in CASES],
)
def test_kernel_fits_its_chip(name, capability, answers):
    usage = answers[name, capability].result()
    assert "error" not in usage, usage["error"]
    assert usage["REG"] >= REGISTERS, usage
    assert usage["STACK"] <= STACK_BYTES, usage
    assert usage["shared"] <= SHARED_KIB[capability] * 1024, usage
    assert not usage["serialized"] or name not in HOPPER, usage


def answer(question: str) -> dict[str, Any]:
    try:
        return compiled(*json.loads(question))
    except Exception:
        return {"error": traceback.format_exc()[-3000:]}


if __name__ == "__main__":
    own_stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for question in sys.stdin:
        print(json.dumps(answer(question)), file=own_stdout, flush=True)
