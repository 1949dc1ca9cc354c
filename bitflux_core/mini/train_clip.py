"""Trains the mini CLIP: objects alone on grey with GenEval's colour captions, and whole scenes with their prompts.

Half of the whole scenes show the same shapes as the other half but not the same prompt, so that a batch holds what is
nearly right: another relation, contact, attribute or number. Without them shapes and colours are all that is learnt.
Where a contact is told, which only CLIP judges, the other half differs in nothing but that, or in whose attribute is
whose: two complex prompts drawn at random differ in their attributes too, and are told apart by those.
"""

import itertools
from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor
from torch.nn import functional as F

from bitflux_core.mini.clip import IMAGE_SIZE, MEAN, STD
from bitflux_core.mini.compositions import near_misses, training_prompts
from bitflux_core.mini.render import PromptTable, Scenes, render, sample_scenes
from bitflux_core.mini.train_detector import wear
from bitflux_core.mini.world import HANGING, INSIDE, PALETTE, SHAPES, STANDING, TOUCHING, PromptSpec
from bitflux_core.training import Progress, RunningMean, warmup_then_cosine

LEARNING_RATE = 1e-3
CONTACTS = (TOUCHING, INSIDE, STANDING, HANGING)
CONTACT = 6.0  # times as often as the training mix: whole scenes with a contact, which no other model judges
GREY = 0.6  # GenEval's #999 outside the mask
# GenEval's own wordings: the article is "a" before every color, "orange" included.
CAPTIONS = ("a photo of a {color} {shape}", "a photo of a {color}-colored {shape}", "a photo of a {color} object")


def color_captions() -> list[str]:
    """Captions [color * 24 + shape * 3 + template] of every palette colour and shape, in GenEval's three wordings."""
    return [caption.format(color=color, shape=shape) for color in PALETTE for shape in SHAPES for caption in CAPTIONS]


def train_clip(
    model: open_clip.CLIP,
    tokenizer: open_clip.tokenizer.HFTokenizer,
    *,
    steps: int,
    batch: int,
    device: torch.device,
    seed: int,
) -> None:
    """Trains `model` in place; half of a batch are masked object crops, half are whole scenes, in pairs."""
    specs, weights = training_prompts(every_pair=True)
    near = [one for spec in specs if spec.tag == "complex" and spec.relation in CONTACTS for one in near_misses(spec)]
    specs = [*specs, *near]
    probability = torch.tensor([*weights, *(0.0 for _ in near)], device=device)
    contact = torch.tensor([CONTACT if spec.relation in CONTACTS else 1.0 for spec in specs], device=device)
    table = PromptTable.build(specs, device)
    captions = color_captions()
    tokens = tokenizer(captions + [spec.text for spec in specs]).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    progress, loss_mean = Progress("clip", steps), RunningMean(device)
    half = batch // 2
    siblings = Siblings(specs, device)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup_then_cosine(step, steps)
        cropped_from = torch.multinomial(probability, half, replacement=True, generator=generator)
        paired = torch.multinomial(
            probability * contact, (batch - half + 1) // 2, replacement=True, generator=generator
        )
        index = torch.cat([cropped_from, paired, siblings.of(paired, generator)])
        scenes = sample_scenes(table, index, generator)
        crops = Scenes(*(part[:half] for part in vars(scenes).values()))
        crops.colors_BO = torch.randint(len(PALETTE), crops.colors_BO.shape, device=device, generator=generator)
        image, masks = render(crops, generator)
        cropped = crop_first_object(wear(image, generator), masks[:, 0])
        whole, _ = render(Scenes(*(part[half:] for part in vars(scenes).values())), generator)
        whole = F.interpolate(wear(whole, generator), size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        wording = torch.randint(len(CAPTIONS), (half,), device=device, generator=generator)
        caption = (crops.colors_BO[:, 0] * len(SHAPES) + crops.shapes_BO[:, 0]) * len(CAPTIONS) + wording
        caption = torch.cat([caption, index[half:] + len(captions)])
        loss = contrastive_loss(model, torch.cat([cropped, whole]), tokens[caption])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_mean.add(loss)
        progress.report(step, loss_mean.mean)
    model.eval()


def common(spec: PromptSpec) -> tuple:
    """What siblings share: the tag and the shapes; where they touch also which is which (without it "a star is standing
    on a ring" would be told from "a ring is hanging below a star", which is the same), and the attributes, unassigned.
    """
    if spec.relation not in CONTACTS:
        return spec.tag, tuple(sorted(set(spec.shapes)))
    attributes = tuple(sorted(spec.colors)), tuple(sorted(spec.textures))
    return spec.tag, spec.shapes, attributes, spec.third


class Siblings:
    """Prompts with as much in common as `common` says."""

    def __init__(self, specs: Sequence[PromptSpec], device: torch.device):
        keys = [common(spec) for spec in specs]
        order = sorted(range(len(specs)), key=keys.__getitem__)
        self.order = torch.tensor(order, device=device)
        self.first, self.count, self.place = (torch.zeros_like(self.order) for _ in range(3))
        start = 0
        for _, same in itertools.groupby(order, key=keys.__getitem__):
            members = torch.tensor(list(same), device=device)
            self.first[members], self.count[members] = start, len(members)
            self.place[members] = torch.arange(len(members), device=device)
            start += len(members)

    def of(self, index_B: Tensor, generator: torch.Generator) -> Tensor:
        """A random other one of each; itself where it has none."""
        count_B = self.count[index_B]
        away_B = (torch.rand(len(index_B), device=index_B.device, generator=generator) * (count_B - 1)).long() + 1
        return self.order[self.first[index_B] + (self.place[index_B] + away_B) % count_B]


def contrastive_loss(model: open_clip.CLIP, image_BCHW: Tensor, tokens_BT: Tensor) -> Tensor:
    """CLIP's symmetric loss; images with the very same caption share the target instead of repelling each other."""
    mean, std = image_BCHW.new_tensor(MEAN).view(3, 1, 1), image_BCHW.new_tensor(STD).view(3, 1, 1)
    with torch.autocast(image_BCHW.device.type, torch.bfloat16, enabled=image_BCHW.is_cuda):
        image_features = model.encode_image((image_BCHW - mean) / std, normalize=True).float()
        text_features = model.encode_text(tokens_BT, normalize=True).float()
    logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
    same = (tokens_BT[:, None] == tokens_BT[None]).all(-1).float()
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def crop_first_object(image_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """Grey outside the mask, then the mask's bounding box resized to CLIP's input, as GenEval's classifier sees it."""
    image = torch.where(mask_BHW[:, None], image_BCHW, GREY)
    _, _, height, width = image.shape
    boxes = []
    for extent, axis in ((width, 1), (height, 2)):
        line = mask_BHW.any(dim=axis)
        low = line.int().argmax(dim=1)
        high = extent - line.flip(1).int().argmax(dim=1)
        boxes.append((low / extent * 2 - 1, high / extent * 2 - 1))
    (x0, x1), (y0, y1) = boxes
    # The shorter side fills the input and the longer is cut at the centre, as CLIP's resize and crop do.
    side = torch.minimum(x1 - x0, y1 - y0) / 2
    theta = torch.zeros(len(image), 2, 3, device=image.device)
    theta[:, 0, 0], theta[:, 1, 1] = side, side
    theta[:, 0, 2], theta[:, 1, 2] = (x0 + x1) / 2, (y0 + y1) / 2
    grid = F.affine_grid(theta, [len(image), 3, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
