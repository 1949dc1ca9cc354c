"""Attention in training: diffusers' own of FLUX, but with norm and rotary embedding by one kernel each way."""

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor

from kernels.training import norm_rope


class TrainedAttention:
    """An attention processor that does what diffusers' FluxAttnProcessor does.

    Legend: B images, T text tokens, S image tokens (in single blocks S counts text too), H heads, D head size.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: None,  # FLUX has none
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The image's part, and the text's where `encoder_hidden_states` come apart; `image_rotary_emb` is cos, sin."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        def turned(x: Tensor, norm: torch.nn.RMSNorm, tokens: slice) -> Tensor:
            cos_SD, sin_SD = (part[tokens] for part in image_rotary_emb)
            assert norm.eps is not None
            return norm_rope(heads(x), norm.weight, cos_SD, sin_SD, norm.eps)

        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        image_tokens, text_tokens = slice(text, None), slice(text)
        query = turned(attn.to_q(hidden_states), attn.norm_q, image_tokens)
        key = turned(attn.to_k(hidden_states), attn.norm_k, image_tokens)
        value = heads(attn.to_v(hidden_states))
        if encoder_hidden_states is not None:
            text_query = turned(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q, text_tokens)
            text_key = turned(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k, text_tokens)
            query, key = torch.cat([text_query, query], dim=1), torch.cat([text_key, key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        mixed = dispatch_attention_fn(query, key, value).flatten(2, 3)
        if encoder_hidden_states is None:
            return mixed
        text_mixed, image_mixed = mixed.split([text, mixed.shape[1] - text], dim=1)
        return attn.to_out[0](image_mixed.contiguous()), attn.to_add_out(text_mixed.contiguous())
