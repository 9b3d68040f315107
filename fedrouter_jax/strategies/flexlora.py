"""FlexLoRA: the server averages what adapters do, not their halves, and keeps as much of the mean as the rank holds.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", NeurIPS
2024, arXiv 2402.11505.

    client   trains A, B from the server's
    server   U S V^T = svd(sum_k p_k A_k B_k)
             A, B <- U_r, S_r V_r^T            the r largest singular values: no matrix of rank r is nearer to the mean

The paper sends each client as many singular vectors as it can afford. Ranks are the same for all clients here.
"""

import jax
import jax.numpy as jnp

from fedrouter_jax import shift
from fedrouter_jax.federation import only_slot, owned
from fedrouter_jax.keys import key_of
from fedrouter_jax.types import Array, LoRA, Strategy

OWNERS = {"main": "shared"}


def flexlora() -> Strategy:
    """One shared slot. Averaged: A B. Private: nothing."""
    init, ask, _, _ = owned(OWNERS)

    def tell(state, sums):
        (share, products), old = sums, state.bank["main"]
        clients, found = len(state.table), LoRA({}, {})
        for m, total in products.items():
            rank = old.a[m].shape[-1]
            mean = total / jnp.where(share > 0, share, 1)
            # Layer by layer: two batches of decompositions at once waited for each other for ever on two cores (log).
            a, b = jax.lax.map(lambda layer, rank=rank: nearest(layer, rank, clients * rank), mean)
            found.a[m], found.b[m] = jnp.where(share > 0, a, old.a[m]), jnp.where(share > 0, b, old.b[m])
        return state._replace(round=state.round + 1, bank={"main": found})

    return Strategy("flexlora", OWNERS, init, ask, shift.collect, tell, only_slot, of_products=True)


def nearest(matrix: Array, rank: int, bound: int) -> tuple[Array, Array]:
    """A [in, rank] and B [rank, out] whose product is nearest to a `matrix` [in, out].

    Its rank is at most `bound`. As many random combinations of a matrix's columns as its rank span all of them (Halko
    et al., SIAM Review 2011, arXiv 0909.4061), so nothing is lost, and with few clients it is ten times as fast as to
    decompose the whole. An adapter's rank above a side of the matrix has nothing left to hold: zeros.
    """
    width_in, width_out = matrix.shape
    mix = jax.random.normal(key_of(0), (width_out, min(bound, width_in, width_out)))
    basis = jnp.linalg.qr(shift.exact("io,or->ir", matrix, mix))[0]
    u, s, vt = jnp.linalg.svd(shift.exact("ir,io->ro", basis, matrix), full_matrices=False)
    a, b = shift.exact("ir,rk->ik", basis, u[:, :rank]), s[:rank, None] * vt[:rank]
    lacking = (0, rank - a.shape[1])
    return jnp.pad(a, [(0, 0), lacking]), jnp.pad(b, [lacking, (0, 0)])
