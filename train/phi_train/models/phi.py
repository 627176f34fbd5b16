"""`model_type: phi`: phi-1, phi-1.5 and phi-2 (arXiv:2306.11644, 2309.05463); parameter names are Hugging Face's.

Attention and MLP read one norm and are added at once; part of each head is rotated; every linear has a bias.
Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

from torch import Tensor, nn

from phi_runtime.architecture.config import PhiConfig
from phi_runtime.architecture.decoder import Layer
from phi_train.models.attention import (
    AttentionContext,
    FakeQuant,
    attend,
    check_length,
    gelu_new,
    no_fake_quant,
    rotate,
    split_heads,
)
from phi_train.models.head import read_head
from phi_train.models.recompute import DecoderLayer


class PhiAttention(nn.Module):
    """Causal attention with separate projections."""

    def __init__(self, c: PhiConfig) -> None:
        super().__init__()
        self._heads, self._kv_heads = c.num_attention_heads, c.num_key_value_heads
        kv_size = self._kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size)
        self.k_proj = nn.Linear(c.hidden_size, kv_size)
        self.v_proj = nn.Linear(c.hidden_size, kv_size)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """Attend."""
        q = split_heads(self.q_proj(x_BTE), self._heads)
        k, v = (split_heads(p(x_BTE), self._kv_heads) for p in (self.k_proj, self.v_proj))
        out: Tensor = self.dense(attend(rotate(q, context), rotate(k, context), v, layer, context))
        return out


class PhiMLP(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, c: PhiConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """One MLP."""
        out: Tensor = self.fc2(gelu_new(self.fc1(x_BTE)))
        return out


class PhiDecoderLayer(DecoderLayer):
    """Attention and MLP side by side."""

    def __init__(self, c: PhiConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.self_attn = PhiAttention(c)
        self.mlp = PhiMLP(c)

    def inside(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """One layer."""
        normed = self.input_layernorm(x_BTE)
        out: Tensor = x_BTE + context.drop(self.self_attn(normed, layer, context)) + context.drop(self.mlp(normed))
        return out


class PhiModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, c: PhiConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(PhiDecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)


class PhiForCausalLM(nn.Module):
    """The language model: token ids [B, T] to logits [B, T, V]."""

    dropout = 0.0  # of attention's weights and of what is added to the residual stream, while training
    fake_quant: FakeQuant = staticmethod(no_fake_quant)  # of the head's weight

    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = config.decoder()
        self.model = PhiModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, E]."""
        length = check_length(tokens_BT, self.decoder.context)
        context = AttentionContext(
            self.decoder, length, tokens_BT.device, documents_BT, self.dropout if self.training else 0.0
        )
        x_BTE = self.model.embed_tokens(tokens_BT)
        for module, layer in zip(self.model.layers, self.decoder.layers, strict=True):
            x_BTE = module(x_BTE, layer, context)
        out: Tensor = self.model.final_layernorm(x_BTE)
        return out

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, labels_BT: Tensor | None = None) -> Tensor:
        """Logits of every position, or the losses of labels."""
        weight = self.fake_quant(self.lm_head.weight)
        return read_head(weight, self.lm_head.bias, self.hidden(tokens_BT, documents_BT), labels_BT)
