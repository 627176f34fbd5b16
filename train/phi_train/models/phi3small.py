"""`model_type: phi3small`: phi-3-small (arXiv:2404.14219), by its published definition, with its checkpoints' names.

gegelu with a limit, muP's scales, block-sparse attention but in every n-th layer, the head tied to the embedding.
transformers has no class for it. Shapes: B batch, T tokens, E hidden_size, V vocab_size.
"""

from torch import Tensor, nn

from phi_runtime.architecture.config import Phi3SmallConfig
from phi_runtime.architecture.decoder import Layer
from phi_train.models.attention import (
    AttentionContext,
    FakeQuant,
    attend,
    check_length,
    no_fake_quant,
    rotate,
)
from phi_train.models.head import read_head
from phi_train.models.recompute import DecoderLayer


class Phi3SmallSelfAttention(nn.Module):
    """Causal attention; per key-value head the fused projection holds its queries, then its key, then its value."""

    def __init__(self, c: Phi3SmallConfig) -> None:
        super().__init__()
        self._kv_heads, self._head_dim = c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        self.query_key_value = nn.Linear(c.hidden_size, c.hidden_size + 2 * self._kv_heads * self._head_dim)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """Attend."""
        groups = self.query_key_value(x_BTE).unflatten(-1, (self._kv_heads, -1, self._head_dim))
        q = groups[..., :-2, :].flatten(2, 3).transpose(1, 2)
        k, v = groups[..., -2, :].transpose(1, 2), groups[..., -1, :].transpose(1, 2)
        out: Tensor = self.dense(attend(rotate(q, context), rotate(k, context), v, layer, context))
        return out


class Phi3SmallMLP(nn.Module):
    """down(gate * sigmoid(1.702 gate) * (linear + 1)); gate and linear part alternate, and are clipped."""

    def __init__(self, c: Phi3SmallConfig) -> None:
        super().__init__()
        self._limit = c.gegelu_limit
        self.up_proj = nn.Linear(c.hidden_size, 2 * c.ff_intermediate_size)
        self.down_proj = nn.Linear(c.ff_intermediate_size, c.hidden_size)

    def forward(self, x_BTE: Tensor) -> Tensor:
        """One MLP."""
        gate, linear = self.up_proj(x_BTE).unflatten(-1, (-1, 2)).unbind(-1)
        gate, linear = gate.clamp(max=self._limit), linear.clamp(-self._limit, self._limit)
        out: Tensor = self.down_proj(gate * (1.702 * gate).sigmoid() * (linear + 1))
        return out


class Phi3SmallDecoderLayer(DecoderLayer):
    """Attention, then MLP, each behind a norm and around a residual."""

    def __init__(self, c: Phi3SmallConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)
        self.self_attn = Phi3SmallSelfAttention(c)
        self.post_attention_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)
        self.mlp = Phi3SmallMLP(c)

    def inside(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """One layer."""
        x_BTE = x_BTE + context.drop(self.self_attn(self.input_layernorm(x_BTE), layer, context))
        out: Tensor = x_BTE + context.drop(self.mlp(self.post_attention_layernorm(x_BTE)))
        return out


class Phi3SmallModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, c: Phi3SmallConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Phi3SmallDecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_epsilon)


class Phi3SmallForCausalLM(nn.Module):
    """The language model: token ids [B, T] to logits [B, T, V]."""

    dropout = 0.0  # of attention's weights and of what is added to the residual stream, while training
    fake_quant: FakeQuant = staticmethod(no_fake_quant)  # of the head's weight

    def __init__(self, config: Phi3SmallConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = config.decoder()
        self.model = Phi3SmallModel(config)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None) -> Tensor:
        """What the head reads, muP's scale included, [B, T, E]."""
        length = check_length(tokens_BT, self.decoder.context)
        context = AttentionContext(
            self.decoder, length, tokens_BT.device, documents_BT, self.dropout if self.training else 0.0
        )
        x_BTE = self.model.embed_tokens(tokens_BT) * self.decoder.embedding_scale
        for module, layer in zip(self.model.layers, self.decoder.layers, strict=True):
            x_BTE = module(x_BTE, layer, context)
        out: Tensor = self.model.final_layernorm(x_BTE) * self.decoder.logit_scale
        return out

    def forward(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, labels_BT: Tensor | None = None) -> Tensor:
        """Logits of every position, or the losses of labels."""
        weight = self.fake_quant(self.model.embed_tokens.weight)
        return read_head(weight, None, self.hidden(tokens_BT, documents_BT), labels_BT)
