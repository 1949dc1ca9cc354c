"""From a full-precision FLUX pipeline to a ternary checkpoint, block by block, resumable; no image is used."""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from bitflux_core.checkpoint import check_unused, empty_transformer, fingerprint, load_ternary, save_ternary
from bitflux_core.distill import Conditions, load_scheduler, sampler_sigmas
from bitflux_core.distill_recipe import EndToEndSettings, Record
from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.generate import TextEncoder
from bitflux_core.layers import check_rank, empty_ternary_linears
from bitflux_core.quantizer.block_walk import CalibrationSet, Init, WalkSettings, quantize_blocks
from bitflux_core.quantizer.blocks import BlockSource
from bitflux_core.quantizer.calibration import Calibration
from bitflux_core.quantizer.end_to_end import IMAGES, EndToEndTask, split_prompts, write_log
from bitflux_core.quantizer.memory import check_memory, required_bytes
from bitflux_core.quantizer.reconstruction import ReconstructionSettings
from bitflux_core.quantizer.snr import Snr, write_plot, write_table
from bitflux_core.quantizer.work import RECIPE, WorkFolder
from bitflux_core.samples import PIXELS_PER_TOKEN, Sampling
from kernels.packing import Codes

TABLE, PLOT = "snr.parquet", "snr.svg"
LOG = "distill.parquet"
REVISION = 2  # of the arithmetic by which states and codes are found: more where other codes come of it
ARITHMETIC = "arithmetic"  # in the work's recipe: with another one the same settings give other codes
ENCODE_BATCH = 32
CONDITIONS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")  # they decide the states


@dataclass(frozen=True)
class QuantizeSettings:
    """What a ternary checkpoint is made by. Without prompts nothing is calibrated and only weights are measured.

    Attributes:
        init: how codes and scales are chosen.
        prompts: calibration prompts, one trajectory each.
        states_a_prompt: points kept of each trajectory.
        reconstruction_steps: training steps of each block; 0 leaves the blocks as initialised.
        sampling: how the teacher draws.
        batch: calibration states that pass a block at once.
        seed: of noise, states and training.
        end_to_end: how the whole transformer is trained afterwards; None leaves it as its blocks are.
        distill_prompts: what that training takes and, in part, holds out.
        distill_images: how many of those held out are drawn while it goes on.
        low_rank: of a correction beside every ternary layer, in bf16; 0 for none.
        codes: their layout in the checkpoint's files.
    """

    init: Init
    prompts: tuple[str, ...]
    states_a_prompt: int
    reconstruction_steps: int
    sampling: Sampling
    batch: int
    seed: int = 0
    end_to_end: EndToEndSettings | None = None
    distill_prompts: tuple[str, ...] = ()
    distill_images: int = 0
    low_rank: int = 0
    codes: Codes = "trits"


def quantize(
    pipeline_dir: Path,
    output: Path,
    settings: QuantizeSettings,
    device: torch.device,
    report: Callable[[str, list[Snr]], None],
    gpus: int = 1,
    run_on_gpus: Callable[[EndToEndTask], None] | None = None,
) -> FluxTransformer2DModel:
    """Writes the checkpoint `output` with its table and plot of signal-to-noise ratios, and returns the transformer.

    Work under way lies in `<output>.partial`, from which a killed run goes on: same codes. Where it was killed with
    the checkpoint in place, all that is left to do is to remove that folder. `report` hears of each
    block. Training end to end happens here or, with `run_on_gpus`, where that runs the task, on `gpus` GPUs; its log
    lies beside the ratios, which are those before it. UserError for an output in use, work of another recipe, a model
    that is not FLUX or is damaged, prompts that are too long or too few, a rank that a layer cannot have, and for too
    little GPU memory.
    """
    written = check_output(output)
    output = _unlinked(output)
    check_outside(output, pipeline_dir)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    source = BlockSource(pipeline_dir / "transformer", device, dtype)
    check_rank(source.empty, settings.low_rank)  # before there is a folder of work
    check_blocks_fit(source, settings)
    if settings.prompts or settings.end_to_end:
        load_scheduler(pipeline_dir)  # it is used after the blocks, which take hours
    provenance = provenance_of(pipeline_dir, settings)
    task, prompts = None, None
    if settings.end_to_end:
        prompts = split_prompts(settings.distill_prompts, settings.end_to_end.held_out, settings.seed)
        directory = _partial(output) / "end-to-end"
        task = EndToEndTask(
            pipeline_dir.absolute(),
            directory.absolute(),
            settings.end_to_end,
            settings.sampling,
            prompts.trained,
            prompts.held_out,
            gpus,
            settings.distill_images,
            settings.low_rank,
        )
        task.check(device)
    # Training has its recipe by itself: with other rates it begins again behind the same blocks.
    recipe = _without(provenance, "end_to_end")
    work = WorkFolder(_partial(output), {**recipe, ARITHMETIC: arithmetic_of(source)})
    if written:
        header = _header(output)
        if (header.get("provenance"), header.get("codes")) != (json.loads(json.dumps(provenance)), settings.codes):
            check_unused(output)  # another training behind the same blocks, or other files of the same codes
        work.remove()
        return load_ternary(output, dtype=dtype, device="cpu")
    if task:
        WorkFolder(task.directory, provenance["end_to_end"])
    walked = all(work.holds(name) for name in source.names)  # by a run before this one
    if not walked:
        calibration = calibrate(source, pipeline_dir, settings, work) if settings.prompts else None
        reconstruction = None
        if settings.reconstruction_steps:
            reconstruction = ReconstructionSettings(settings.reconstruction_steps, seed=settings.seed)
        how = WalkSettings(settings.init, reconstruction, low_rank=settings.low_rank)
        quantize_blocks(source, calibration, how, work, report)
        del calibration  # its part of the GPU

    transformer = collect(source, work)
    rows = []
    for name in source.names:
        ratios = work.load(name)[1]
        rows += ratios
        if walked:
            report(name, ratios)
    records: list[Record] = []
    if task and prompts:
        del source  # its part of the GPU
        if not task.prepared:
            task.prepare(transformer, encode(pipeline_dir, prompts.distinct, settings.sampling, device))
        gc.collect()
        torch.cuda.empty_cache()  # ranks are processes of their own, and want this GPU too
        (run_on_gpus or _run_on(device))(task)
        transformer, records = task.result()
    made = work.directory / "checkpoint"
    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed while it wrote
    method = "self-distillation" if records else settings.init
    save_ternary(transformer, made, provenance, method=method, codes=settings.codes)
    write_table(rows, made / TABLE)
    write_plot(rows, made / PLOT, title="before the training end to end" if records else None)
    if records:
        write_log(records, made / LOG)
    if task and task.images:
        shutil.copytree(task.directory / IMAGES, made / IMAGES)
    os.replace(made, output)  # whole, or not at all
    work.remove()
    return transformer


def check_blocks_fit(source: BlockSource, settings: QuantizeSettings) -> None:
    """UserError for too little GPU memory, before anything is loaded."""
    required = required_bytes(
        source.empty,
        states=len(settings.prompts) * settings.states_a_prompt,
        batch=settings.batch,
        tokens=settings.sampling.tokens,
        compensated=settings.init == "compensated",
        corrected=settings.low_rank > 0,
        trained=settings.reconstruction_steps > 0,
        dtype=source.dtype,
    )
    check_memory(required, source.device)


def arithmetic_of(source: BlockSource) -> str:
    """What decides the codes beside the recipe."""
    return f"{source.dtype} on {source.device.type}, revision {REVISION}"


def check_output(output: Path) -> bool:
    """Whether `output` is a checkpoint whose work still lies in `<output>.partial`: its run was killed at the very end.

    UserError for a place that is in use otherwise, and for one that no folder can be put in place of.
    """
    output = _unlinked(output)
    if output.absolute().is_mount():
        raise UserError(f"{output} is a mount point: name a folder in it")
    try:
        check_unused(output)
    except UserError:
        if output.name in ("", "..") or not (output / "config.json").is_file() or not _partial(output).is_dir():
            raise
        recipe = _partial(output) / RECIPE
        if not recipe.is_file():
            raise
        blocks = read_json(recipe, f"remove {recipe.parent}")
        provenance = _header(output).get("provenance")
        # Each says what the other leaves out: the arithmetic, and the training behind the blocks.
        if not isinstance(provenance, dict) or _without(blocks, ARITHMETIC) != _without(provenance, "end_to_end"):
            raise
        return True
    return False


def check_outside(output: Path, pipeline_dir: Path) -> None:
    """UserError where `output` would lie in a part of the pipeline: the work in it would make it another model."""
    for part in ("transformer", *CONDITIONS):
        if output.resolve().is_relative_to((pipeline_dir / part).resolve()):
            raise UserError(f"{output} lies in {pipeline_dir / part}, which is read: name a folder elsewhere")


def encode(pipeline_dir: Path, prompts: tuple[str, ...], sampling: Sampling, device: torch.device) -> Conditions:
    """The prompts' embeddings, on the CPU. The text encoders are gone from the device afterwards.

    UserError for embeddings that are not finite: no step on them would ever end in codes.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"encoding {len(prompts):,} prompts", flush=True)
    embeddings = TextEncoder(pipeline_dir, device, dtype, sampling.max_sequence_length).encode(prompts, ENCODE_BATCH)
    for prompt, embedding in zip(prompts, embeddings, strict=True):
        if not (embedding.prompt_embeds.isfinite().all() and embedding.pooled.isfinite().all()):
            raise UserError(
                f"the text encoders of {pipeline_dir} give values that are not finite for '{prompt}': "
                "copy the model again"
            )
    image_ids_L3 = FluxPipeline._prepare_latent_image_ids(
        1,
        sampling.height // PIXELS_PER_TOKEN,
        sampling.width // PIXELS_PER_TOKEN,
        torch.device("cpu"),
        torch.float32,
    )
    return Conditions(
        torch.stack([embedding.prompt_embeds for embedding in embeddings]),
        torch.stack([embedding.pooled for embedding in embeddings]),
        image_ids_L3,
    )


def provenance_of(pipeline_dir: Path, settings: QuantizeSettings) -> dict:
    """What decides the codes, in plain values."""
    prompts = digest_of(settings.prompts) if settings.prompts else None
    made_by = {
        "teacher": fingerprint(pipeline_dir / "transformer"),
        "init": settings.init,
        "calibration": prompts,
        "calibration_prompts": len(settings.prompts),
        "states_a_prompt": settings.states_a_prompt,
        "reconstruction_steps": settings.reconstruction_steps,
        "sampling": vars(settings.sampling),
        "batch": settings.batch,
        "seed": settings.seed,
    }
    if settings.prompts or settings.end_to_end:
        made_by["conditions"] = fingerprint(*(pipeline_dir / part for part in CONDITIONS))
    if settings.low_rank:
        made_by["low_rank"] = settings.low_rank
    if settings.end_to_end:
        made_by["end_to_end"] = {**asdict(settings.end_to_end), "prompts": digest_of(settings.distill_prompts)}
    return made_by


def digest_of(prompts: tuple[str, ...]) -> str:
    """Of prompts in their order."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]


def calibrate(source: BlockSource, pipeline_dir: Path, settings: QuantizeSettings, work: WorkFolder) -> CalibrationSet:
    """The calibration states that `work` holds, or that it then holds, made from wherever it has come to.

    UserError as `load_scheduler`.
    """
    conditions = encode(pipeline_dir, settings.prompts, settings.sampling, source.device)
    calibration = Calibration(conditions, settings.sampling.guidance, settings.batch)
    states = work.load_states()
    if states is None:
        scheduler = load_scheduler(pipeline_dir)
        sigmas = sampler_sigmas(scheduler, settings.sampling.steps, len(conditions.image_ids_L3), torch.device("cpu"))
        how = (source, sigmas, settings.states_a_prompt, settings.seed)
        states = calibration.trajectories(*how, begun=work.load_walk(), keep=work.save_walk)
        work.save_states(states)
    return CalibrationSet(calibration, states)


def collect(source: BlockSource, work: WorkFolder) -> FluxTransformer2DModel:
    """The transformer on the CPU, from the finished blocks and the teacher's rest: ternary where the blocks are."""
    transformer = empty_transformer(source.config)
    state = {key: tensor.cpu() for key, tensor in source.outside.state_dict().items()}
    for name in source.names:
        tensors, _ = work.load(name)
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    ternary = {key.removesuffix(".packed") for key in state if key.endswith(".packed")}
    rank = next((len(tensor) for key, tensor in state.items() if key.endswith(".down")), 0)
    empty_ternary_linears(transformer, names=ternary, rank=rank)
    transformer.load_state_dict(state, assign=True)
    return transformer.eval().requires_grad_(False)


def _partial(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _unlinked(output: Path) -> Path:
    """Where a link leads: a folder is put in place of another folder, not of a link to one. UserError for a circle."""
    try:
        return output.resolve() if output.is_symlink() else output
    except (RuntimeError, OSError) as error:
        raise UserError(f"{output} is a link that leads nowhere: name another folder") from error


def _header(output: Path) -> dict:
    """What BitFlux wrote into the checkpoint's configuration; empty for another model's."""
    header = read_json(output / "config.json", "name another output").get("quantization_config")
    return header if isinstance(header, dict) else {}


def _without(settings: dict, key: str) -> dict:
    return {name: value for name, value in settings.items() if name != key}


def _run_on(device: torch.device) -> Callable[[EndToEndTask], None]:
    return lambda task: task.run(device)
