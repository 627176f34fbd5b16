"""The family's architectures at full size, as published: what `phi-train init` makes by name.

Figures from the models' own `config.json` (microsoft/* and roneneldan/* on Hugging Face).
"""

from collections.abc import Callable
from dataclasses import replace

from phi_runtime.architecture.config import Config, GptNeoConfig, LongRope, Phi3Config, Phi3SmallConfig, PhiConfig

INIT_STD = 0.02  # initializer_range of all of them


def phi3_mini_4k() -> Phi3Config:
    """phi-3-mini-4k-instruct: 3,821,079,552 parameters (arXiv:2404.14219)."""
    return Phi3Config(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=2047,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    )


def phi3_mini_128k() -> Phi3Config:
    """phi-3-mini-128k-instruct, July 2024: the same with LongRoPE."""
    return replace(
        phi3_mini_4k(),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sliding_window=262144,
        rope_scaling=LongRope(_MINI_128K_SHORT, _MINI_128K_LONG),
    )


def phi3_medium_4k() -> Phi3Config:
    """phi-3-medium-4k-instruct: 13,960,238,080 parameters, grouped queries."""
    return replace(
        phi3_mini_4k(),
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
    )


def phi_1_5() -> PhiConfig:
    """phi-1 and phi-1.5: 1,418,270,720 parameters (arXiv:2306.11644, 2309.05463)."""
    return PhiConfig(
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
        layer_norm_eps=1e-5,
        rope_theta=10000.0,
        partial_rotary_factor=0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def phi1_small_config() -> PhiConfig:
    """phi-1-small: 356,794,368 parameters (arXiv:2306.11644)."""
    return replace(
        phi_1_5(),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=16,
    )


def phi3_small_8k() -> Phi3SmallConfig:
    """phi-3-small-8k-instruct: 7,392,272,384 parameters, its head tied."""
    return Phi3SmallConfig(
        vocab_size=100352,
        hidden_size=4096,
        ff_intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        layer_norm_epsilon=1e-5,
        rope_embedding_base=1e6,
        gegelu_limit=20.0,
        mup_use_scaling=True,
        mup_attn_multiplier=1.0,
        mup_embedding_multiplier=10.0,
        mup_width_multiplier=8.0,
        blocksparse_block_size=64,
        blocksparse_num_local_blocks=16,
        blocksparse_vert_stride=8,
        dense_attention_every_n_layers=2,
        bos_token_id=100257,
        eos_token_id=100257,
        pad_token_id=100257,
    )


def phi_2() -> PhiConfig:
    """phi-2: 2,779,683,840 parameters."""
    return replace(
        phi_1_5(),
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        partial_rotary_factor=0.4,
        bos_token_id=50256,
        eos_token_id=50256,
    )


def tinystories(hidden_size: int, layers: int) -> GptNeoConfig:
    """TinyStories models of a width and depth (arXiv:2305.07759)."""
    return GptNeoConfig(
        vocab_size=50257,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=layers,
        num_heads=16,
        max_position_embeddings=2048,
        layer_norm_epsilon=1e-5,
        window_size=256,
        attention_layers=tuple("local" if n % 2 else "global" for n in range(layers)),
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=None,
    )


PUBLISHED: dict[str, Callable[[], Config]] = {
    "phi3-mini-4k": phi3_mini_4k,
    "phi3-mini-128k": phi3_mini_128k,
    "phi3-medium-4k": phi3_medium_4k,
    "phi3-small-8k": phi3_small_8k,
    "phi1-small": phi1_small_config,
    "phi1": phi_1_5,
    "phi15": phi_1_5,
    "phi2": phi_2,
    "tinystories-1m": lambda: tinystories(64, 8),
    "tinystories-3m": lambda: tinystories(128, 8),
    "tinystories-8m": lambda: tinystories(256, 8),
    "tinystories-28m": lambda: tinystories(512, 8),
    "tinystories-33m": lambda: tinystories(768, 4),
}

# microsoft/Phi-3-mini-128k-instruct, July 2024.
_MINI_128K_LONG = (
    1.07, 1.12, 1.15, 1.42, 1.57, 1.80, 2.13, 2.13, 3.01, 5.91, 6.95, 9.07, 9.93, 10.71, 11.13, 14.61,
    15.41, 19.81, 37.28, 38.28, 38.60, 40.12, 46.20, 50.94, 53.66, 54.9374, 56.8974, 57.2874, 59.9874, 60.8674,
    60.8874, 61.7174, 62.9174, 62.9574, 63.4174, 63.8174, 63.8374, 63.8974, 63.9374, 64.0674, 64.1143, 64.1244,
    64.1544, 64.1944, 64.2444, 64.5744, 64.69, 64.76,
)  # fmt: skip
_MINI_128K_SHORT = (
    *[1.1] * 3, 1.3, *[1.35] * 2, 1.4, 1.55, *[2.0] * 17, *[2.05] * 6, *[2.1] * 2, 2.15, *[2.25] * 5, 2.4, 2.45, 2.5,
    *[2.7] * 2, 2.75, 2.8, 2.9, 3.05,
)  # fmt: skip
