"""`model_type: gpt_neo`: the TinyStories models (arXiv:2305.07759); parameter names are Hugging Face's.

Learnt positions, global and local attention by turns, scores without a scale, the head tied to the embedding.
Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

import torch
from torch import Tensor, nn

from phi_runtime.architecture.config import GptNeoConfig
from phi_runtime.architecture.decoder import Layer
from phi_train.models.attention import (
    AttentionContext,
    FakeQuant,
    attend,
    check_length,
    gelu_new,
    no_fake_quant,
    split_heads,
)
from phi_train.models.head import read_head
from phi_train.models.recompute import DecoderLayer


class GPTNeoSelfAttention(nn.Module):
    """Causal attention, its inputs without biases."""

    def __init__(self, c: GptNeoConfig) -> None:
        super().__init__()
        self._heads = c.num_heads
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.out_proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """Attend."""
        q, k, v = (split_heads(p(x_BTE), self._heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out: Tensor = self.out_proj(attend(q, k, v, layer, context))
        return out


class GPTNeoAttention(nn.Module):
    """The name that Hugging Face puts between."""

    def __init__(self, c: GptNeoConfig) -> None:
        super().__init__()
        self.attention = GPTNeoSelfAttention(c)


class GPTNeoMLP(nn.Module):
    """c_proj(gelu(c_fc(x)))."""

    def __init__(self, c: GptNeoConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(c.hidden_size, c.intermediate_size)
        self.c_proj = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """One MLP."""
        out: Tensor = self.c_proj(gelu_new(self.c_fc(x_BTE)))
        return out


class GPTNeoBlock(DecoderLayer):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, c: GptNeoConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)
        self.attn = GPTNeoAttention(c)
        self.ln_2 = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mlp = GPTNeoMLP(c)

    def inside(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """One layer."""
        x_BTE = x_BTE + context.drop(self.attn.attention(self.ln_1(x_BTE), layer, context))
        out: Tensor = x_BTE + context.drop(self.mlp(self.ln_2(x_BTE)))
        return out


class GPTNeoModel(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, c: GptNeoConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(c.vocab_size, c.hidden_size)
        self.wpe = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.h = nn.ModuleList(GPTNeoBlock(c) for _ in range(c.num_layers))
        self.ln_f = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)


class GPTNeoForCausalLM(nn.Module):
    """The language model: token ids [B, T] to logits [B, T, V]."""

    dropout = 0.0  # of attention's weights and of what is added to the residual stream, while training
    fake_quant: FakeQuant = staticmethod(no_fake_quant)  # of the head's weight

    def __init__(self, config: GptNeoConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = config.decoder()
        self.transformer = GPTNeoModel(config)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, E]."""
        length = check_length(tokens_BT, self.decoder.context)
        context = AttentionContext(
            self.decoder, length, tokens_BT.device, documents_BT, self.dropout if self.training else 0.0
        )
        positions = torch.arange(length, device=tokens_BT.device)
        x_BTE = self.transformer.wte(tokens_BT) + self.transformer.wpe(positions)
        for module, layer in zip(self.transformer.h, self.decoder.layers, strict=True):
            x_BTE = module(x_BTE, layer, context)
        out: Tensor = self.transformer.ln_f(x_BTE)
        return out

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, labels_BT: Tensor | None = None) -> Tensor:
        """Logits of every position, or the losses of labels."""
        weight = self.fake_quant(self.transformer.wte.weight)
        return read_head(weight, None, self.hidden(tokens_BT, documents_BT), labels_BT)
