"""A tiny random model with a byte-level tokenizer, made on the spot: for tests and the smoke preset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fedrouter_jax.keys import key_of
from fedrouter_jax.models.config import DecoderConfig
from fedrouter_jax.models.parameters import init_params
from fedrouter_jax.types import PyTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 0
EOS = "<|end|>"
CONFIG = DecoderConfig(
    vocab_size=257, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=128, max_positions=2048
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255 in the order of the byte-level alphabet), then the end token, which also pads."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONFIG.max_positions,
        clean_up_tokenization_spaces=False,
    )


def tiny_params(dtype: str = "float32") -> PyTree:
    """The tiny model's parameters: the same every time."""
    return init_params(CONFIG, key_of(SEED), dtype)
