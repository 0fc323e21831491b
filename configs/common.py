"""What the configs share: their sections, in one order, and the argument language.

A config is values only, in flat sections `run, model, adapter, optimizer, population,
data, sharding, eval`; code that turns values into objects lives in
`experiments/factory.py`.
"""

import ml_collections

SECTIONS = (
    "run",
    "model",
    "adapter",
    "optimizer",
    "population",
    "data",
    "sharding",
    "eval",
)
POPULATION = ("seed", "learning_rate", "rank", "alpha")
"""What members of a population may differ in: zipped tuples, `()` for the config's own.

All empty, there is no population.
"""


def sections() -> ml_collections.ConfigDict:
    """Returns a config of empty sections, in the house's order, and no population."""
    config = ml_collections.ConfigDict()
    for name in SECTIONS:
        config[name] = ml_collections.ConfigDict()
    for name in POPULATION:
        config.population[name] = ()
    return config


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> dict:
    """Reads what follows the colon of `--config=configs/x.py:runlocal,seed=3`.

    Args:
      arg: comma-separated `name=value`; a bare `name` is `name=True`. None or "" for
        the defaults.
      **defaults: the arguments the config knows, each with its default, whose type the
        value is read as.

    Returns:
      The defaults, overridden by `arg`.

    Raises:
      ValueError: a name the config does not know, or a value of another type.

    Example:
      >>> parse_arg("runlocal,rank=4", runlocal=False, rank=8)
      {'runlocal': True, 'rank': 4}
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, text = item.partition("=")
        if name not in defaults:
            raise ValueError(
                f"{name!r} is no argument of this config; it knows "
                f"{', '.join(defaults) or 'none'}"
            )
        kind = type(defaults[name])
        if kind is bool:
            text = (text if equals else "true").lower()
            if text not in ("true", "false", "1", "0"):
                raise ValueError(f"{item!r}: give true or false")
            values[name] = text in ("true", "1")
        else:
            try:
                values[name] = kind(text)
            except ValueError:
                raise ValueError(
                    f"{item!r}: give a value of type {kind.__name__}"
                ) from None
    return values
