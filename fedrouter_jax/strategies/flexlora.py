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
from fedrouter_jax.types import LoRA, Strategy

OWNERS = {"main": "shared"}


def flexlora() -> Strategy:
    """One shared slot. Averaged: A B. Private: nothing."""
    init, ask, _, _ = owned(OWNERS)

    def tell(state, sums):
        (share, products), old = sums, state.bank["main"]
        clients, found = len(state.table), LoRA({}, {})
        for m, total in products.items():
            rank = old.a[m].shape[-1]
            u, s, vt = leading(total / jnp.where(share > 0, share, 1), rank, clients * rank)
            found.a[m] = jnp.where(share > 0, u, old.a[m])
            found.b[m] = jnp.where(share > 0, s[..., None] * vt, old.b[m])
        return state._replace(round=state.round + 1, bank={"main": found})

    return Strategy("flexlora", OWNERS, init, ask, shift.collect, tell, only_slot, of_products=True)


def leading(matrices, rank, bound):
    """The `rank` largest singular values of `matrices` [..., in, out] of rank `bound` or less, between their vectors.

    So many random combinations of its columns span all columns of such a matrix (Halko et al., SIAM Review 2011, arXiv
    0909.4061), so nothing is lost, and with few clients it is ten times as fast as to decompose the whole.
    """
    width_in, width_out = matrices.shape[-2:]
    mix = jax.random.normal(key_of(0), (width_out, min(bound, width_in, width_out)))
    basis = jnp.linalg.qr(shift.exact("...io,or->...ir", matrices, mix))[0]
    u, s, vt = jnp.linalg.svd(shift.exact("...ir,...io->...ro", basis, matrices), full_matrices=False)
    return shift.exact("...ir,...rk->...ik", basis, u[..., :rank]), s[..., :rank], vt[..., :rank, :]
