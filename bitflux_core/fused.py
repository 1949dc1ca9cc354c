"""A ternary FLUX whose blocks run as few kernels as possible; its weights are those of the transformer it came from.

What is fused: all modulation layers of a step in one launch, the layers that share an input in one product, LayerNorm
with modulation (and quantization), GELU with quantization and with the single block's concatenation, RMSNorm of
queries and keys with the rotary embedding, gate and residual in the epilogue of the products.

A low-rank correction is two more products of plain matrices, which enter the ternary product as part of the residual
that its epilogue adds.

Legend: B images, T text tokens, S image tokens, D width, M tokens of all images, K input features, N output features,
R rank of a correction.
"""

import copy
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, Self

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from bitflux_core.diffusers_plugin import activations_of, equip
from bitflux_core.graphs import Graphs
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from kernels import ops
from kernels.attention import attention
from kernels.reference import Quantized, dequantized

Rotary = tuple[Tensor, Tensor]
FLOAT16_MAX = 65504.0


class Correction(NamedTuple):
    """The low-rank corrections of layers that read the same input: `down` stacked by rows, and every layer's `up`."""

    down_RK: Tensor
    ups: list[Tensor]

    @classmethod
    def stacked(cls, layers: list[TernaryLinear]) -> Self | None:
        """None for layers without corrections. ValueError where only some of them have one, or the ranks differ."""
        ranks = {None if layer.down is None else len(layer.down) for layer in layers}
        if len(ranks) > 1:
            raise ValueError("layers that share an input must all have corrections of one rank, or none")
        ups = [layer.up for layer in layers if layer.up is not None]
        return cls(_stack(layers, "down"), ups) if ups else None

    def beside(self, x_MK: Tensor, gate_BN: Tensor | None, residual_MN: Tensor | None) -> Tensor:
        """residual + gate x correction [M, N]."""
        parts = F.linear(x_MK, self.down_RK).chunk(len(self.ups), dim=1)
        outputs = [F.linear(part_MR, up_NR) for part_MR, up_NR in zip(parts, self.ups, strict=True)]
        y_MN = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if gate_BN is not None:
            y_MN = (y_MN.unflatten(0, (len(gate_BN), -1)) * gate_BN[:, None]).flatten(0, 1)
        return y_MN if residual_MN is None else residual_MN + y_MN


class Weight(NamedTuple):
    """The layers that read the same input, stacked by rows: packed [N, J], scale [N], bias [N], and corrections."""

    packed_NJ: Tensor
    scale_N: Tensor
    bias_N: Tensor | None
    in_features: int
    correction: Correction | None

    @classmethod
    def stacked(cls, layers: list[TernaryLinear]) -> Self:
        """Stacks `layers`, whose own tensors become views of the stack: no second copy stays.

        ValueError where only some of them have a bias, or their biases differ in dtype.
        """
        if len({layer.bias if layer.bias is None else layer.bias.dtype for layer in layers}) > 1:
            raise ValueError("layers that share an input must all have a bias of one dtype, or none")
        bias_N = None if layers[0].bias is None else _stack(layers, "bias")
        correction = Correction.stacked(layers)
        return cls(_stack(layers, "packed"), _stack(layers, "scale"), bias_N, layers[0].in_features, correction)


def _stack(layers: list[TernaryLinear], name: str) -> Tensor:
    """One tensor of all the layers' tensors of this name, which become views of it; that of a single layer as it is."""
    parts = [getattr(layer, name) for layer in layers]
    if len(parts) == 1:
        return parts[0]
    stack = torch.cat(parts)
    for layer, view in zip(layers, stack.split([len(part) for part in parts]), strict=True):
        setattr(layer, name, view)
    return stack


class Arithmetic(Protocol):
    """How activations go from one ternary product to the next; `Activation` is a Tensor or Quantized, [M, K]."""

    def enter(self, x_MK: Tensor): ...

    def norm(self, x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float): ...

    def gelu(self, x_MK: Tensor, head_MA: Tensor | None): ...

    def product(self, x, weight: Weight, dtype: torch.dtype, gate_BN=None, residual_MN=None) -> Tensor: ...


class Native:
    """Activations keep their floating dtype."""

    def enter(self, x_MK: Tensor) -> Tensor:
        return x_MK

    def norm(self, x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Tensor:
        return ops.norm_modulate(x_MK, shift_BK, scale_BK, eps)

    def gelu(self, x_MK: Tensor, head_MA: Tensor | None = None) -> Tensor:
        return ops.gelu(x_MK, head_MA)

    def product(self, x: Tensor, weight: Weight, dtype: torch.dtype, gate_BN=None, residual_MN=None) -> Tensor:
        if weight.correction:
            residual_MN = weight.correction.beside(x, gate_BN, residual_MN)
        return ops.matmul(x, *weight[:3], gate_BN=gate_BN, residual_MN=residual_MN)


class Int8:
    """Activations are quantized to int8 by token, in the kernel that makes them."""

    def enter(self, x_MK: Tensor) -> Quantized:
        return ops.quantize(x_MK)

    def norm(self, x_MK: Tensor, shift_BK: Tensor, scale_BK: Tensor, eps: float) -> Quantized:
        return ops.norm_modulate_quantize(x_MK, shift_BK, scale_BK, eps)

    def gelu(self, x_MK: Tensor, head_MA: Tensor | None = None) -> Quantized:
        return ops.gelu_quantize(x_MK, head_MA)

    def product(self, x: Quantized, weight: Weight, dtype: torch.dtype, gate_BN=None, residual_MN=None) -> Tensor:
        if weight.correction:
            # The kernels that made x left nothing but its rounded values: those are what corrections read everywhere.
            floats_MK = dequantized(x, weight.in_features, dtype)
            residual_MN = weight.correction.beside(floats_MK, gate_BN, residual_MN)
        return ops.matmul_int8(
            x, *weight[:3], gate_BN=gate_BN, residual_MN=residual_MN, in_features=weight.in_features, dtype=dtype
        )


ARITHMETIC: dict[str, Arithmetic] = {"native": Native(), "int8": Int8()}


def fuse(transformer: FluxTransformer2DModel, graphs: bool = False) -> "FusedFluxTransformer2DModel":
    """The fused form of a transformer whose block linears are all ternary, for inference; it takes over the modules.

    With `graphs` it runs as CUDA graphs on a GPU. Call it when the model is on its device. ValueError if a block linear
    is not ternary, or if the layers differ in their activations.
    """
    if not all(isinstance(layer, TernaryLinear) for layer in block_linears(transformer).values()):
        raise ValueError("only a transformer whose block linears are all ternary can be fused")
    arithmetic = ARITHMETIC[activations_of(transformer)]
    fused = _as(FusedFluxTransformer2DModel, transformer)
    if getattr(transformer, "hf_quantizer", None) is not None:
        equip(fused)  # what it took over are methods of `transformer`
    fused.arithmetic = arithmetic
    fused.runs_graphs = graphs
    for blocks, kind in (
        (fused.transformer_blocks, FusedFluxTransformerBlock),
        (fused.single_transformer_blocks, FusedFluxSingleTransformerBlock),
    ):
        for index, block in enumerate(blocks):
            blocks[index] = _as(kind, block)
            blocks[index].arithmetic = arithmetic
    fused.stack_weights()
    return fused


def _as(kind: type[nn.Module], module: nn.Module):
    """`module`'s submodules, parameters and settings under another class."""
    made = kind.__new__(kind)
    made.__dict__.update(module.__dict__)
    return made


class FusedFluxTransformerBlock(FluxTransformerBlock):
    """A double block: text and image tokens with weights of their own, joined in attention."""

    arithmetic: Arithmetic

    def stack_weights(self) -> None:
        attn = self.attn
        self.image = _Stream(
            Weight.stacked([attn.to_q, attn.to_k, attn.to_v]),
            Weight.stacked([attn.to_out[0]]),
            Weight.stacked([self.ff.net[0].proj]),
            Weight.stacked([self.ff.net[2]]),
        )
        self.text = _Stream(
            Weight.stacked([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]),
            Weight.stacked([attn.to_add_out]),
            Weight.stacked([self.ff_context.net[0].proj]),
            Weight.stacked([self.ff_context.net[2]]),
        )

    def forward(
        self, hidden_BSD: Tensor, text_BTD: Tensor, modulation_BN: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor]:
        """(image [B, S, D], text [B, T, D]) after the block; the modulation's 12 D columns: 6 D image, 6 D text."""
        eps = self.norm2.eps
        image_modulation, text_modulation = (part.chunk(6, dim=1) for part in modulation_BN.chunk(2, dim=1))
        mixed_BSD = self._attend(
            self._qkv(hidden_BSD, image_modulation, self.image, eps),
            self._qkv(text_BTD, text_modulation, self.text, eps),
            rotary,
        )
        text_mixed, image_mixed = mixed_BSD.split([text_BTD.shape[1], hidden_BSD.shape[1]], dim=1)
        hidden_BSD = self._finish(hidden_BSD, image_mixed, image_modulation, self.image, eps)
        text_BTD = self._finish(text_BTD, text_mixed, text_modulation, self.text, eps)
        return hidden_BSD, _within_float16(text_BTD)

    def _attend(self, qkv_BSN: Tensor, text_qkv_BTN: Tensor, rotary: Rotary) -> Tensor:
        attn = self.attn
        query, key = ops.qk_norm_rope(
            qkv_BSN,
            text_qkv_BTN,
            attn.heads,
            (attn.norm_q.weight, attn.norm_k.weight),
            (attn.norm_added_q.weight, attn.norm_added_k.weight),
            rotary,
            attn.norm_q.eps,
        )
        value_BSD = torch.cat([part[..., -attn.inner_dim :] for part in (text_qkv_BTN, qkv_BSN)], dim=1)
        return attention(query, key, value_BSD.unflatten(-1, (attn.heads, -1)))

    def _qkv(self, x_BSD: Tensor, modulation: tuple[Tensor, ...], weights: "_Stream", eps: float) -> Tensor:
        shift_BD, scale_BD, *_ = modulation
        x_MD = x_BSD.flatten(0, 1)
        normed = self.arithmetic.norm(x_MD, shift_BD, scale_BD, eps)
        return self.arithmetic.product(normed, weights.qkv, x_MD.dtype).unflatten(0, x_BSD.shape[:2])

    def _finish(
        self, x_BSD: Tensor, mixed_BSD: Tensor, modulation: tuple[Tensor, ...], weights: "_Stream", eps: float
    ) -> Tensor:
        """Attention's output layer and the MLP, each gated and added to the tokens."""
        _, _, gate_BD, shift_BD, scale_BD, mlp_gate_BD = modulation
        run, x_MD = self.arithmetic, x_BSD.flatten(0, 1)
        dtype = x_MD.dtype
        mixed = run.enter(mixed_BSD.flatten(0, 1))
        x_MD = run.product(mixed, weights.out, dtype, gate_BD, x_MD)
        hidden_MN = run.product(run.norm(x_MD, shift_BD, scale_BD, eps), weights.mlp_in, dtype)
        x_MD = run.product(run.gelu(hidden_MN, None), weights.mlp_out, dtype, mlp_gate_BD, x_MD)
        return x_MD.unflatten(0, x_BSD.shape[:2])


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """A single block: attention and MLP side by side over text and image tokens together."""

    arithmetic: Arithmetic

    def stack_weights(self) -> None:
        self.qkv = Weight.stacked([self.attn.to_q, self.attn.to_k, self.attn.to_v])
        self.mlp_in = Weight.stacked([self.proj_mlp])
        self.exit = Weight.stacked([self.proj_out])

    def forward(self, x_BSD: Tensor, modulation_BN: Tensor, rotary: Rotary) -> Tensor:
        """Tokens [B, S, D] after the block, text and image joined; the modulation has 3 D columns."""
        run, x_MD = self.arithmetic, x_BSD.flatten(0, 1)
        shift_BD, scale_BD, gate_BD = modulation_BN.chunk(3, dim=1)
        normed = run.norm(x_MD, shift_BD, scale_BD, self.norm.norm.eps)
        # Two products of one input: the MLP's activations, the largest there are, need no memory during attention.
        qkv_MN = run.product(normed, self.qkv, x_MD.dtype)
        mixed_MD = self._attend(qkv_MN.unflatten(0, x_BSD.shape[:2]), rotary).flatten(0, 1)
        del qkv_MN
        hidden_MN = run.product(normed, self.mlp_in, x_MD.dtype)
        del normed
        entered = run.gelu(hidden_MN, mixed_MD)
        del hidden_MN, mixed_MD
        x_MD = run.product(entered, self.exit, x_MD.dtype, gate_BD, x_MD)
        return _within_float16(x_MD.unflatten(0, x_BSD.shape[:2]))

    def _attend(self, qkv_BSN: Tensor, rotary: Rotary) -> Tensor:
        attn = self.attn
        weights = (attn.norm_q.weight, attn.norm_k.weight)
        query, key = ops.qk_norm_rope(qkv_BSN, None, attn.heads, weights, None, rotary, attn.norm_q.eps)
        value = qkv_BSN[..., 2 * attn.inner_dim :].unflatten(-1, (attn.heads, -1))
        return attention(query, key, value)


class _Stream(NamedTuple):
    """Weights of one of a double block's two streams."""

    qkv: Weight
    out: Weight
    mlp_in: Weight
    mlp_out: Weight


class FusedFluxTransformer2DModel(FluxTransformer2DModel):
    """FluxTransformer2DModel's forward for plain text-to-image: no ControlNet, IP-Adapter or LoRA scale.

    `runs_graphs` says whether it runs as CUDA graphs, which neither torch.compile nor an outer graph can take in.
    """

    _repeated_blocks: ClassVar = ["FusedFluxTransformerBlock", "FusedFluxSingleTransformerBlock"]
    arithmetic: Arithmetic
    runs_graphs: bool

    def stack_weights(self) -> None:
        self._graphs = Graphs(self._predict)  # earlier ones read the weights where they were
        modulation = []
        for block in self.transformer_blocks:
            block.stack_weights()
            modulation += [block.norm1.linear, block.norm1_context.linear]
        for block in self.single_transformer_blocks:
            block.stack_weights()
            modulation.append(block.norm.linear)
        self.modulation = Weight.stacked(modulation)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """As FluxTransformer2DModel.forward. ValueError for `joint_attention_kwargs`, which change its layers."""
        if joint_attention_kwargs:
            raise ValueError(f"the fused FLUX takes no joint_attention_kwargs, got {', '.join(joint_attention_kwargs)}")
        graphs = self.runs_graphs and hidden_states.is_cuda and not torch.is_grad_enabled()
        predict = self._graphs if graphs else self._predict
        output = predict(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _predict(
        self,
        latents_BSC: Tensor,
        embedding_BTC: Tensor,
        pooled_BC: Tensor,
        timestep_B: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance_B: Tensor | None,
    ) -> Tensor:
        hidden_BSD = self.x_embedder(latents_BSC)
        text_BTD = self.context_embedder(embedding_BTC)
        times = [timestep_B] if guidance_B is None else [timestep_B, guidance_B]
        times = [1000 * time.to(hidden_BSD.dtype) for time in times]
        condition_BD = self.time_text_embed(*times, pooled_BC)
        rotary = self.pos_embed(torch.cat([txt_ids, img_ids]))
        double, single = self._modulations(condition_BD)

        for block, modulation_BN in zip(self.transformer_blocks, double, strict=True):
            hidden_BSD, text_BTD = block(hidden_BSD, text_BTD, modulation_BN, rotary)
        tokens = text_BTD.shape[1]
        joint_BSD = torch.cat([text_BTD, hidden_BSD], dim=1)
        del text_BTD, hidden_BSD
        for block, modulation_BN in zip(self.single_transformer_blocks, single, strict=True):
            joint_BSD = block(joint_BSD, modulation_BN, rotary)
        return self.proj_out(self.norm_out(joint_BSD[:, tokens:], condition_BD))

    def _modulations(self, condition_BD: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Shifts, scales and gates of all blocks: [B, 12 D] a double block, [B, 3 D] a single one."""
        entered = self.arithmetic.enter(F.silu(condition_BD))
        all_BN = self.arithmetic.product(entered, self.modulation, condition_BD.dtype)
        width = condition_BD.shape[1]
        parts = all_BN.split(
            [12 * width] * len(self.transformer_blocks) + [3 * width] * len(self.single_transformer_blocks), dim=1
        )
        return list(parts[: len(self.transformer_blocks)]), list(parts[len(self.transformer_blocks) :])

    def _apply(self, fn, recurse: bool = True) -> Self:
        """Moving and casting give every layer tensors of its own again: they are stacked anew."""
        super()._apply(fn, recurse)
        self.stack_weights()
        return self

    def dequantize(self) -> NoReturn:
        """ValueError: its blocks would go on reading the stacks."""
        raise ValueError("a fused transformer cannot be dequantized: load it again and call dequantize() before fuse()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """TypeError: every layer would be written with the whole stack that it is a view of."""
        raise TypeError(
            "a fused transformer cannot be pickled: pickle the one that fuse() takes, or call save_pretrained(), and "
            "fuse what is loaded"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Its own stacks, and no CUDA graphs yet."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        state = {name: value for name, value in vars(self).items() if name != "_graphs"}
        made.__dict__.update(copy.deepcopy(state, memo))
        made._graphs = Graphs(made._predict)
        return made


# By these diffusers writes into config.json and model_index.json what to load again: that is the plain model.
FusedFluxTransformer2DModel.__name__ = FluxTransformer2DModel.__name__
FusedFluxTransformer2DModel.__module__ = FluxTransformer2DModel.__module__


def _within_float16(x: Tensor) -> Tensor:
    return x.clip(-FLOAT16_MAX, FLOAT16_MAX) if x.dtype == torch.float16 else x
