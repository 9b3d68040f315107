"""What a trained federation says: greedy answers to prompts, and the loss of given ones, each under its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedrouter_jax import at_once, embed, generate, likelihood, lora, mesh
from fedrouter_jax import bank as bank_lib
from fedrouter_jax.data.tokens import Tokens
from fedrouter_jax.experiment import Prepared
from fedrouter_jax.sharing import divided
from fedrouter_jax.types import Advance, FederationState, LoRA, PyTree, unseen

SLOTS = 32  # adapters that are concatenated at once: their ranks are multiplied for every token, open or not

# (base, adapters as one, places, their gates [place, rank], advance) -> an array of what is found [place, ...]
UnderAdapters = Callable[[PyTree, LoRA, np.ndarray, np.ndarray, Advance], np.ndarray]


def answer(
    prepared: Prepared,
    state: FederationState,
    prompts: Sequence[Sequence[int]],
    weights: np.ndarray,
    advance: Advance = unseen,
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
            rows_at_once=at_once.rows(config, model, prompts),
            packs_at_once=at_once.packs(config),
            shrinks=jax.default_backend() == "cpu",
            where=mesh.row_of(base),
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
    advance: Advance = unseen,
) -> np.ndarray:
    """The loss of each row's response in nats a token, float32 [row]; `weights` as for `answer`."""

    packs = at_once.packs_with_head(prepared.config)

    def read(base, bank, places, gates, advance):
        found = np.zeros(len(places), np.float32)
        routed = gates.any(axis=1)
        # The base model's apart, which another run may have: packed with them, the others would be rounded otherwise.
        for chosen in (routed, ~routed):
            here = [rows[place] for place in places[chosen]]
            found[chosen] = likelihood.losses(prepared.model.config, base, here, bank, gates[chosen], packs, advance)
        return found

    return _under_adapters(prepared, state, weights, np.float32(0), read, advance)


def states(
    prepared: Prepared, state: FederationState, prompts: Sequence[Sequence[int]], weights: np.ndarray
) -> np.ndarray:
    """The hidden state of each prompt's last token after the final norm, float32 [prompt, width]."""
    config, model = prepared.config, prepared.model

    def read(base, bank, places, gates, advance):
        here, packs = [prompts[place] for place in places], at_once.packs(config)
        return embed.embed(model.config, base, here, None, packs, advance, lora=bank, gates=gates, last=True)

    return _under_adapters(prepared, state, weights, np.zeros(model.config.width, np.float32), read, unseen)


def _under_adapters(
    prepared: Prepared,
    state: FederationState,
    weights: np.ndarray,
    empty: np.ndarray | np.float32,
    work: UnderAdapters,
    advance: Advance,
) -> np.ndarray:
    """`work` for all rows of `weights` [row, slot], over all devices: an array of entries like `empty` [row, ...].

    Where the method shifts the base, rows without weights are for the base as it came.
    """
    weights, shift = np.asarray(weights), prepared.strategy.base
    plain = ~weights.any(axis=1) & (shift is not None)

    def some(params, state, places, advance):
        found = np.zeros((len(places), *empty.shape), empty.dtype)
        bank = bank_lib.serving(state.bank)
        for base, chosen in ((shift(state, params) if shift else params, ~plain[places]), (params, plain[places])):
            for rows, slots in together(weights[places], np.flatnonzero(chosen), SLOTS):
                adapters = lora.concatenate(jax.tree.map(lambda leaf, slots=slots: leaf[np.maximum(slots, 0)], bank))
                open_ones = np.where(slots >= 0, weights[places[rows]][:, slots], 0)
                gates = np.asarray(lora.gates(jnp.asarray(open_ones, jnp.float32), prepared.config.lora))
                found[rows] = work(base, adapters, places[rows], gates, advance)
        return found

    return divided(prepared.model.params, len(weights), some, advance, state._replace(server=()))


def together(weights: np.ndarray, rows: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Groups of `rows` of `weights` [row, slot] that open few slots, at most `most` where one row does: (rows, slots).

    Slots are as many in every group, for one shape is compiled once: -1 stands for none. Few in all are one group's.
    """
    if not len(rows):
        return []
    if weights.shape[1] <= most:
        return [(rows, np.arange(weights.shape[1]))]
    opens = {row: frozenset(np.flatnonzero(weights[row]).tolist()) for row in rows.tolist()}
    used = max(1, len(frozenset().union(*opens.values())))
    even = -(-used // -(-used // most))  # rather two of 17 than 32 and 2
    most = max(even, *map(len, opens.values()))
    groups: list[tuple[list[int], set[int]]] = []
    for row in sorted(opens, key=lambda row: sorted(opens[row])):
        if not groups or len(groups[-1][1] | opens[row]) > most:
            groups.append(([], set()))
        groups[-1][0].append(row)
        groups[-1][1].update(opens[row])
    return [(np.array(sorted(held)), np.array(sorted(slots) + [-1] * (most - len(slots)))) for held, slots in groups]
