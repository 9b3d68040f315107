"""Small random models of transformers, and what they and ours say of some tokens."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedrouter_jax import models

SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def torch_model(family: str, options: dict, folder=None, dtype=None, **save):
    """A random transformers model whose norms and biases are off their neutral values; saved when a folder is given."""
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed")
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SMALL, **options))
    with torch.no_grad():
        for name, leaf in made.named_parameters():
            if leaf.ndim == 1:
                leaf.copy_(torch.rand_like(leaf) + (0.0 if name.endswith("bias") else 0.5))
            else:
                leaf.mul_(6.0)
    made = made.eval() if dtype is None else made.to(dtype).eval()
    if folder is not None:
        made.save_pretrained(folder, **save)
    return made


def torch_logits(model, tokens, mask=None):
    import torch

    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()


def our_logits(config, params, tokens, segments=None):
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda p, t, q, s: models.logits(config, p, models.hidden_states(config, p, t, q, s)))
    return np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(positions), segments))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
