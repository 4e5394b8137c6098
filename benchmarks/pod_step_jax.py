"""A member of `pod_step` that runs JAX: ours in its ways, and plain `jax.jit` with shardings, in one process.

Says {"how"}, the way in which sums are taken, when it is ready. Then it reads a line of JSON for each turn, {"way", "optimizer", "steps"}, and
answers with {"seconds", "worked", "loss"}; the first turn of a way compiles.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import shoal
from benchmarks import pod_step_common as common
from shoal.pod.collectives import How, Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.placement import Update
from shoal.pod.self_check import self_check
from shoal.pod.step import Program

Step = Callable[[int], Any]
"""Number of a batch -> the loss and the state after it, which need not be there yet."""

OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(common.RATE["adam"]),
    "adamw": optax.adamw(common.RATE["adamw"], weight_decay=common.DECAY),
    "lamb": optax.lamb(common.RATE["lamb"], weight_decay=common.DECAY),
    "sgd": optax.sgd(common.RATE["sgd"]),
}


def mlp(params: Any, batch: Any) -> jax.Array:
    """Losses (B,)."""
    hidden = batch["x"]
    for number in range(layers := len(common.WIDTHS) - 1):
        hidden = hidden @ params[f"kernel{number}"] + params[f"bias{number}"][None]
        hidden = jax.nn.relu(hidden) if number < layers - 1 else hidden
    each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(hidden, batch["y"])
    return each


def decoder(params: Any, batch: Any) -> jax.Array:
    """Losses (B,): the mean over words of each row. Words are one dimension, B T: products of matrices are faster so on a CPU."""
    size = batch["x"].shape[0]
    hidden = params["embed"][batch["x"].reshape(-1)] + jnp.tile(params["place"], (size, 1))
    for layer in range(common.LAYERS):
        mine = {name: params[f"layer{layer}/{name}"] for name in ("qkv", "out", "up", "down", "norm1", "norm2")}
        hidden = hidden + attended(normed(hidden, mine["norm1"]) @ mine["qkv"], size) @ mine["out"]
        hidden = hidden + jax.nn.gelu(normed(hidden, mine["norm2"]) @ mine["up"]) @ mine["down"]
    scores = normed(hidden, params["norm"]) @ params["embed"].T
    each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"].reshape(-1))
    return jnp.mean(each.reshape(size, common.ROW), axis=1)


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None]


def attended(qkv: jax.Array, size: int) -> jax.Array:
    """(B T, 3 D) -> (B T, D), each word sees itself and those before."""
    row, head = common.ROW, common.DIM // common.HEADS
    query, key, value = (
        part.reshape(size, row, common.HEADS, head).transpose(0, 2, 1, 3) for part in jnp.split(qkv, 3, axis=1)
    )
    scores = jnp.einsum("bhtd,bhsd->bhts", query, key) * head**-0.5
    seen = jnp.where(np.tri(row, dtype=bool)[None, None], scores, -1e30)
    found = jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(seen, axis=-1), value)
    return found.transpose(0, 2, 1, 3).reshape(size * row, common.DIM)


LOSSES = {"mlp": mlp, "decoder": decoder}


def program_of(model: str, optimizer: str, update: Update, mesh: Mesh, how: How) -> Program:
    pool = common.batches(model)
    fields = {name: (value.shape[1:], str(value.dtype)) for name, value in pool[0].items()}
    losses = LOSSES[model]
    task = shoal.Task(
        name=model, init=lambda key: jax.tree.map(jnp.asarray, common.weights(model)),
        loss=lambda params, state, batch, key: losses(params, batch), batch=fields,
        local=shoal.Local(optimizer=OPTIMIZERS[optimizer], batch_size=common.BATCH[model]),
    )  # fmt: skip
    spec = MeshSpec.parse(f"data={common.MEMBERS}")
    return Program(task, mesh, Members(spec, how=how), update, {}, {})


def ours(model: str, optimizer: str, update: Update, mesh: Mesh, how: How) -> Step:
    """The step of `shoal.pod`, one a call."""
    program, pool = program_of(model, optimizer, update, mesh, how), common.batches(model)
    rows = NamedSharding(mesh, PartitionSpec(None, "data"))
    placed = [{name: whole(value[None], rows) for name, value in batch.items()} for batch in pool]
    mask = whole(np.ones((1, common.BATCH[model]), bool), rows)
    key = whole(np.array([1, 2], np.uint32), NamedSharding(mesh, PartitionSpec()))
    state = program.begin(jax.random.key(0))
    compiled = jax.jit(program.steps, donate_argnums=0).lower(state, placed[0], mask, key).compile()

    def step(number: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, placed[number], mask, key)
        return metrics["loss/numerator"], state

    return step


def plain(model: str, optimizer: str, mesh: Mesh) -> Step:
    """The rival: one `jax.jit`, parameters whole on each device, batches split, all else the compiler's."""
    rule, losses = OPTIMIZERS[optimizer], LOSSES[model]
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    pool = [{name: whole(value, split) for name, value in batch.items()} for batch in common.batches(model)]

    def advanced(params: Any, opt: Any, batch: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: jnp.mean(losses(p, batch)))(params)
        updates, opt = rule.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt, loss * common.BATCH[model]

    params = {name: whole(value, everywhere) for name, value in common.weights(model).items()}
    opt = jax.jit(rule.init, out_shardings=everywhere)(params)
    jitted = jax.jit(advanced, donate_argnums=(0, 1), out_shardings=everywhere)
    compiled = jitted.lower(params, opt, pool[0]).compile()

    def step(number: int) -> Any:
        nonlocal params, opt
        params, opt, loss = compiled(params, opt, pool[number])
        return loss, (params, opt)

    return step


def whole(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of which each process puts its part where it belongs."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(LOSSES), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    jax.distributed.initialize(f"localhost:{given.port}", common.MEMBERS, given.rank)
    mesh = MeshSpec.parse(f"data={common.MEMBERS}").build()
    how = self_check(mesh, program_of(given.model, "adam", "sharded", mesh, "reduce_scatter").layout).how
    steps: dict[tuple[str, str], Step] = {}
    print(json.dumps({"how": how}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        way, optimizer = which = asked["way"], asked["optimizer"]
        begun, worked = time.perf_counter(), time.process_time()
        if which not in steps and way == "plain":
            steps[which] = plain(given.model, optimizer, mesh)
        elif which not in steps:
            steps[which] = ours(given.model, optimizer, way, mesh, how)
        made = [steps[which](number % common.POOL) for number in range(asked["steps"])]
        jax.block_until_ready(made[-1])
        seconds, worked = time.perf_counter() - begun, time.process_time() - worked
        loss = float(np.ravel(np.asarray(made[-1][0]))[0]) / common.BATCH[given.model]
        print(json.dumps({"seconds": seconds, "worked": worked, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
