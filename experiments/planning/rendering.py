"""Renders a plan as text."""

from experiments.planning import estimates, published

LABEL = "XLA estimate, not measured"
BOUND = "estimate, not measured"


def render(plan: estimates.Plan) -> str:
    """Returns a plan as text: what a chip holds, what it does, how long that takes."""
    lines = [str(plan.topology), f"  {plan.settings}"]
    for name, value in [*_memory(plan), *_work(plan), *_times(plan)]:
        lines.append(f"  {name:<28}{value}")
    lines.append(f"  {'compiled in':<28}{plan.seconds:.0f} s")
    return "\n".join(lines)


def _memory(plan: estimates.Plan) -> list[tuple[str, str]]:
    rows = [("verdict", plan.verdict)]
    if plan.refused:
        rows.append(("the compiler says", plan.refused))
    if memory := plan.memory:
        for name in ("weights", "adapters", "optimizer", "batch", "activations"):
            rows.append((name, _each(getattr(memory, name))))
        rows.append(("code", _each(memory.program)))
        rows.append(("total", _each(memory.total)))
        if memory.evaluation is not None:
            rows.append(("evaluation instead", _each(memory.evaluation)))
        if memory.limit is not None and memory.headroom is not None:
            rows.append(("available", _each(memory.limit)))
            rows.append(("headroom", f"{memory.headroom:8.1%}"))
    return rows


def _work(plan: estimates.Plan) -> list[tuple[str, str]]:
    rows = [
        ("operations", f"{plan.flops:.4g} per chip and step"),
        ("  without recomputation", f"{plan.model_flops:.4g}"),
    ]
    facts = plan.facts
    if facts is None:
        unknown = "unknown: the compiler did not write the program out"
        return rows if plan.refused else [*rows, ("collectives", unknown)]
    if facts.cycles is not None:
        left = f"; {facts.opaque} kernels have none" if facts.opaque else ""
        rows.append(("cycles", f"{facts.cycles:.4g}{left} ({LABEL})"))
    rows.append(("HBM read and written", f"{_each(facts.hbm)} and step"))
    if facts.host:
        rows.append(("to and from the host", f"{_each(facts.host)} and step"))
    for kind, nbytes in sorted(facts.bytes_by_kind().items()):
        rows.append((kind, f"{_each(nbytes)} and step"))
    return rows


def _times(plan: estimates.Plan) -> list[tuple[str, str]]:
    times, chip = plan.times, plan.topology.chip
    if times is None or chip is None:
        return []
    peak, speed, link = chip.flops / 1e12, chip.bandwidth / 1e9, chip.link / 1e9
    return [
        ("products", f"{times.products:.3g} s at {peak:.0f} TFLOP/s"),
        ("  and recomputed", f"{times.recomputed:.3g} s"),
        ("HBM", f"{times.hbm:.3g} s at {speed:,.0f} GB/s"),
        ("transfers", f"{times.transfers:.3g} s at {link:.0f} GB/s per link"),
        ("step, all at once", f"{times.together:.3g} s ({BOUND})"),
        ("step, one after another", f"{times.apart:.3g} s ({BOUND})"),
        ("tokens/s per chip", f"{plan.pace:,.0f}, one after another ({BOUND})"),
        ("MFU", f"{plan.mfu:.1%}, one after another ({BOUND})"),
        ("error", published.ERROR),
    ]


def _each(nbytes: float) -> str:
    unit, name = (2**30, "GiB") if nbytes >= 2**27 else (2**20, "MiB")
    return f"{nbytes / unit:8.3f} {name} per chip"
