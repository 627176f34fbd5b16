"""`model_type: phi3`: phi-3-mini and -medium, phi-3.5-mini, phi-4-mini; parameter names are Hugging Face's.

Architecture: arXiv:2404.14219 and the published `Phi3Config`, LongRoPE, partial rotary and a tied head included.
Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

import torch
from torch import Tensor, nn

from phi_runtime.architecture.config import Phi3Config
from phi_runtime.architecture.decoder import Layer
from phi_train.models.attention import (
    AttentionContext,
    FakeQuant,
    attend,
    check_length,
    no_fake_quant,
    rotate,
    split_heads,
)
from phi_train.models.fused import rms_norm, swiglu
from phi_train.models.head import read_head
from phi_train.models.recompute import DecoderLayer


class Phi3RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTE: Tensor) -> Tensor:
        """Normalise the last axis."""
        return rms_norm(x_BTE, self.weight, self.eps)


class Phi3Attention(nn.Module):
    """Causal attention with fused q, k, v."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self._parts = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        self.qkv_proj = nn.Linear(c.hidden_size, c.qkv_size, bias=False)
        self.o_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """Attend."""
        q, k, v = torch.split(split_heads(self.qkv_proj(x_BTE), sum(self._parts)), self._parts, dim=1)
        out: Tensor = self.o_proj(attend(rotate(q, context), rotate(k, context), v, layer, context))
        return out


class Phi3MLP(nn.Module):
    """SwiGLU with fused gate and up, gate first."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """down(silu(gate) * up)."""
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(x_BTE)))
        return out


class Phi3DecoderLayer(DecoderLayer):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__()
        self.input_layernorm = Phi3RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Phi3Attention(c)
        self.post_attention_layernorm = Phi3RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Phi3MLP(c)

    def inside(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """One layer."""
        x_BTE = x_BTE + context.drop(self.self_attn(self.input_layernorm(x_BTE), layer, context))
        out: Tensor = x_BTE + context.drop(self.mlp(self.post_attention_layernorm(x_BTE)))
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

    dropout = 0.0  # of attention's weights and of what is added to the residual stream, while training
    fake_quant: FakeQuant = staticmethod(no_fake_quant)  # of the head's weight

    def __init__(self, config: Phi3Config) -> None:
        super().__init__()
        self.config = config
        self.decoder = config.decoder()
        self.model = Phi3Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, E]."""
        length = check_length(tokens_BT, self.decoder.context)
        context = AttentionContext(
            self.decoder, length, tokens_BT.device, documents_BT, self.dropout if self.training else 0.0
        )
        x_BTE = self.model.embed_tokens(tokens_BT)
        for module, layer in zip(self.model.layers, self.decoder.layers, strict=True):
            x_BTE = module(x_BTE, layer, context)
        out: Tensor = self.model.norm(x_BTE)
        return out

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, labels_BT: Tensor | None = None) -> Tensor:
        """Logits of every position, or the losses of labels."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return read_head(self.fake_quant(head.weight), None, self.hidden(tokens_BT, documents_BT), labels_BT)
