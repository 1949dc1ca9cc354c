"""The last phase of a quantization: the whole student trained against the whole teacher.

A process that trains needs no more than an EndToEndTask, whose models and prompts lie in files: here, or on every rank
of several.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch.distributed.device_mesh import DeviceMesh

from bitflux_core.checkpoint import empty_transformer, load_ternary, save_ternary
from bitflux_core.distill import Conditions, load_scheduler
from bitflux_core.distill_checkpoint import load_tensors, save_tensors
from bitflux_core.distill_memory import check_memory, memory_plan
from bitflux_core.distill_recipe import EndToEndSettings, Record
from bitflux_core.distill_training import EndToEnd, finished, load_result
from bitflux_core.errors import UserError
from bitflux_core.files import read_json
from bitflux_core.generate import ImageGenerator, PromptEmbedding
from bitflux_core.loading import load_transformer
from bitflux_core.quantizer.work import REMEDY
from bitflux_core.samples import Sampling
from bitflux_core.training import arithmetic_restored

GRAPH_BELOW = 1e9  # parameters: kernels of smaller models take less time than Python takes to launch them
IMAGES = "images"
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("phase", pa.string(), nullable=False),
        pa.field("loss", pa.float64()),
        pa.field("held_out", pa.float64(), nullable=False),
        pa.field("codes_flipped", pa.float64(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Prompts:
    """Prompts that a training takes: `distinct` ones, and of them by place those trained on and those held out."""

    distinct: tuple[str, ...]
    trained: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class EndToEndTask:
    """A training in `directory`, which holds all but the teacher: start, conditions, checkpoints, result.

    `images` of the held-out prompts are drawn with every record, the same noise each time, and kept as
    `images/step-STEP.png` side by side; of records made before, in another run, only the last one's if it is missing.
    `low_rank` is the rank of the start's corrections.
    """

    pipeline_dir: Path
    directory: Path
    settings: EndToEndSettings
    sampling: Sampling
    trained: tuple[int, ...]
    held_out: tuple[int, ...]
    gpus: int = 1
    images: int = 0
    low_rank: int = 0

    def prepare(self, start: FluxTransformer2DModel, conditions: Conditions) -> None:
        """Keeps what `run` reads; what an earlier call kept stays."""
        if not (self._start / "config.json").is_file():
            for file in self._start.glob("*"):  # of a run that was killed while it wrote
                file.unlink()
            save_ternary(start, self._start, {}, method="start", codes="planes", dtype=torch.float32)
        if not self._conditions.is_file():
            save_tensors(self._conditions, vars(conditions))

    @property
    def prepared(self) -> bool:
        return (self._start / "config.json").is_file() and self._conditions.is_file()

    @arithmetic_restored()
    def run(self, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        """Trains to the end, from the last checkpoint. With `mesh` every rank calls it.

        UserError for too little GPU memory, before anything is loaded, and for damaged files.
        """
        records = finished(self._training, self.settings.steps)
        if records and not self._lacks_image(records):
            return
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        conditions = self._load_conditions()
        self.check(device)
        teacher = load_transformer("bf16", pipeline_dir=self.pipeline_dir, ternary_dir=None, device=device, dtype=dtype)
        start = self._load_start()
        scheduler = load_scheduler(self.pipeline_dir)
        places = (self.trained, self.held_out)
        graph = self._by_graph(teacher, device)
        parts = (teacher, start, scheduler, conditions, *places, self.settings, device, self._training, mesh, graph)
        training = EndToEnd(*parts)
        drawn = self.held_out[: self.images]
        if not drawn:
            training.run()
            return
        embeddings = [PromptEmbedding(conditions.prompt_embeds_PTD[at], conditions.pooled_PD[at]) for at in drawn]
        generator = ImageGenerator(training.student, self.pipeline_dir, device, dtype)

        def look(_student: FluxTransformer2DModel, step: int) -> None:
            """Every rank draws, since all of them hold parts of the student."""
            images = [
                generator.draw([embedding], [seed], self.sampling)[0] for seed, embedding in enumerate(embeddings)
            ]
            if training.rank == 0:
                file = self._image(step)
                file.parent.mkdir(exist_ok=True)
                temporary = file.with_suffix(".tmp")  # a file of this name is whole: nobody draws it again
                Image.fromarray(np.concatenate(images, axis=1)).save(temporary, format="png")
                os.replace(temporary, file)

        if self._lacks_image(training.records):
            # The weights are those of the last record, since the checkpoint is made with it: of a run that was killed
            # before it drew, or was not asked for images. No rank is through before every rank has begun to draw.
            training.show(look)
        training.run(look)

    def check(self, device: torch.device) -> None:
        """UserError where a step would not fit the GPU, the GPUs not the batch, or the optimizer not several GPUs."""
        by_adam = self.settings.optimizer == "adam"
        if by_adam and self.gpus > 1:
            raise UserError(f"AdamW trains on one GPU, not on {self.gpus}: take the factored optimizer")
        if self.settings.batch % self.gpus:
            raise UserError(
                f"batches of {self.settings.batch} images on {self.gpus} GPUs: "
                f"take a multiple of {self.gpus} (--distill-batch)"
            )
        empty = empty_transformer(self._config())
        plan = memory_plan(
            empty,
            batch=self.settings.batch // self.gpus,
            tokens=self.sampling.tokens,
            features=self.settings.features,
            gpus=self.gpus,
            low_rank=self.low_rank,
            dtype=torch.bfloat16,
            by_adam=by_adam,
            recomputed=not self._by_graph(empty, device),
        )
        check_memory(plan, device)

    def result(self) -> tuple[FluxTransformer2DModel, list[Record]]:
        """The best student, ternary and on the CPU, and the log. UserError where the training has not ended."""
        records = finished(self._training, self.settings.steps)
        if records is None:
            raise UserError(f"the training in {self._training} has not ended: run the same command again")
        return load_result(self._config(), self._training), records

    def _load_conditions(self) -> Conditions:
        try:
            return Conditions(**load_tensors(self._conditions, REMEDY))
        except TypeError as error:
            raise UserError(f"{self._conditions} holds something else ({error}): {REMEDY}") from error

    def _load_start(self) -> FluxTransformer2DModel:
        try:
            return load_ternary(self._start, dtype=torch.float32, device="cpu")
        except UserError as error:
            # Its remedy is for checkpoints that a user made.
            raise UserError(f"{self._start} is damaged: {REMEDY} ({error})") from error

    def _by_graph(self, transformer: FluxTransformer2DModel, device: torch.device) -> bool:
        small = sum(parameter.numel() for parameter in transformer.parameters()) < GRAPH_BELOW
        return device.type == "cuda" and self.gpus == 1 and small

    def _lacks_image(self, records: list[Record]) -> bool:
        return bool(records and self.images) and not self._image(records[-1].step).is_file()

    def _image(self, step: int) -> Path:
        return self.directory / IMAGES / f"step-{step:08}.png"

    @property
    def _start(self) -> Path:
        return self.directory / "start"

    @property
    def _conditions(self) -> Path:
        return self.directory / "conditions.safetensors"

    @property
    def _training(self) -> Path:
        return self.directory / "training"

    def _config(self) -> dict:
        return read_json(self.pipeline_dir / "transformer" / "config.json", "name the folder of a FLUX pipeline")


def split_prompts(prompts: Sequence[str], held_out: int, seed: int) -> Prompts:
    """Holds `held_out` of the distinct prompts out, at random. UserError where none would be left."""
    distinct = tuple(dict.fromkeys(prompts))
    if len(distinct) <= held_out:
        raise UserError(f"{len(distinct)} prompts, of which {held_out} are held out: give more to train on")
    aside = set(random.Random(seed).sample(range(len(distinct)), held_out))
    place = {prompt: index for index, prompt in enumerate(distinct)}
    trained = tuple(place[prompt] for prompt in prompts if place[prompt] not in aside)
    return Prompts(distinct, trained, tuple(sorted(aside)))


def write_log(records: Sequence[Record], path: Path) -> None:
    """Parquet with the columns of `Record`."""
    pq.write_table(pa.Table.from_pylist([asdict(record) for record in records], schema=SCHEMA), path)
