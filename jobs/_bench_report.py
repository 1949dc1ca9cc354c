"""What a benchmark says: tables of the columns that matter; the files hold the others too."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bitflux_core.benchmark.rows import Result
from kernels.benchmark import SMALL_M


class Column(NamedTuple):
    """A column over the rows' attribute `field`, or `what` of the row."""

    heading: str
    field: str
    form: str = ""
    what: Callable[[Any], str] | None = None

    def text(self, row: Any) -> str:
        if self.what is not None:
            return self.what(row)
        value = getattr(row, self.field)
        return "-" if value is None else format(value, self.form)


def _layer(row: Any) -> str:
    return f"{row.out_features}x{row.in_features}"


_MANY_TOKENS = (
    Column("N x K", "layer", what=_layer),
    Column("M", "tokens"),
    Column("bf16 ms", "bf16_ms", ".3f"),
    Column("fp8 ms", "fp8_ms", ".3f"),
    Column("unpack + fp8 ms", "unpack_fp8_ms", ".3f"),
    Column("A16 ms", "ternary_ms", ".3f"),
    Column("A8 ms", "ternary_int8_ms", ".3f"),
    Column("A8 + quant. ms", "ternary_int8_quantize_ms", ".3f"),
    Column("bf16 TF/s", "bf16_tflops", ",.0f"),
    Column("A16 TF/s", "ternary_tflops", ",.0f"),
    Column("A8 TF/s", "ternary_int8_tflops", ",.0f"),
    Column("A16 : bf16", "ternary_speed_of_bf16", ".2f"),
    Column("A8 : bf16", "int8_speed_of_bf16", ".2f"),
    Column("A8 : fp8", "int8_speed_of_fp8", ".2f"),
)
_FEW_TOKENS = (
    Column("N x K", "layer", what=_layer),
    Column("M", "tokens"),
    Column("packed MB", "packed_mb", ",.1f"),
    Column("bf16 ms", "bf16_ms", ".4f"),
    Column("fp8 ms", "fp8_ms", ".4f"),
    Column("A16 ms", "ternary_ms", ".4f"),
    Column("A8 ms", "ternary_int8_ms", ".4f"),
    Column("A16 GB/s", "ternary_gb_s", ",.0f"),
    Column("A8 GB/s", "int8_gb_s", ",.0f"),
    Column("A16 of copy", "ternary_of_copy", ".0%"),
    Column("A8 of copy", "int8_of_copy", ".0%"),
    Column("A16 : bf16", "ternary_speed_of_bf16", ".2f"),
)
_GEMLITE = Column("GemLite ms", "gemlite_ms", ".3f")
_STEPS = (
    Column("transformer", "mode"),
    Column("ms a step", "step_ms", ".1f"),
    Column("speed-up", "speedup", ".2f"),
    Column("resident GB", "resident_gb", ".2f"),
    Column("peak GB", "peak_gb", ".2f"),
    Column("less peak", "peak_ratio", ".2f"),
    Column("storage GB", "storage_gb", ".2f"),
    Column("less stored", "storage_ratio", ".2f"),
    Column("attention", "attention"),
)
_IMAGES = (
    Column("transformer", "mode"),
    Column("placement", "placement"),
    Column("steps", "steps"),
    Column("text s", "text_s", ".3f"),
    Column("steps s", "denoise_s", ".1f"),
    Column("VAE s", "decode_s", ".3f"),
    Column("s an image", "image_s", ".1f"),
    Column("resident GB", "resident_gb", ".2f"),
    Column("peak GB", "peak_gb", ".2f"),
)
_SMALL_GPU = (
    *_IMAGES,
    Column("text encoders", "text_encoders"),
    Column("GB from host", "host_to_device_gb", ",.1f"),
)
_TUNED = (
    Column("N x K", "layer", what=_layer),
    Column("M", "tokens"),
    Column("activations", "kind"),
    Column("ms", "milliseconds", ".4f"),
    Column("configs tried", "tried"),
    Column("fastest", "config"),
)


def _met(row: Any) -> str:
    return {True: "met", False: "missed", None: "-"}[row.met]


_TARGET = (Column("target", "target"), Column("", "met", what=_met))
_WAITING = (
    Column("drawn by", "what"),
    Column("replicas", "replicas"),
    Column("samples", "samples", ","),
    Column("wall s", "wall_s", ".1f"),
    Column("busy", "busy_share", ".2%"),
    Column("idle", "idle", ".2%"),
    Column("gap ms", "gap_ms", ".1f"),
    Column("99 % of gaps", "gap_p99_ms", ".1f"),
    *_TARGET,
)
_DRIVER = (
    Column("cost", "what"),
    Column("samples", "samples", ","),
    Column("s", "wall_s", ".2f"),
    Column("growth MB", "growth_mb", ".1f"),
    *_TARGET,
)
_SCALING = (
    Column("transformer", "mode"),
    Column("GPUs", "gpus"),
    Column("images", "images"),
    Column("seconds", "seconds", ".1f"),
    Column("images/s", "images_a_second", ".3f"),
    Column("busy", "busy_share", ".1%"),
    Column("efficiency", "efficiency", ".1%"),
)
_DISTILL = (
    Column("GPUs", "gpus"),
    Column("batch", "batch"),
    Column("planned GB", "planned_gb", ".1f"),
    Column("peak GB", "peak_gb", ".1f"),
    Column("s a step", "step_s", ".2f"),
    Column("in int8", "int8_step_s", ".2f"),
    Column("s a held-out state", "held_out_s", ".2f"),
    Column("s a checkpoint", "save_s", ".1f"),
    Column("hours in all", "recipe_hours", ".1f"),
)
_QUANTIZE = (
    Column("part", "part"),
    Column("block", "block"),
    Column("planned GB", "planned_gb", ".1f"),
    Column("peak GB", "peak_gb", ".1f"),
    Column("s", "seconds", ",.2f"),
    Column("s reading", "read_s", ".2f"),
    Column("s a step", "step_s", ".3f"),
    Column("times", "times", ","),
    Column("hours", "hours", ".2f"),
)
_LOADING = (
    Column("transformer", "mode"),
    Column("codes", "codes", what=lambda row: row.codes or "-"),
    Column("stored GB", "stored_gb", ".2f"),
    Column("s from storage", "from_storage_s", ".2f"),
    Column("s from cache", "from_cache_s", ".2f"),
    Column("faster", "faster", ".2f"),
    Column("host peak GB", "host_peak_gb", ".2f"),
)
_EVALUATORS = (
    Column("benchmark", "benchmark"),
    Column("category", "category"),
    Column("images", "images", ","),
    Column("ms an image", "image_ms", ".1f"),
    Column("peak GB", "peak_gb", ".2f"),
    Column("objects", "objects", ".1f"),
    Column("of drawing", "drawing_share", ".1%"),
)
_LEGEND = "ternary weights with activations in bf16 (A16) and int8 (A8); ratios are speeds"
ENGINES = ("scheduler", "Ray Data")
_ROOMY = 9  # columns; more fill 120 characters only without spaces beside the lines
_WORDS = (
    *("layer", "mode", "placement", "attention", "text_encoders", "what", "target", "met", "benchmark", "category"),
    *("part", "block"),
)


def print_result(console: Console, result: Result, files: Iterable[Path]) -> None:
    """Tables, what they were measured on, errors, and where the files lie."""
    for title, columns, rows in _tables(result):
        table = Table(title=title, padding=(0, 0) if len(columns) > _ROOMY else (0, 1))
        for column in columns:
            is_word = column.field in _WORDS
            table.add_column(column.heading, justify="left" if is_word else "right", no_wrap=is_word)
        for row in rows:
            table.add_row(*(column.text(row) for column in columns))
        console.print(table)
    machine = result.machine
    versions = ((name, getattr(machine, name)) for name in ("driver", "cuda", "torch", "triton"))
    console.print(", ".join([machine.device, *(f"{name} {value}" for name, value in versions if value)]))
    if result.settings:
        console.print(", ".join(f"{name} {_setting(value)}" for name, value in result.settings.items()))
    for row in result.rows:
        if row.error:
            console.print(f"{name_of(row)}: {row.error}", soft_wrap=True, markup=False)
    for file in files:
        console.print(f"written: {file}", soft_wrap=True, markup=False)


def name_of(row: Any) -> str:
    """What a row measured, in a few words."""
    if hasattr(row, "what"):
        return f"{row.what}, {row.replicas} replicas" if row.replicas else row.what
    if hasattr(row, "layer"):
        return f"{row.layer}, M = {row.tokens}"
    if hasattr(row, "category"):
        return f"{row.benchmark} {row.category}"
    if hasattr(row, "part"):
        return f"{row.part}, {row.block}" if row.block else row.part
    if hasattr(row, "recipe_hours"):
        return f"{row.gpus} GPUs, batch {row.batch}"
    if hasattr(row, "from_cache_s"):
        return f"{row.mode}, {row.codes}" if row.codes else row.mode
    if hasattr(row, "gpus"):
        return f"{row.mode}, {row.gpus} GPUs"
    return f"{row.mode}, {row.placement}, {row.steps} steps" if hasattr(row, "placement") else str(row.mode)


def _tables(result: Result) -> list[tuple[str, tuple[Column, ...], list[Any]]]:
    rows = result.rows
    if result.section == "kernels":
        gemlite = (_GEMLITE,) if any(row.gemlite_ms is not None for row in rows) else ()
        many = [row for row in rows if row.tokens > SMALL_M]
        few = [row for row in rows if row.tokens <= SMALL_M]
        return [
            (f"many tokens; {_LEGEND}", _MANY_TOKENS + gemlite, many),
            (f"few tokens; {_LEGEND}; GB of packed weights", _FEW_TOKENS, few),
        ]
    if result.section == "scheduler":
        drawing = [row for row in rows if row.what in ENGINES]
        return [
            (
                "replicas that wait as long as drawing takes; idle: the share of their time that they did not draw",
                _WAITING,
                drawing,
            ),
            ("what the driver takes", _DRIVER, [row for row in rows if row not in drawing]),
        ]
    columns, title = {
        "transformer": (_STEPS, "one step of the transformer"),
        "images": (_IMAGES, "one image"),
        "small-gpu": (_SMALL_GPU, "one image on a small GPU"),
        "tune": (_TUNED, "block sizes"),
        "scaling": (_SCALING, "drawing on several GPUs"),
        "distill": (_DISTILL, "training end to end; GB of each GPU"),
        "quantize": (_QUANTIZE, "quantizing the blocks, before training end to end; seconds of one time"),
        "loading": (_LOADING, "from files to the device; the last columns from the page cache"),
        "evaluators": (_EVALUATORS, "scoring; images of a whole evaluation of one variant"),
    }[result.section]
    baseline = getattr(rows[0], "baseline", None)
    return [(f"{title}; ratios to {baseline}" if baseline else title, columns, rows)]


def _setting(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
