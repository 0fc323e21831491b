"""AdaLoRA's importance and masks against PEFT's own allocator, on the same gradients.

PEFT freezes importance one step earlier, at T - t_f, so the comparison ends before it.
"""

import dataclasses

import numpy as np
import optax
import pytest

from lorax import optim
from tests import programs
from tests.optim.adalora_cases import RATE, compiled, drawn

torch = pytest.importorskip("torch", reason="needs the golden extra: torch, peft")
peft = pytest.importorskip("peft", reason="needs the golden extra: torch, peft")


def test_the_allocator_of_peft():
    sizes, T, tf = [(5, 4), (4, 6)], 40, 12
    config = peft.AdaLoraConfig(
        init_r=3,
        target_r=2,
        tinit=4,
        tfinal=tf,
        deltaT=3,
        total_step=T,
        target_modules=["0", "1"],
    )
    layers = [torch.nn.Linear(n, m, bias=False) for n, m in sizes]
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config)
    allocator = model.base_model.rankallocator
    theirs = {
        str(i): [
            getattr(model.base_model.model[i], f"lora_{x}")["default"] for x in "AEB"
        ]
        for i in range(2)
    }
    adapters = {str(i): drawn(i, n=n, m=m) for i, (n, m) in enumerate(sizes)}
    for path, (a, e, b) in theirs.items():  # lora_A = p^T, lora_E = lam, lora_B = q^T
        ours = adapters[path]
        for param, value in ((a, ours.p.T), (e, ours.lam[:, None]), (b, ours.q.T)):
            param.data.copy_(torch.from_numpy(np.array(value)))
    params = [param for group in theirs.values() for param in group]
    sgd = torch.optim.SGD(params, lr=RATE)
    tx = optim.adalora(
        optax.sgd(RATE),
        init_budget=6,
        target_budget=4,
        total_steps=T,
        initial_warmup=4,
        final_steps=tf,
        interval=3,
        orthogonal_weight=0.0,
    )
    state, chosen = tx.init(adapters), 0
    update = compiled(tx.update, adapters, state, adapters)
    for t in range(1, T - tf):  # they freeze importance at T - tf, one step before us
        grads = {
            path: dataclasses.replace(
                a,
                p=programs.normal(1000 + t, *a.p.shape),
                lam=programs.normal(2000 + t, *a.lam.shape),
                q=programs.normal(3000 + t, *a.q.shape),
            )
            for path, a in adapters.items()
        }
        for path, (a, e, b) in theirs.items():
            g = grads[path]
            for param, value in ((a, g.p.T), (e, g.lam[:, None]), (b, g.q.T)):
                param.grad = torch.from_numpy(np.array(value))
        sgd.step()
        budget, pattern = allocator.update_and_allocate(model, t)
        updates, state = update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
        assert int(optim.adalora_budget(state)) == budget
        for path, (_, e, _) in theirs.items():
            np.testing.assert_allclose(
                adapters[path].lam, e.detach().numpy()[:, 0], rtol=1e-5, atol=1e-6
            )
        if pattern is not None:
            chosen += 1
            for name, kept in pattern.items():
                path = name.split(".lora_E")[0].rpartition(".")[2]
                assert np.asarray(state.mask[path]).tolist() == kept, t
    assert chosen == 8 and budget == 4
