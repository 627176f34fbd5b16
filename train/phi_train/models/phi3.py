"""The Phi-3 decoder for training; parameter names are Hugging Face's, so weights load both ways.

Architecture: arXiv:2404.14219 and the published `Phi3Config`. Shapes: B batch, T tokens, E
hidden_size, H heads, G key-value heads, D head_dim, V vocab_size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from phi_runtime.config import Phi3Config

_INIT_STD = 0.02


class Phi3RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Normalise the last axis."""
        return functional.rms_norm(x_BTE.float(), self.weight.shape, self.weight, self.eps)


class Phi3Attention(nn.Module):
    """Causal attention with fused q, k, v and a sliding window."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.c = c
        self.qkv_proj = nn.Linear(c.hidden_size, c.qkv_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_TT: Tensor | None) -> Tensor:
        """Attend; `mask_TT` is None where plain causality says it all."""
        c = self.c
        B, T, _ = x_BTE.shape
        heads = self.qkv_proj(x_BTE).view(B, T, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1)
        q, k = rotate(q, cos_TD, sin_TD).to(v.dtype), rotate(k, cos_TD, sin_TD).to(v.dtype)
        out_BHTD = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask_TT,
            is_causal=mask_TT is None,
            enable_gqa=c.num_key_value_heads < c.num_attention_heads,
        )
        out: Tensor = self.o_proj(out_BHTD.transpose(1, 2).reshape(B, T, c.hidden_size))
        return out


class Phi3MLP(nn.Module):
    """SwiGLU with fused gate and up, gate first."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """down(silu(gate) * up)."""
        gate, up = self.gate_up_proj(x_BTE).chunk(2, dim=-1)
        out: Tensor = self.down_proj(functional.silu(gate) * up)
        return out


class Phi3DecoderLayer(nn.Module):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.input_layernorm = Phi3RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Phi3Attention(c)
        self.post_attention_layernorm = Phi3RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Phi3MLP(c)

    def forward(self, x_BTE: Tensor, cos_TD: Tensor, sin_TD: Tensor, mask_TT: Tensor | None) -> Tensor:
        """One layer."""
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), cos_TD, sin_TD, mask_TT)
        out: Tensor = x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        return out


class Phi3Model(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Phi3DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.norm = Phi3RMSNorm(c.hidden_size, c.rms_norm_eps)


class Phi3ForCausalLM(nn.Module):
    """The language model: token ids [B, T] to logits [B, T, V]."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.config = c
        self.model = Phi3Model(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        """Draw all matrices from N(0, 0.02), as published configs have it; norms are one."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=_INIT_STD, generator=generator)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of every position."""
        T = tokens_BT.shape[1]
        cos_TD, sin_TD = rope_tables(self.config, T, tokens_BT.device)
        mask_TT = window_mask(self.config, T, tokens_BT.device)
        x_BTE = self.model.embed_tokens(tokens_BT)
        for layer in self.model.layers:
            x_BTE = layer(x_BTE, cos_TD, sin_TD, mask_TT)
        logits: Tensor = self.lm_head(self.model.norm(x_BTE))
        return logits


def rope_tables(c: Phi3Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, D] in float32, both halves of D alike."""
    exponents = torch.arange(0, c.head_dim, 2, device=device, dtype=torch.float64) / c.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), c.rope_theta**-exponents)
    doubled = torch.cat([angles, angles], dim=-1)
    return doubled.cos().float(), doubled.sin().float()


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (d, d + D/2)."""
    low, high = x_BHTD.chunk(2, dim=-1)
    return x_BHTD * cos_TD + torch.cat([-high, low], dim=-1) * sin_TD


def window_mask(c: Phi3Config, length: int, device: torch.device) -> Tensor | None:
    """Which keys each query sees where the window cuts in: 0 <= i - j < window."""
    window = c.window()
    if window is None or length <= window:
        return None
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)
