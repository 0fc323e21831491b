"""Population training: K stacked adapters on one frozen base, one program, one step.

    step_population(state, params, batch) = vmap over k of step(state_k, params, batch)

Members may differ in key, in learning rate or anything else that
`optax.inject_hyperparams` exposes, in alpha, and in rank: narrower factors are padded
with zeros to the widest, which changes nothing, because

    a @ b = [a 0] @ [b; 0],    d loss / d [a 0] = s x^T g [b; 0]^T = [d loss / d a, 0]

and likewise for b, so zero columns have zero gradients. Each member's scale and true
rank are passed along with the state, in `Population.pairs`, to the loss and to
`tx.update`, so each member trains exactly as it would alone. An optimiser that uses the
*shape* of each leaf, such as `optax.contrib.muon` with its width factors, sees the
padded rank; elementwise optimisers and lorax's own pair transforms do not.

What depends on no member's values is kept once: the step, and the optimiser's counts,
so that a `lax.cond` on a count stays a cond (batched, it would run both branches). A
count advances as soon as one member takes the batch: a member that skips a batch which
others take keeps its factors and moments, but moves on in its schedule.
"""

from lorax.population.roster import Roster
from lorax.population.state import (
    Population,
    create_population,
    member,
    unstack,
)
from lorax.population.step import make_population_eval_step, make_population_step

__all__ = [
    "Population",
    "Roster",
    "create_population",
    "make_population_eval_step",
    "make_population_step",
    "member",
    "unstack",
]
