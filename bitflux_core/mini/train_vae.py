"""Trains the mini autoencoder on rendered scenes, then measures the latents' scale and shift."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from bitflux_core.mini.compositions import training_prompts
from bitflux_core.mini.render import PromptTable, render, sample_scenes
from bitflux_core.training import Progress, RunningMean, capture, warmup_then_cosine

LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-3
FRESH_EVERY = 8  # steps on one pool of rendered images


def reconstruction_loss(image: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 MSE + L1 of the gradients: sharp edges on flat colour."""
    error = image - target
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + gradients


def train_vae(
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> None:
    """Trains `vae` in place and sets its config's scaling_factor and shift_factor."""
    specs, weights = training_prompts()
    table, probability = PromptTable.build(specs, device), torch.tensor(weights, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    vae.to(device).train()

    def fresh(count: int) -> Tensor:
        index = torch.multinomial(probability, count, replacement=True, generator=generator)
        return render(sample_scenes(table, index, generator), generator)[0] * 2 - 1

    pool = fresh(FRESH_EVERY * batch)
    pixels = pool[:batch].clone()
    lr = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, capturable=device.type == "cuda"
    )
    loss_mean = RunningMean(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            mean, logvar = vae._encode(pixels).float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            image = vae._decode(latents, return_dict=False)[0]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(image.float(), pixels) + KL_WEIGHT * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        loss_mean.add(loss)

    replay = capture(step, device)
    progress = Progress("vae", steps)
    for index in range(steps):
        lr.fill_(learning_rate * warmup_then_cosine(index, steps))
        if index % FRESH_EVERY == 0:
            pool = fresh(FRESH_EVERY * batch)
        pixels.copy_(pool[(index % FRESH_EVERY) * batch :][:batch])
        replay()
        progress.report(index, loss_mean.mean)
    vae.eval()
    with torch.no_grad():
        sample = fresh(4 * batch)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in sample.split(batch)])
        image = torch.cat([vae.decode(part).sample for part in latents.split(batch)])
    psnr = -10 * torch.log10(F.mse_loss(image.clamp(-1, 1), sample) / 4)
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
    print(f"vae: PSNR {psnr:.1f} dB, latents {latents.mean():.3f} +- {latents.std():.3f}", flush=True)
