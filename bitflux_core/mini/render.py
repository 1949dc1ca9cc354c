"""Draws mini-world scenes on any torch device by signed distance functions: an endless stream of training images.

Legend: B scenes, O = MAX_OBJECTS object slots, H = W = 128 pixels. An empty slot has shape `NO_SHAPE`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitflux_core.mini.world import (
    ANY,
    COLORS,
    HELD_OUT,
    MAX_OBJECTS,
    NEXT_TO,
    PALETTE,
    SHAPES,
    PromptSpec,
)

SIZE = 128
NO_SHAPE = len(SHAPES)
MARGIN = 3.0  # pixels between an object and the border
GAP = 6.0  # pixels between two objects
RADIUS = {1: (24.0, 38.0), 2: (19.0, 27.0), 3: (15.0, 21.0), 4: (15.0, 21.0)}
TRIES = 48


@dataclass
class PromptTable:
    """Prompt specs as tensors: shapes_PO, colors_PO (`ANY` where free), count_P, relation_P, same_color_P."""

    shapes_PO: Tensor
    colors_PO: Tensor
    count_P: Tensor
    relation_P: Tensor
    same_color_P: Tensor

    @classmethod
    def build(cls, specs: list[PromptSpec], device: torch.device | str) -> "PromptTable":
        def pad(values: tuple[int, ...], fill: int) -> list[int]:
            return list(values) + [fill] * (MAX_OBJECTS - len(values))

        def as_tensor(rows: list) -> Tensor:
            return torch.tensor(rows, device=device)

        return cls(
            shapes_PO=as_tensor([pad(spec.shapes, NO_SHAPE) for spec in specs]),
            colors_PO=as_tensor([pad(spec.colors, ANY) for spec in specs]),
            count_P=as_tensor([len(spec.shapes) for spec in specs]),
            relation_P=as_tensor([spec.relation for spec in specs]),
            same_color_P=as_tensor([spec.tag == "counting" for spec in specs]),
        )


@dataclass
class Scenes:
    """Concrete scenes: shapes_BO, colors_BO (palette indices), x_BO, y_BO, radius_BO in pixels."""

    shapes_BO: Tensor
    colors_BO: Tensor
    x_BO: Tensor
    y_BO: Tensor
    radius_BO: Tensor


def sample_scenes(table: PromptTable, index_B: Tensor, generator: torch.Generator) -> Scenes:
    """One random scene for each chosen prompt. Free colours never form a held-out pair."""
    shapes_BO = table.shapes_PO[index_B]
    colors_BO = _sample_colors(shapes_BO, table.colors_PO[index_B], table.same_color_P[index_B], generator)
    x_BO, y_BO, radius_BO = _place(table.count_P[index_B], table.relation_P[index_B], generator)
    return Scenes(shapes_BO, colors_BO, x_BO, y_BO, radius_BO)


def _sample_colors(shapes_BO: Tensor, wanted_BO: Tensor, same_B: Tensor, generator: torch.Generator) -> Tensor:
    device = shapes_BO.device
    allowed = torch.ones(len(SHAPES) + 1, len(COLORS), device=device)
    for shape, color in HELD_OUT:
        allowed[shape, color] = 0
    free_BO = torch.multinomial(allowed[shapes_BO].flatten(0, 1), 1, generator=generator).view(shapes_BO.shape)
    free_BO = torch.where(same_B[:, None], free_BO[:, :1], free_BO)
    return torch.where(wanted_BO == ANY, free_BO, wanted_BO)


def _place(count_B: Tensor, relation_B: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and radii without overlap: the first of `TRIES` random candidates that fits, else the roomiest."""
    device, batch = count_B.device, count_B.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    bounds = torch.tensor([RADIUS[n] for n in range(1, MAX_OBJECTS + 1)], device=device)[count_B - 1]
    radius_BO = bounds[:, :1] + (bounds[:, 1:] - bounds[:, :1]) * uniform(batch, MAX_OBJECTS)
    low_BO = radius_BO + MARGIN
    center_BTO2 = low_BO[:, None, :, None] + (SIZE - 2 * low_BO)[:, None, :, None] * uniform(
        batch, TRIES, MAX_OBJECTS, 2
    )
    present_BO = torch.arange(MAX_OBJECTS, device=device) < count_B[:, None]
    offset_BTOO2 = center_BTO2[:, :, :, None] - center_BTO2[:, :, None]
    room_BTOO = offset_BTOO2.norm(dim=-1) - (radius_BO[:, :, None] + radius_BO[:, None])[:, None]
    pair_BOO = present_BO[:, :, None] & present_BO[:, None]
    pair_BOO &= ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=device)
    room_BT = room_BTOO.masked_fill(~pair_BOO[:, None], SIZE).amin(dim=(-1, -2))

    # A relation holds clearly: object 1 lies along one axis from object 0, at most 40 % off it sideways.
    dx_BT, dy_BT = (center_BTO2[:, :, 1] - center_BTO2[:, :, 0]).unbind(-1)
    along = torch.stack([-dx_BT, dx_BT, -dy_BT, dy_BT, dx_BT.abs()])
    across = torch.stack([dy_BT, dy_BT, dx_BT, dx_BT, dy_BT]).abs()
    clear_BT = (across - 0.4 * along).gather(0, relation_B.clamp(0, NEXT_TO)[None, :, None].expand(1, -1, TRIES))[0]
    score_BT = (room_BT - GAP).clamp(max=0.0)
    score_BT = torch.where(relation_B[:, None] == ANY, score_BT, score_BT + (-clear_BT).clamp(max=0.0))
    best_B = score_BT.argmax(dim=1)
    center_BO2 = center_BTO2[torch.arange(batch, device=device), best_B]
    return center_BO2[..., 0], center_BO2[..., 1], radius_BO


def shape_distances(u: Tensor, v: Tensor) -> list[Tensor]:
    """Signed distance of each shape in `SHAPES` at (u, v), the shape filling about [-1, 1] squared, v pointing down."""
    au, av = u.abs(), v.abs()
    rho = (u.square() + v.square()).sqrt()
    circle = rho - 0.97
    square = torch.maximum(au, av) - 0.82
    triangle = torch.maximum(v - 0.8, (au * 1.8 - (v + 1) * 0.95) / 2.035)
    # Five-fold folding brings every point of the star next to the edge from its tip (1, 0) to the inner corner.
    fifth = 2 * torch.pi / 5
    angle = torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2
    inner_x, inner_y = 0.44 * 0.80902, 0.44 * 0.58779
    normal = (inner_y**2 + (1 - inner_x) ** 2) ** 0.5
    star = ((rho * angle.cos() - 1) * inner_y + rho * angle.abs().sin() * (1 - inner_x)) / normal
    lobes = ((au - 0.4).square() + (v + 0.32).square()).sqrt() - 0.566
    heart = torch.minimum(lobes, (au + (v - 0.08).abs() - 0.8) * 0.7071)
    cross = torch.minimum(torch.maximum(au - 0.98, av - 0.34), torch.maximum(au - 0.34, av - 0.98))
    ring = (rho - 0.76).abs() - 0.22
    moon = torch.maximum(rho - 0.98, 0.82 - ((u - 0.52).square() + v.square()).sqrt())
    return [circle, square, triangle, star, heart, cross, ring, moon]


def coverage(scenes: Scenes) -> Tensor:
    """Antialiased coverage of each object, float32 [B, O, H, W] in [0, 1]; an empty slot covers nothing."""
    device = scenes.x_BO.device
    grid = torch.arange(SIZE, device=device) + 0.5
    radius = scenes.radius_BO[..., None, None]
    u = (grid[None, None, None, :] - scenes.x_BO[..., None, None]) / radius
    v = (grid[None, None, :, None] - scenes.y_BO[..., None, None]) / radius
    u, v = torch.broadcast_tensors(u, v)
    chosen = torch.full_like(u, float(SIZE))
    for shape, distance in enumerate(shape_distances(u, v)):
        chosen = torch.where((scenes.shapes_BO == shape)[..., None, None], distance, chosen)
    return (0.5 - chosen * radius).clamp(0, 1)


def render(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, float32 [B, 3, H, W] in [0, 1], and object masks, bool [B, O, H, W]."""
    device = scenes.x_BO.device
    coverage_BOHW = coverage(scenes)
    palette = torch.tensor(list(PALETTE.values()), device=device)
    batch = scenes.x_BO.shape[0]
    jitter = 0.05 * (torch.rand(batch, MAX_OBJECTS, 3, device=device, generator=generator) - 0.5)
    rgb_BO3 = (palette[scenes.colors_BO] + jitter).clamp(0, 1)
    light = 0.82 + 0.08 * torch.rand(batch, 1, device=device, generator=generator)
    tint = 0.04 * (torch.rand(batch, 3, device=device, generator=generator) - 0.5)
    image = (light + tint)[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    for slot in range(MAX_OBJECTS):
        alpha = coverage_BOHW[:, slot, None]
        image = image * (1 - alpha) + rgb_BO3[:, slot, :, None, None] * alpha
    return image, coverage_BOHW > 0.5
