"""What training stages share: schedules, averaged weights, several GPUs, and steps as CUDA graphs."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

PACE_EVERY = 100  # steps between two looks at the clock
GRAPH_WARMUP = 3  # calls before a capture, in which libraries choose their kernels

# cuBLAS adds up in a fixed order only with workspaces of fixed sizes, and reads this when it is first used: so whoever
# imports this must do so before the first product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def use_fast_math() -> None:
    """TF32 for what autocast leaves in float32. cuDNN's attention backward fails on torch 2.11: head sizes 32, 128."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bits in every run on one type of machine. RuntimeError where an operation inside has no such form.

    cuDNN's attention, whose backward pass fails on torch 2.11, is left out.
    """
    by_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch = torch.utils.deterministic
    fills = switch.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)  # merely warned, flash attention's backward pass adds up in any order
    switch.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        switch.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)


@contextlib.contextmanager
def arithmetic_restored() -> Iterator[None]:
    """Ends what `use_fast_math` begins inside."""
    precision, by_cudnn = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    convolutions = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(by_cudnn)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextlib.contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Products of float32 in float32 and attention without cuDNN, whatever the process does otherwise."""
    with arithmetic_restored():
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield


def start_process_group() -> tuple[int, int]:
    """(rank, world size); joins the group that torchrun describes, if one does."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    return int(os.environ.get("RANK", "0")), world


def warmup_then_linear(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear up over `warmup` steps, then linear down to zero."""
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def warmup_then_cosine(step: int, steps: int, warmup: int = 100) -> float:
    """Learning-rate factor: linear up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def rising_cosine(step: int, steps: int) -> float:
    """From 0 to 1 over the training, by half a cosine."""
    return 0.5 * (1 - math.cos(math.pi * step / steps))


class FlatGradients:
    """All gradients of `parameters` as views of one float32 tensor: one memset, one all-reduce, one norm."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=self.parameters[0].device)
        offset = 0
        for parameter in self.parameters:
            parameter.grad = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero(self) -> None:
        self.flat.zero_()

    def average_over_ranks(self, world: int) -> None:
        if world > 1:
            dist.all_reduce(self.flat)  # gloo has no mean
            self.flat.div_(world)

    def clip(self, maximum: float) -> None:
        """Scales the gradients down to the norm `maximum`, without a host synchronisation."""
        self.flat.mul_((maximum / (self.flat.norm() + 1e-6)).clamp(max=1.0))


class Average:
    """Exponential moving average of parameters, kept beside them."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        self.live = [p.data for p in parameters]
        self.mean = [p.clone() for p in self.live]
        self.decay = decay

    def update(self) -> None:
        torch._foreach_lerp_(self.mean, self.live, 1 - self.decay)

    def copy_to_live(self) -> None:
        torch._foreach_copy_(self.live, self.mean)


def capture(step: Callable[[], object], device: torch.device, warmup: int = GRAPH_WARMUP) -> Callable[[], object]:
    """`step` as a CUDA graph that reads and writes the same tensors each time; on the CPU, `step` itself.

    The step must not synchronise with the host. Its random numbers come from the default CUDA generator.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog thread queries events at any time, which must not break the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class Replayed:
    """`function`, of tensors by name, as a CUDA graph from its fourth call on: then Python launches one thing a call.

    Every call counts, the first three as well. Tensors must keep their shapes, and results are overwritten by the next
    call. The function must not synchronise with the host, and takes no random numbers from a generator. What it does is
    what the capturing call did: `forget` once it would do otherwise.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]):
        self.function = function
        self.stream = torch.cuda.Stream()
        self.inputs: dict[str, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            if not self.inputs:
                self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            torch._foreach_copy_(list(self.inputs.values()), [inputs[name] for name in self.inputs])
            if self.calls < GRAPH_WARMUP:
                self.outputs = self.function(self.inputs)
            else:
                if self.graph is None:
                    self.graph = self._captured()
                self.graph.replay()
            self.calls += 1
        outside.wait_stream(self.stream)
        return self.outputs

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # thread_local: as in `capture`.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.function(self.inputs)
        return graph


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` of a tensor on the CPU, for which the host does not wait until the device is idle."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Progress:
    """Prints a loss line every `every` seconds; reading the loss is the loop's only host synchronisation."""

    def __init__(self, name: str, steps: int, rank: int = 0, every: float = 10.0):
        self.name, self.steps, self.rank, self.every = name, steps, rank, every
        self.start = self.last = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def fit_into(self, seconds: float, step: int, device: torch.device) -> None:
        """Every `PACE_EVERY` steps, sets `steps` to what `seconds` allow at the pace so far; rank 0's clock decides."""
        if step == 0 or step % PACE_EVERY:
            return
        if device.type == "cuda":
            torch.cuda.synchronize()  # steps that were only launched are not done
        affordable = torch.tensor(step * seconds / self.elapsed, device=device)
        if dist.is_initialized():
            dist.broadcast(affordable, src=0)
        self.steps = max(step + 1, int(affordable.item()))

    def report(self, step: int, loss: Tensor) -> None:
        now = time.monotonic()
        if now - self.last < self.every and step + 1 < self.steps:
            return
        self.last = now
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.name}: the loss is {value} at step {step}")
        if self.rank == 0:
            spent = self.elapsed
            print(
                f"{self.name}: step {step + 1}/{self.steps} loss {value:.4f} "
                f"{1000 * spent / (step + 1):.1f} ms/step {spent:.0f} s",
                flush=True,
            )


class RunningMean:
    """A smoothed scalar on the device, for losses computed inside a captured step."""

    def __init__(self, device: torch.device, decay: float = 0.99):
        self.value = torch.zeros((), device=device)
        self.weight = torch.zeros((), device=device)
        self.decay = decay

    def add(self, value: Tensor) -> None:
        self.value.mul_(self.decay).add_(value.detach(), alpha=1 - self.decay)
        self.weight.mul_(self.decay).add_(1 - self.decay)

    @property
    def mean(self) -> Tensor:
        return self.value / self.weight


def fit(
    name: str,
    model: nn.Module,
    step_loss: Callable[[], Tensor],
    *,
    steps: int,
    device: torch.device,
    learning_rate: float,
    weight_decay: float,
    average_decay: float,
) -> Tensor:
    """Trains `model` by AdamW on what `step_loss` returns, and leaves averaged weights in it; the loss's last mean."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=weight_decay, fused=device.type == "cuda"
    )
    average = Average(model.parameters(), average_decay)
    progress, loss_mean = Progress(name, steps), RunningMean(device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup_then_cosine(step, steps)
        loss = step_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update()
        loss_mean.add(loss)
        progress.report(step, loss_mean.mean)
    average.copy_to_live()
    model.eval()
    return loss_mean.mean
