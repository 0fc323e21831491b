"""Population training: K stacked adapters on one frozen base, one program, one step.

    step_population(state, params, batch) = vmap over k of step(state_k, params, batch)

Members differ in key, learning rate or whatever else `optax.inject_hyperparams`
exposes, in alpha, and in rank: narrower factors are padded with zeros to the widest,
which changes nothing, for

    a @ b = [a 0] @ [b; 0],    d loss / d [a 0] = s x^T g [b; 0]^T = [d loss / d a, 0]

and likewise for b, so zero columns have zero gradients. Scale and true rank of a member
travel beside the state, in `Population.pairs`, to the loss and to `tx.update`: each
member does what it would have done alone. An optimiser that acts leaf by leaf on the
*shape* of a factor sees the padded rank, such as the width factors of
`optax.contrib.muon`; elementwise ones and lorax's own pair transforms do not.

What no member's values reach is kept once: the step, and the counts of the optimiser,
so that a `lax.cond` on a count stays a cond. (Batched, it would run both branches.) A
count goes on as soon as one member takes the batch: a member that skips a batch which
others take keeps its factors and moments, but not the place in its schedule.
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
