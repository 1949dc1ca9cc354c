"""On a GPU (`pytest -m gpu`): end-to-end training comes to the same bits, however launched and wherever it stopped."""

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitflux_core.convert import quantize_transformer
from bitflux_core.distill import load_scheduler
from bitflux_core.distill_recipe import EndToEndSettings, Record
from bitflux_core.distill_training import RESULT, EndToEnd
from bitflux_core.loading import load_transformer
from bitflux_core.quantizer import end_to_end
from bitflux_core.quantizer.quantize import QuantizeSettings, encode, quantize
from bitflux_core.samples import Sampling
from bitflux_core.training import GRAPH_WARMUP, arithmetic_restored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16  # the teacher's, as a quantization loads it on a GPU
WEIGHTS = "diffusion_pytorch_model.safetensors"
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PROMPTS = tuple(f"a photo of a {colour} {shape}" for colour in COLOURS for shape in ("circle", "star"))
SAMPLING = Sampling(width=32, height=32, steps=4, guidance=2.0, max_sequence_length=16)
# Each phase outlasts the calls before a graph is captured; checkpoints at 4, 8, 10, 12 and 16.
SETTINGS = EndToEndSettings(
    steps=16,
    int8_steps=6,
    batch=2,
    sampler_steps=SAMPLING.steps,
    guidance=SAMPLING.guidance,
    latent_lr=5e-2,
    features=1,
    slots=4,
    held_out=2,
    interval=4,
)
QUANTIZATION = QuantizeSettings(
    init="compensated",
    prompts=PROMPTS[:4],
    states_a_prompt=2,
    reconstruction_steps=0,
    sampling=SAMPLING,
    batch=4,
    distill_prompts=PROMPTS,
)

by_optimizer = pytest.mark.parametrize("optimizer", ["factored", "adam"])
by_launches = pytest.mark.parametrize("graph", [False, True], ids=["single launches", "graph"])


@contextlib.contextmanager
def switches_of_a_new_process():
    """EndToEnd turns them for good, also for whatever the process quantizes next."""
    with arithmetic_restored():
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(True)
        yield


@pytest.fixture(scope="module", autouse=True)
def switches():
    """Other tests find them as they were."""
    with switches_of_a_new_process():
        yield


def kill_at(step: int, training: Callable[[], object]) -> None:
    """Calls `training`, which is killed when so many steps are made."""
    train_step = EndToEnd.train_step

    def die(self):
        if self.step == step:
            raise KeyboardInterrupt
        train_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EndToEnd, "train_step", die)
        with pytest.raises(KeyboardInterrupt):
            training()


@pytest.fixture(scope="module")
def train(lively_dir):
    """Makes the training of SETTINGS with changes in a folder."""
    load = functools.partial(load_transformer, "bf16", pipeline_dir=lively_dir, ternary_dir=None)
    teacher, start = load(device=DEVICE, dtype=DTYPE), load(device="cpu", dtype=torch.float32)
    quantize_transformer(start)
    parts = load_scheduler(lively_dir), encode(lively_dir, PROMPTS, SAMPLING, DEVICE)
    held_out, trained = (0, 1), range(2, len(PROMPTS))

    def make(folder: Path, graph: bool, **changes) -> EndToEnd:
        settings = replace(SETTINGS, **changes)
        student_of = copy.deepcopy(teacher), start
        return EndToEnd(*student_of, *parts, trained, held_out, settings, DEVICE, folder, graph=graph)

    return make


@dataclass(frozen=True)
class Outcome:
    """What a training leaves: its log without seconds, the tensors of all its files, and the file of its best."""

    records: list[Record]
    tensors: dict[str, Tensor]
    best: bytes


def outcome(run: EndToEnd) -> Outcome:
    """Trains to the end. The last checkpoint is of its last step: latents, scales, moments and states are in it."""
    records = [replace(record, seconds=0.0) for record in run.run()]
    files = [*run.folder.glob(f"step-{run.settings.steps:08}/*.safetensors"), run.folder / RESULT]
    tensors = {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}
    return Outcome(records, tensors, (run.folder / RESULT).read_bytes())


def assert_same_bits(mine: Outcome, theirs: Outcome) -> None:
    assert mine.tensors.keys() == theirs.tensors.keys()
    different = [name for name, tensor in mine.tensors.items() if not same_bits(tensor, theirs.tensors[name])]
    assert (different, mine.records) == ([], theirs.records)
    assert mine.best == theirs.best


def same_bits(mine: Tensor, theirs: Tensor) -> bool:
    return torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (mine, theirs)))


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The outcome of SETTINGS without interruption, by optimizer and launches; each is made once."""

    @functools.cache
    def made(optimizer: str, graph: bool) -> Outcome:
        return outcome(train(tmp_path_factory.mktemp("whole"), graph, optimizer=optimizer))

    return made


@by_optimizer
@by_launches
def test_two_trainings_give_the_same_bits(train, whole, tmp_path, optimizer, graph):
    again = outcome(train(tmp_path, graph, optimizer=optimizer))
    assert_same_bits(again, whole(optimizer, graph))
    assert [record.step for record in again.records] == [0, 4, 8, 10, 10, 12, 16]
    assert 0 == again.records[0].codes_flipped < again.records[3].codes_flipped


@by_optimizer
@by_launches
def test_a_training_stopped_again_and_again_goes_on_to_the_same_bits(train, whole, tmp_path, optimizer, graph):
    """Between checkpoints of either phase, and where the one ends and the other begins."""
    for checkpoint, stop in ((0, 7), (4, 10), (10, 13)):
        broken = train(tmp_path, graph, optimizer=optimizer)
        assert broken.step == checkpoint
        kill_at(stop, broken.run)
    resumed = train(tmp_path, graph, optimizer=optimizer)
    assert resumed.step == 12
    assert_same_bits(outcome(resumed), whole(optimizer, graph))


@by_optimizer
def test_a_graph_gives_the_bits_that_single_launches_give(train, whole, tmp_path, monkeypatch, optimizer):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(self) or replay(self))
    run = train(tmp_path, graph=True, optimizer=optimizer)
    assert_same_bits(outcome(run), whole(optimizer, False))
    assert len(set(replays)) == 2  # one a phase
    assert len(replays) == SETTINGS.steps - 2 * GRAPH_WARMUP


@by_optimizer
def test_training_lowers_the_held_out_error_and_flips_codes(train, tmp_path, optimizer):
    changes = {"steps": 160, "int8_steps": 40, "interval": 40, "batch": 8, "slots": 8}
    rates = {"latent_lr": 1e-2, "scale_lr": 1e-3, "other_lr": 1e-3}
    records = train(tmp_path, graph=True, optimizer=optimizer, **changes, **rates).run()
    assert [record.phase for record in records] == ["native"] * 4 + ["int8"] * 2
    assert records[-1].held_out < 0.8 * records[0].held_out
    assert records[-1].loss < 0.8 * records[1].loss
    assert 0 == records[0].codes_flipped < records[1].codes_flipped < records[-1].codes_flipped < 0.5


def quantized(pipeline_dir: Path, output: Path, optimizer: str) -> bytes:
    """The file of weights that a quantization with training makes in `output`, as by a process of its own."""
    settings = replace(QUANTIZATION, end_to_end=replace(SETTINGS, optimizer=optimizer))
    with switches_of_a_new_process():
        quantize(pipeline_dir, output, settings, DEVICE, lambda _name, _rows: None)
    return (output / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def twin(lively_dir, tmp_path_factory):
    """The weights that an uninterrupted quantization makes, by optimizer; each is made once."""

    @functools.cache
    def made(optimizer: str) -> bytes:
        return quantized(lively_dir, tmp_path_factory.mktemp("quantized") / "twin", optimizer)

    return made


@by_optimizer
def test_two_quantizations_give_the_same_file(twin, lively_dir, tmp_path, optimizer):
    assert quantized(lively_dir, tmp_path / "twin", optimizer) == twin(optimizer)


@by_optimizer
def test_a_killed_quantization_goes_on_to_the_same_file(twin, lively_dir, tmp_path, monkeypatch, optimizer):
    kill_at(6, lambda: quantized(lively_dir, tmp_path / "twin", optimizer))
    assert not (tmp_path / "twin").exists()
    made = []
    train_step = EndToEnd.train_step
    monkeypatch.setattr(EndToEnd, "train_step", lambda self: made.append(self.step) or train_step(self))
    assert quantized(lively_dir, tmp_path / "twin", optimizer) == twin(optimizer)
    assert made == list(range(4, SETTINGS.steps))


def test_a_quantization_by_single_launches_gives_the_same_file(twin, lively_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "GRAPH_BELOW", 0)  # as where the model is large
    assert quantized(lively_dir, tmp_path / "twin", "factored") == twin("factored")
