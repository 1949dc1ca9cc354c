"""What quantizing lost, as signal-to-noise ratios: of weights, of layer outputs and of block outputs."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bitflux_core.quantizer.blocks import Stream

LEVELS = ("layer", "block")
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("level", pa.string(), nullable=False),
        pa.field("in_features", pa.int32()),
        pa.field("out_features", pa.int32()),
        pa.field("weight_snr_db", pa.float64()),
        pa.field("output_snr_db", pa.float64()),
        pa.field("error_before", pa.float64()),
        pa.field("error_after", pa.float64()),
        pa.field("codes_flipped", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Snr:
    """Ratios in dB of one layer, or of a whole block, which has no one weight. None: not measured.

    The output ratio compares the ternary model's output behind its own ternary blocks with the teacher's: errors made
    before count as well. Weights that make up for errors in their inputs stand worse by the weight's ratio.

    Of a block that was trained also how that went, see `Reconstruction`.
    """

    name: str
    level: str
    in_features: int | None
    out_features: int | None
    weight_snr_db: float | None
    output_snr_db: float | None
    error_before: float | None = None
    error_after: float | None = None
    codes_flipped: float | None = None


class _Ratio:
    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, theirs: Tensor, mine: Tensor) -> None:
        self.signal += theirs.double().square().sum().item()
        self.noise += (theirs.double() - mine.double()).square().sum().item()

    @property
    def db(self) -> float | None:
        """None where there was no signal; inf where nothing is lost."""
        if not self.signal:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


@torch.no_grad()
def measure(
    name: str, teacher: nn.Module, student: nn.Module, teacher_streams: list[Stream], student_streams: list[Stream]
) -> list[Snr]:
    """The ratios of a block's layers and of the block `name` itself, from the streams in front of it."""
    linears = {layer: module for layer, module in teacher.named_modules() if isinstance(module, nn.Linear)}
    outputs = {layer: _Ratio() for layer in linears}
    whole = _Ratio()
    with _recorded_outputs(teacher, linears) as theirs, _recorded_outputs(student, linears) as mine:
        for teacher_stream, student_stream in zip(teacher_streams, student_streams, strict=True):
            teacher_behind, student_behind = teacher_stream.through(teacher), student_stream.through(student)
            for layer, ratio in outputs.items():
                ratio.add(theirs[layer], mine[layer])
            whole.add(teacher_behind.hidden_BLD, student_behind.hidden_BLD)
            whole.add(teacher_behind.encoder_BTD, student_behind.encoder_BTD)
    rows = []
    for layer, linear in linears.items():
        weight = _Ratio()
        weight.add(linear.weight, student.get_parameter(f"{layer}.weight"))
        sizes = (linear.in_features, linear.out_features)
        rows.append(Snr(f"{name}.{layer}", "layer", *sizes, weight.db, outputs[layer].db))
    return [*rows, Snr(name, "block", None, None, None, whole.db)]


def write_table(rows: Sequence[Snr], path: Path) -> None:
    """Parquet with the columns of `Snr`."""
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA), path)


def write_plot(rows: Sequence[Snr], path: Path, title: str | None = None) -> None:
    """A plot of all three ratios over the depth of the model, in the format of the path's suffix."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a display

    blocks = [row.name for row in rows if row.level == "block"]
    place = {name: index for index, name in enumerate(blocks)}
    figure = Figure(figsize=(10, 7), layout="constrained")
    weight_axes, output_axes = figure.subplots(2, 1, sharex=True)
    layers: dict[str, list[Snr]] = {}
    for row in (row for row in rows if row.level == "layer"):
        kind, _, layer = row.name.split(".", 2)
        layers.setdefault(f"{'single' if kind.startswith('single') else 'double'} {layer}", []).append(row)
    for label, group in layers.items():
        x = [place[".".join(row.name.split(".")[:2])] for row in group]
        for axes, values in (
            (weight_axes, [row.weight_snr_db for row in group]),
            (output_axes, [row.output_snr_db for row in group]),
        ):
            axes.plot(x, [math.nan if value is None else value for value in values], ".-", lw=0.6, label=label)
    ends = [math.nan if row.output_snr_db is None else row.output_snr_db for row in rows if row.level == "block"]
    output_axes.plot(range(len(ends)), ends, "k-", lw=2, label="block output")
    weight_axes.set_ylabel("weight SNR, dB")
    output_axes.set_ylabel("output SNR, dB")
    output_axes.set_xlabel("block, double blocks first")
    if title:
        figure.suptitle(title)
    figure.legend(*output_axes.get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


@contextmanager
def _recorded_outputs(block: nn.Module, names: dict[str, nn.Linear]) -> Iterator[dict[str, Tensor]]:
    outputs: dict[str, Tensor] = {}

    def recorder(name: str):
        return lambda _module, _args, output: outputs.__setitem__(name, output)

    handles = [block.get_submodule(name).register_forward_hook(recorder(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
