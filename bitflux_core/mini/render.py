"""Draws mini-world scenes on any torch device by signed distance functions: an endless stream of training images.

Legend: B scenes, O = MAX_OBJECTS object slots, H = W = 128 pixels. An empty slot has shape `NO_SHAPE`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitflux_core.mini.world import (
    ANY,
    COLORS,
    FORMS,
    HANGING,
    HELD_OUT,
    IN_FRONT,
    INSIDE,
    MAX_OBJECTS,
    NEXT_TO,
    PALETTE,
    SHAPES,
    STANDING,
    TEXTURES,
    TOUCHING,
    PromptSpec,
)

SIZE = 128
NO_SHAPE = len(SHAPES)
MARGIN = 3.0  # pixels between an object and the border
GAP = 6.0  # pixels between two objects
RADIUS = {1: (24.0, 38.0), 2: (19.0, 27.0), 3: (15.0, 21.0), 4: (15.0, 21.0)}
TRIES = 48
# By form: half the width and half the height, in radii; and the radius itself where the form decides it.
STRETCH = ((1.0, 1.0), (0.6, 1.1), (1.1, 0.6), (1.0, 1.0), (1.0, 1.0))
FORM_RADIUS = {FORMS.index("big"): (28.0, 32.0), FORMS.index("small"): (11.0, 14.0)}
# Objects that meet: how far object 1 lies from object 0, in mean radii along the direction that the relation gives.
MEETING = {IN_FRONT: (0.8, 1.1), TOUCHING: (1.75, 1.9), INSIDE: (0.0, 0.1), STANDING: (1.7, 1.85), HANGING: (1.7, 1.85)}
UP, DOWN = -torch.pi / 2, torch.pi / 2
SPREAD = 0.25  # radians that contact from above or below may lean
HOLDS = (32.0, 38.0)  # radius of what another object is inside of,
HELD = 0.4  # and that one's share of it
TEXTURE_CELLS = 2.5  # stripes, dots and checks in a radius: about eight pixels each
SHADE = 0.55  # how far a texture's second tone is from the first one towards white


@dataclass
class PromptTable:
    """Prompt specs as tensors: shapes_PO, colors_PO (`ANY` where free), textures_PO, forms_PO; count_P, relation_P,
    third_P, same_color_P."""

    shapes_PO: Tensor
    colors_PO: Tensor
    textures_PO: Tensor
    forms_PO: Tensor
    count_P: Tensor
    relation_P: Tensor
    third_P: Tensor
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
            textures_PO=as_tensor([pad(spec.textures, 0) for spec in specs]),
            forms_PO=as_tensor([pad(spec.forms, 0) for spec in specs]),
            count_P=as_tensor([len(spec.shapes) for spec in specs]),
            relation_P=as_tensor([spec.relation for spec in specs]),
            third_P=as_tensor([spec.third for spec in specs]),
            same_color_P=as_tensor([spec.tag == "counting" for spec in specs]),
        )


@dataclass
class Scenes:
    """Concrete scenes: shapes_BO, colors_BO (palette indices), textures_BO, forms_BO; x_BO, y_BO, radius_BO in pixels.

    A later object covers an earlier one; `covers_B` says whether object 1 is meant to.
    """

    shapes_BO: Tensor
    colors_BO: Tensor
    textures_BO: Tensor
    forms_BO: Tensor
    x_BO: Tensor
    y_BO: Tensor
    radius_BO: Tensor
    covers_B: Tensor


def sample_scenes(table: PromptTable, index_B: Tensor, generator: torch.Generator) -> Scenes:
    """One random scene for each chosen prompt. Free colours never form a held-out pair."""
    shapes_BO, forms_BO = table.shapes_PO[index_B], table.forms_PO[index_B]
    relation_B, third_B = table.relation_P[index_B], table.third_P[index_B]
    meets_B = relation_B > NEXT_TO
    colors_BO = _sample_colors(shapes_BO, table.colors_PO[index_B], table.same_color_P[index_B], meets_B, generator)
    x_BO, y_BO, radius_BO = _place(table.count_P[index_B], relation_B, third_B, forms_BO, generator)
    covers_B = (relation_B == IN_FRONT) | (relation_B == INSIDE)
    return Scenes(shapes_BO, colors_BO, table.textures_PO[index_B], forms_BO, x_BO, y_BO, radius_BO, covers_B)


def _sample_colors(
    shapes_BO: Tensor, wanted_BO: Tensor, same_B: Tensor, apart_B: Tensor, generator: torch.Generator
) -> Tensor:
    """Free colours: one for all objects where `same_B`, another for object 1 than for object 0 where `apart_B`."""
    device = shapes_BO.device
    allowed = torch.ones(len(SHAPES) + 1, len(COLORS), device=device)
    for shape, color in HELD_OUT:
        allowed[shape, color] = 0

    def drawn(weight_BOC: Tensor) -> Tensor:
        chosen = torch.multinomial(weight_BOC.flatten(0, 1), 1, generator=generator).view(shapes_BO.shape)
        return torch.where(wanted_BO == ANY, chosen, wanted_BO)

    free_BO = drawn(allowed[shapes_BO])
    others_BC = 1 - torch.nn.functional.one_hot(free_BO[:, 0], len(COLORS)).float()
    apart_BO = drawn(allowed[shapes_BO] * others_BC[:, None])
    free_BO[:, 1] = torch.where(apart_B, apart_BO[:, 1], free_BO[:, 1])
    same_BO = torch.where(wanted_BO == ANY, free_BO[:, :1], wanted_BO)
    return torch.where(same_B[:, None], same_BO, free_BO)


def _place(
    count_B: Tensor, relation_B: Tensor, third_B: Tensor, forms_BO: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and radii without overlap but where a relation asks for one: the first of `TRIES` random candidates that
    fits, else the roomiest."""
    device, batch = count_B.device, count_B.shape[0]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=generator)

    radius_BO = _radii(count_B, relation_B, forms_BO, uniform(batch, MAX_OBJECTS))
    stretch_BO2 = torch.tensor(STRETCH, device=device)[forms_BO]
    low_BO2 = radius_BO[..., None] * stretch_BO2 + MARGIN
    center_BTO2 = low_BO2[:, None] + (SIZE - 2 * low_BO2)[:, None] * uniform(batch, TRIES, MAX_OBJECTS, 2)

    meets_B = relation_B > NEXT_TO
    center_BTO2[:, :, 1] = torch.where(
        meets_B[:, None, None],
        center_BTO2[:, :, 0] + _meeting_offset(relation_B, radius_BO, uniform(2, batch, TRIES)),
        center_BTO2[:, :, 1],
    )
    outside_BT = (torch.minimum(center_BTO2, SIZE - center_BTO2) - low_BO2[:, None])[:, :, 1].clamp(max=0).sum(-1)

    present_BO = torch.arange(MAX_OBJECTS, device=device) < count_B[:, None]
    offset_BTOO2 = center_BTO2[:, :, :, None] - center_BTO2[:, :, None]
    reach_BO = (radius_BO[..., None] * stretch_BO2).amax(-1)
    room_BTOO = offset_BTOO2.norm(dim=-1) - (reach_BO[:, :, None] + reach_BO[:, None])[:, None]
    pair_BOO = present_BO[:, :, None] & present_BO[:, None]
    pair_BOO &= ~torch.eye(MAX_OBJECTS, dtype=torch.bool, device=device)
    pair_BOO[:, 0, 1] &= ~meets_B
    pair_BOO[:, 1, 0] &= ~meets_B
    room_BT = room_BTOO.masked_fill(~pair_BOO[:, None], SIZE).amin(dim=(-1, -2))

    score_BT = (room_BT - GAP).clamp(max=0.0) + outside_BT
    score_BT += _clearness(center_BTO2[:, :, 1] - center_BTO2[:, :, 0], torch.where(meets_B, ANY, relation_B))
    score_BT += _clearness(center_BTO2[:, :, 2] - center_BTO2[:, :, 0], third_B)
    best_B = score_BT.argmax(dim=1)
    center_BO2 = center_BTO2[torch.arange(batch, device=device), best_B]
    return center_BO2[..., 0], center_BO2[..., 1], radius_BO


def _radii(count_B: Tensor, relation_B: Tensor, forms_BO: Tensor, uniform_BO: Tensor) -> Tensor:
    device = count_B.device
    bounds_BO2 = torch.tensor([RADIUS[n] for n in range(1, MAX_OBJECTS + 1)], device=device)[count_B - 1]
    bounds_BO2 = bounds_BO2[:, None].expand(-1, MAX_OBJECTS, -1)
    for form, bounds in FORM_RADIUS.items():
        bounds_BO2 = torch.where((forms_BO == form)[..., None], torch.tensor(bounds, device=device), bounds_BO2)
    inside_B = relation_B == INSIDE
    held = torch.tensor([HOLDS, (HELD * HOLDS[0], HELD * HOLDS[0])], device=device)
    bounds_BO2 = torch.cat([torch.where(inside_B[:, None, None], held, bounds_BO2[:, :2]), bounds_BO2[:, 2:]], 1)
    return bounds_BO2[..., 0] + (bounds_BO2[..., 1] - bounds_BO2[..., 0]) * uniform_BO


def _meeting_offset(relation_B: Tensor, radius_BO: Tensor, uniform_2BT: Tensor) -> Tensor:
    """From object 0 to object 1 where they meet, [B, T, 2] in pixels; 0 for other relations."""
    turn_BT, reach_BT = uniform_2BT
    distance_BT = torch.zeros_like(turn_BT)
    for relation, (low, high) in MEETING.items():
        distance_BT = torch.where((relation_B == relation)[:, None], low + (high - low) * reach_BT, distance_BT)
    angle_BT = 2 * torch.pi * turn_BT
    # What touches does so from the side, for from above and below there are words of their own.
    sides_BT = torch.where(turn_BT < 0.5, 0.0, torch.pi) + 2 * SPREAD * (2 * (2 * turn_BT).frac() - 1)
    angle_BT = torch.where((relation_B == TOUCHING)[:, None], sides_BT, angle_BT)
    lean_BT = SPREAD * (2 * turn_BT - 1)
    angle_BT = torch.where((relation_B == STANDING)[:, None], UP + lean_BT, angle_BT)
    angle_BT = torch.where((relation_B == HANGING)[:, None], DOWN + lean_BT, angle_BT)
    pixels_BT = distance_BT * radius_BO[:, :2].mean(1, keepdim=True)
    return torch.stack([pixels_BT * angle_BT.cos(), pixels_BT * angle_BT.sin()], dim=-1)


def _clearness(offset_BT2: Tensor, relation_B: Tensor) -> Tensor:
    """0 where a relation holds clearly, by how many pixels it fails (negative) elsewhere, [B, T].

    It holds where the offset lies along one axis, at most 40 % off it sideways.
    """
    dx_BT, dy_BT = offset_BT2.unbind(-1)
    along = torch.stack([-dx_BT, dx_BT, -dy_BT, dy_BT, dx_BT.abs()])
    across = torch.stack([dy_BT, dy_BT, dx_BT, dx_BT, dy_BT]).abs()
    chosen = relation_B.clamp(0, NEXT_TO)[None, :, None].expand(1, -1, TRIES)
    clear_BT = (across - 0.4 * along).gather(0, chosen)[0]
    return torch.where(relation_B[:, None] == ANY, 0.0, (-clear_BT).clamp(max=0.0))


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return _norm(u, v) - 0.97


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.82


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(v - 0.8, (u.abs() * 1.8 - (v + 1) * 0.95) / 2.035)


def _star(u: Tensor, v: Tensor) -> Tensor:
    # Five-fold folding brings every point of the star next to the edge from its tip (1, 0) to the inner corner.
    rho, fifth = _norm(u, v), 2 * torch.pi / 5
    angle = torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2
    inner_x, inner_y = 0.44 * 0.80902, 0.44 * 0.58779
    normal = (inner_y**2 + (1 - inner_x) ** 2) ** 0.5
    return ((rho * angle.cos() - 1) * inner_y + rho * angle.abs().sin() * (1 - inner_x)) / normal


def _heart(u: Tensor, v: Tensor) -> Tensor:
    lobes = _norm(u.abs() - 0.4, v + 0.32) - 0.566
    return torch.minimum(lobes, (u.abs() + (v - 0.08).abs() - 0.8) * 0.7071)


def _cross(u: Tensor, v: Tensor) -> Tensor:
    au, av = u.abs(), v.abs()
    return torch.minimum(torch.maximum(au - 0.98, av - 0.34), torch.maximum(au - 0.34, av - 0.98))


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (_norm(u, v) - 0.76).abs() - 0.22


def _moon(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_norm(u, v) - 0.98, 0.82 - _norm(u - 0.52, v))


def _norm(u: Tensor, v: Tensor) -> Tensor:
    return (u.square() + v.square()).sqrt()


# Signed distance of each of `SHAPES` at (u, v), the shape filling about [-1, 1] squared, v pointing down.
SHAPE_DISTANCES = (_circle, _square, _triangle, _star, _heart, _cross, _ring, _moon)


def coverage(scenes: Scenes) -> Tensor:
    """Antialiased coverage of each object, float32 [B, O, H, W] in [0, 1]; an empty slot covers nothing."""
    u, v, half_BO11 = _own_coordinates(scenes)
    covered = torch.zeros_like(u)
    for shape, distance in enumerate(SHAPE_DISTANCES):
        # Each shape only where it is: the objects are many, and all eight at every pixel would take eight times longer.
        slots = (scenes.shapes_BO == shape).nonzero(as_tuple=True)
        covered[slots] = (0.5 - distance(u[slots], v[slots]) * half_BO11[slots]).clamp(0, 1)
    return covered


def _own_coordinates(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Where each pixel lies in each object's own frame, u and v [B, O, H, W]; and pixels per unit of the smaller."""
    grid = torch.arange(SIZE, device=scenes.x_BO.device) + 0.5
    half_BO2 = scenes.radius_BO[..., None] * torch.tensor(STRETCH, device=grid.device)[scenes.forms_BO]
    u = (grid[None, None, None, :] - scenes.x_BO[..., None, None]) / half_BO2[..., :1, None]
    v = (grid[None, None, :, None] - scenes.y_BO[..., None, None]) / half_BO2[..., 1:, None]
    u, v = torch.broadcast_tensors(u, v)
    return u, v, half_BO2.amin(-1)[..., None, None]


def _second_tone(scenes: Scenes) -> Tensor:
    """The share of a texture's second tone at each pixel of each object, [B, O, H, W]; softened at its edges."""
    grid = torch.arange(SIZE, device=scenes.x_BO.device) + 0.5
    tone = torch.zeros(*scenes.x_BO.shape, SIZE, SIZE, device=grid.device)
    for texture, wave in TEXTURE_WAVES.items():
        slots = (scenes.textures_BO == texture).nonzero(as_tuple=True)
        # In pixels of the picture, not of the stretched object: a stripe is as wide on a tall star as on a wide one.
        scale = torch.pi * TEXTURE_CELLS / scenes.radius_BO[slots][:, None, None]
        x = (grid[None, None, :] - scenes.x_BO[slots][:, None, None]) * scale
        y = (grid[None, :, None] - scenes.y_BO[slots][:, None, None]) * scale
        tone[slots] = (0.5 + 3 * wave(x, y)).clamp(0, 1).expand(-1, SIZE, SIZE)
    return tone


TEXTURE_WAVES = {
    TEXTURES.index("striped"): lambda x, y: y.sin(),
    TEXTURES.index("dotted"): lambda x, y: 2 * (x.cos() * y.cos() - 0.45),
    TEXTURES.index("checkered"): lambda x, y: 2 * x.sin() * y.sin(),
}


def render(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images, float32 [B, 3, H, W] in [0, 1], and masks of what is seen of each object, bool [B, O, H, W]."""
    device = scenes.x_BO.device
    coverage_BOHW = coverage(scenes)
    palette = torch.tensor(list(PALETTE.values()), device=device)
    batch = scenes.x_BO.shape[0]
    jitter = 0.05 * (torch.rand(batch, MAX_OBJECTS, 3, device=device, generator=generator) - 0.5)
    rgb_BO3 = (palette[scenes.colors_BO] + jitter).clamp(0, 1)
    second_BO3 = torch.lerp(rgb_BO3, torch.ones_like(rgb_BO3), SHADE)
    light = 0.82 + 0.08 * torch.rand(batch, 1, device=device, generator=generator)
    tint = 0.04 * (torch.rand(batch, 3, device=device, generator=generator) - 0.5)
    image = (light + tint)[:, :, None, None].expand(-1, -1, SIZE, SIZE)
    tone_BOHW = _second_tone(scenes)
    for slot in range(MAX_OBJECTS):
        alpha, tone = coverage_BOHW[:, slot, None], tone_BOHW[:, slot, None]
        color = torch.lerp(rgb_BO3[:, slot, :, None, None], second_BO3[:, slot, :, None, None], tone)
        image = image * (1 - alpha) + color * alpha
    masks_BOHW = coverage_BOHW > 0.5
    behind_BOHW = masks_BOHW.flip(1).cumsum(1).flip(1) > 1
    return image, masks_BOHW & ~behind_BOHW


def depth_map(scenes: Scenes, masks_BOHW: Tensor) -> Tensor:
    """How near each pixel is, float32 [B, H, W]: shapes lie on paper, at 0, and one that lies on another is at 1.

    So the mean in an object's box tells what lies on top whatever part of its box a shape fills.
    """
    return (masks_BOHW[:, 1] & scenes.covers_B[:, None, None]).float()
