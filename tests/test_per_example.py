"""Per-example gradients: `vmap(grad(adapt(f)))` compiles on a CPU, and is right.

In a child process, because jaxlib 0.10.2 aborts on some forms of these programs.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import lorax

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES, WIDTH, RANK, SCALE = 2, 64, 8, 2.0
MAPPED = {
    "x": (None, None, 0),
    "adapters": (0, None, None),
    "base": (None, 0, None),
    "all": (0, 0, 0),
}
SHAPES = {"2d": (3, WIDTH), "3d": (2, 3, WIDTH), "4d": (2, 3, 2, WIDTH)}
LIMIT = {"float32": 1e-5, "float64": 1e-12}


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)


def scanned(params, x):
    """The same function, row by row."""
    step = lambda total, row: (total + loss(params, row[None]), None)
    return jax.lax.scan(step, jnp.zeros((), x.dtype), x)[0]


def by_hand(a, b, w, x):
    """The gradients of a and b, through the kernel's."""
    x = x.reshape(-1, WIDTH)
    y = np.tanh(x @ (w + SCALE * a @ b))
    kernel = x.T @ (2 * y * (1 - y**2))
    return SCALE * kernel @ b.T, SCALE * a.T @ kernel


def lora(a, b):
    return {"w": lorax.Lora(a, b, SCALE, lorax.Axes((0,), (1,)))}


def outside(gradient):
    """The mapped gradient as the body of a loop."""
    body = lambda args: jax.lax.scan(lambda c, _: (c, gradient(*args)), 0, length=2)
    return lambda *args: jax.tree.map(lambda g: g[-1], body(args)[1])


def case(mapped, shape, dtype, scan):
    """A program, its arguments, and the gradients it must give."""
    draw = np.random.default_rng(0).normal
    axes = MAPPED[mapped]
    sizes = [(WIDTH, RANK), (RANK, WIDTH), (WIDTH, WIDTH), SHAPES[shape]]
    leads = [axes[0], axes[0], axes[1], axes[2]]
    arrays = [
        draw(size=size if lead is None else (EXAMPLES, *size)) / WIDTH**0.5
        for size, lead in zip(sizes, leads)
    ]
    gradient = jax.grad(lorax.adapt(scanned if scan == "inside" else loss))
    gradient = jax.vmap(gradient, axes)
    if scan == "outside":
        gradient = outside(gradient)
    pick = lambda i: [
        array if lead is None else array[i] for array, lead in zip(arrays, leads)
    ]
    expected = [np.stack(g) for g in zip(*(by_hand(*pick(i)) for i in range(EXAMPLES)))]
    a, b, w, x = (jnp.asarray(array, dtype) for array in arrays)
    return gradient, (lora(a, b), {"w": w}, x), expected


def errors():
    """The worst relative error of every case; each group is one program."""
    table = {}
    for dtype, scan in itertools.product(LIMIT, ("none", "inside", "outside")):
        keys = [*itertools.product(MAPPED, SHAPES if scan == "none" else ("3d",))]
        cases = [case(mapped, shape, dtype, scan) for mapped, shape in keys]
        run = jax.jit(lambda args: [c[0](*own) for c, own in zip(cases, args)])
        for key, got, (_, _, expected) in zip(
            keys, run([args for _, args, _ in cases]), cases
        ):
            pairs = zip((got["w"].a, got["w"].b), expected)
            worst = max(np.abs(g - e).max() / np.abs(e).max() for g, e in pairs)
            table["-".join((*key, dtype, scan))] = float(worst)
    return table


def test_per_example_gradients_compile_and_are_right():
    command = [sys.executable, "-m", "tests.test_per_example"]
    env = os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = json.loads(done.stdout)
    assert len(table) == 2 * (4 * 3 + 4 + 4)
    wrong = {k: v for k, v in table.items() if not v < LIMIT[k.split("-")[2]]}
    assert not wrong


if __name__ == "__main__":
    print(json.dumps(errors()))
