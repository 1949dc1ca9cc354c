"""Trains the mini FLUX transformer with its CLIP encoder: flow matching, then guidance distilled into its embedding.

T5 stays as the text stage left it, frozen as FLUX's is: trained with the flow it soon forgets the order of words, and
"left of" comes out at chance.

Legend: B batch, P prompts, T text tokens, S image tokens, C packed latent channels.
"""

import copy
from collections.abc import Callable

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.models import TOKENS
from bitflux_core.mini.render import PromptTable, render, sample_scenes
from bitflux_core.optimizers import Muon
from bitflux_core.training import (
    Average,
    FlatGradients,
    Progress,
    RunningMean,
    capture,
    start_process_group,
    warmup_then_linear,
)

LEARNING_RATE = 1e-3
MATRIX_LEARNING_RATE = 2e-3
PROMPT_DROP = 0.1
AVERAGE_DECAY = 0.999
TIME_MEAN, TIME_SPREAD = 0.4, 1.1  # t = sigmoid(mean + spread * normal): the sampler's shift of 3 lives at high noise
GUIDANCE_RANGE = (1.0, 4.0)


class Velocity(nn.Module):
    """Token ids to velocity: both text encoders and the transformer, as FluxPipeline joins them. T5 is frozen."""

    def __init__(self, pipeline: FluxPipeline, latent_side: int):
        super().__init__()
        self.clip, self.t5 = pipeline.text_encoder, pipeline.text_encoder_2.eval().requires_grad_(False)
        self.transformer = pipeline.transformer
        device = torch.device("cpu")
        image_ids = FluxPipeline._prepare_latent_image_ids(1, latent_side, latent_side, device, torch.float32)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", torch.zeros(TOKENS, 3), persistent=False)

    def forward(self, x_BSC: Tensor, t_B: Tensor, clip_ids_BT: Tensor, t5_ids_BT: Tensor, guidance_B: Tensor) -> Tensor:
        return self.transformer(
            hidden_states=x_BSC,
            timestep=t_B,
            guidance=guidance_B,
            pooled_projections=self.clip(input_ids=clip_ids_BT).pooler_output,
            encoder_hidden_states=self.t5(input_ids=t5_ids_BT).last_hidden_state,
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


class Dataset:
    """Latents of rendered scenes and their prompts, made once on the device: latents_NSC bfloat16, prompt_N int64."""

    def __init__(self, pipeline: FluxPipeline, count: int, device: torch.device, seed: int):
        specs, weights = training_prompts()
        texts = [spec.text for spec in specs]
        self.clip_ids_PT = _token_ids(pipeline.tokenizer, [*texts, ""]).to(device)
        self.t5_ids_PT = _token_ids(pipeline.tokenizer_2, [*texts, ""]).to(device)
        self.empty_prompt = len(texts)
        generator = torch.Generator(device).manual_seed(seed)
        table, probability = PromptTable.build(specs, device), torch.tensor(weights, device=device)
        self.prompt_N = torch.multinomial(probability, count, replacement=True, generator=generator)
        vae = pipeline.vae
        parts = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for index in self.prompt_N.split(1024):
                image = render(sample_scenes(table, index, generator), generator)[0] * 2 - 1
                latents = vae.encode(image.contiguous(memory_format=torch.channels_last)).latent_dist.mean
                latents = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
                parts.append(FluxPipeline._pack_latents(latents, *latents.shape).bfloat16())
        self.latents_NSC = torch.cat(parts)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Random (latents_BSC float32, prompt_B), by the default generator so that a captured step may call it."""
        chosen = torch.randint(len(self.prompt_N), (size,), device=self.prompt_N.device)
        return self.latents_NSC[chosen].float(), self.prompt_N[chosen]


def _token_ids(tokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids


class Trainer:
    """Optimizers, averaged weights and the captured step of one training phase."""

    def __init__(self, model: Velocity, loss: Callable[[], Tensor], *, scale: float, world: int):
        self.device, self.world, self.scale = model.transformer.device, world, scale
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = FlatGradients(parameters)
        self.lr = torch.tensor(0.0, device=self.device)
        self.matrix_lr = torch.tensor(0.0, device=self.device)
        blocks = [model.transformer.transformer_blocks, model.transformer.single_transformer_blocks]
        matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        self.muon = Muon(matrices, self.matrix_lr)
        self.adam = torch.optim.AdamW(
            [p for p in parameters if id(p) not in chosen],
            lr=self.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            capturable=self.device.type == "cuda",
        )
        self.average = Average(parameters, AVERAGE_DECAY)
        self.loss_mean = RunningMean(self.device, decay=0.999)

        def backward() -> None:
            self.gradients.zero()
            value = loss()
            value.backward()
            self.loss_mean.add(value)

        self.backward = capture(backward, self.device)
        self.update = capture(self._update, self.device, warmup=1)

    def _update(self) -> None:
        self.gradients.clip(1.0)
        self.muon.step()
        self.adam.step()
        self.average.update()

    def run(self, name: str, steps: int, rank: int, seconds: float | None = None) -> None:
        """Runs `steps` steps, or as many as take about `seconds`, and leaves the averaged weights in the model."""
        progress = Progress(name, steps, rank)
        step = 0
        while step < progress.steps:
            if seconds:
                progress.fit_into(seconds, step, self.device)
            factor = self.scale * warmup_then_linear(step, progress.steps)
            self.lr.fill_(LEARNING_RATE * factor)
            self.matrix_lr.fill_(MATRIX_LEARNING_RATE * factor)
            self.backward()
            self.gradients.average_over_ranks(self.world)
            self.update()
            progress.report(step, self.loss_mean.mean)
            step += 1
        self.average.copy_to_live()


def train_teacher(
    pipeline: FluxPipeline,
    *,
    steps: int,
    guidance_steps: int,
    batch: int,
    images: int,
    device: torch.device,
    seed: int,
    after_flow: Callable[[], None] = lambda: None,
    seconds: float | None = None,
) -> None:
    """Trains the pipeline's transformer and CLIP text encoder in place; under torchrun on every GPU, `batch` a GPU.

    `after_flow` is called between the phases, when the pipeline draws without guidance: the place to save it. With
    `seconds` the flow phase makes as many steps as fit in that time, whatever `steps` says.
    """
    rank, world = start_process_group()
    torch.manual_seed(seed)
    pipeline.to(device)
    pipeline.vae.to(memory_format=torch.channels_last)
    data = Dataset(pipeline, images, device, seed + 1000 * (rank + 1))
    torch.manual_seed(seed + rank)
    model = Velocity(pipeline, latent_side=int(data.latents_NSC.shape[1] ** 0.5)).to(device).float()
    for part in (pipeline.transformer, pipeline.text_encoder):
        part.train().requires_grad_(True)
    if device.type == "cuda":
        pipeline.transformer.compile_repeated_blocks()

    def noisy_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        clean, prompt = data.batch(batch)
        noise = torch.randn_like(clean)
        t = torch.sigmoid(TIME_MEAN + TIME_SPREAD * torch.randn(batch, device=device))
        return torch.lerp(clean, noise, t[:, None, None]), t, noise - clean, prompt

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)

    def flow_loss() -> Tensor:
        x, t, target, prompt = noisy_batch()
        dropped = torch.rand(batch, device=device) < PROMPT_DROP
        prompt = torch.where(dropped, data.empty_prompt, prompt)
        with autocast():
            v = model(x, t, data.clip_ids_PT[prompt], data.t5_ids_PT[prompt], torch.ones(batch, device=device))
        return (v.float() - target).square().mean()

    Trainer(model, flow_loss, scale=1.0, world=world).run("flow", steps, rank, seconds)
    after_flow()

    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if device.type == "cuda":
        frozen.transformer.compile_repeated_blocks()
    empty = torch.full((batch,), data.empty_prompt, device=device)
    ones = torch.ones(batch, device=device)

    def guidance_loss() -> Tensor:
        x, t, _, prompt = noisy_batch()
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(batch, device=device)
        with autocast():
            with torch.no_grad():
                with_prompt = frozen(x, t, data.clip_ids_PT[prompt], data.t5_ids_PT[prompt], ones).float()
                without = frozen(x, t, data.clip_ids_PT[empty], data.t5_ids_PT[empty], ones).float()
                target = without + guidance[:, None, None] * (with_prompt - without)
            v = model(x, t, data.clip_ids_PT[prompt], data.t5_ids_PT[prompt], guidance)
        return (v.float() - target).square().mean()

    if guidance_steps:
        Trainer(model, guidance_loss, scale=0.25, world=world).run("guidance", guidance_steps, rank)
