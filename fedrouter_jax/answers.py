"""What a trained federation says: greedy answers to prompts, and the loss of given ones, each under its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from fedrouter_jax import bank as bank_lib
from fedrouter_jax import generate, likelihood, lora, mesh
from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.experiment import Advance, Prepared, divided, packs_at_once
from fedrouter_jax.types import FederationState, LoRA, PyTree

# (base, all adapters as one, places, their gates [place, rank], advance) -> an array of what is found [place, ...]
Work = Callable[[PyTree, LoRA, np.ndarray, np.ndarray, Advance], np.ndarray]


def nothing_more(rows: int) -> None:
    """The `Advance` that shows nothing."""


def opened(prepared: Prepared, state: FederationState, params: PyTree) -> tuple[PyTree, LoRA]:
    """The base as the method has shifted it, and all adapters as one, where these parameters of the base lie."""
    state, base = mesh.beside(params, state), prepared.strategy.base
    return base(state, params) if base else params, lora.concatenate(bank_lib.serving(state.bank))


def answer(
    prepared: Prepared,
    state: FederationState,
    prompts: Sequence[Sequence[int]],
    weights: np.ndarray,
    advance: Advance = nothing_more,
) -> list[str]:
    """Greedy answers; `weights` [prompt, slot] over the adapters of the bank, all zero for the model as it came."""
    config, model = prepared.config, prepared.model
    longest = config.data.max_response

    def write(base, bank, places, gates, advance):
        found = generate.generate(
            model.config,
            base,
            [prompts[place] for place in places],
            bank,
            gates,
            stop=model.tokenizer.eos_token_id,
            new_tokens=longest,
            rows_at_once=config.compute.rows_at_once,
            packs_at_once=packs_at_once(config),
            advance=advance,
        )
        return np.array([tokens + [-1] * (longest - len(tokens)) for tokens in found])

    ids = _under_adapters(prepared, state, weights, np.full(longest, -1, np.int32), write, advance)
    answers = [row[row >= 0] for row in ids]
    return [text.strip() for text in model.tokenizer.batch_decode(answers, skip_special_tokens=True)]


def losses(
    prepared: Prepared,
    state: FederationState,
    rows: Sequence[Tokens],
    weights: np.ndarray,
    advance: Advance = nothing_more,
) -> np.ndarray:
    """The loss of each row's response in nats a token, float32 [row]; `weights` as for `answer`."""

    def read(base, bank, places, gates, advance):
        found = np.zeros(len(places), np.float32)
        routed = gates.any(axis=1)
        # The base model's apart, which another run may have: packed with them, the others would be rounded otherwise.
        for chosen in (routed, ~routed):
            here = [rows[place] for place in places[chosen]]
            found[chosen] = likelihood.losses(prepared.model.config, base, here, bank, gates[chosen], advance)
        return found

    return _under_adapters(prepared, state, weights, np.float32(0), read, advance)


def _under_adapters(
    prepared: Prepared,
    state: FederationState,
    weights: np.ndarray,
    empty: np.ndarray | np.float32,
    work: Work,
    advance: Advance,
) -> np.ndarray:
    """`work` for all rows of `weights` [row, slot], over all devices: an array of entries like `empty` [row, ...]."""
    gates = np.asarray(lora.gates(jnp.asarray(weights, jnp.float32), prepared.config.lora))
    # Where a method shifts the base, the model as it came is another one.
    plain = ~np.asarray(weights).any(axis=1) & (prepared.strategy.base is not None)

    def some(params, places, advance):
        found = np.zeros((len(places), *empty.shape), empty.dtype)
        shifted, bank = opened(prepared, state, params)
        for base, chosen in ((shifted, ~plain[places]), (params, plain[places])):
            if chosen.any():
                found[chosen] = work(base, bank, places[chosen], gates[places[chosen]], advance)
        return found

    return divided(prepared, len(gates), some, advance)
