"""A step cut into stages is the same step, whatever arrives when."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.local import named
from shoal.schedule.staged import Step

BATCH = 4


def normal(key: Any, *shape: int) -> Any:
    return jax.random.normal(key, shape) * 0.3


def chain(key: Any) -> Any:
    return {f"layer{n}": {"kernel": normal(jax.random.fold_in(key, n), 6, 6), "bias": jnp.zeros(6)} for n in range(3)}


def through(params: Any, x: Any) -> Any:
    for n in range(3):
        x = jnp.tanh(x @ params[f"layer{n}"]["kernel"] + params[f"layer{n}"]["bias"][None])
    return x


def branching(key: Any) -> Any:
    names = ("in", "left1", "left2", "right", "out")
    return {name: normal(jax.random.fold_in(key, n), 6, 6) for n, name in enumerate(names)}


def through_branches(params: Any, x: Any) -> Any:
    x = jnp.tanh(x @ params["in"])
    left = jnp.tanh(jnp.tanh(x @ params["left1"]) @ params["left2"])
    return (left + jnp.tanh(x @ params["right"])) @ params["out"]


def tied(key: Any) -> Any:
    return {"words": normal(key, 6, 6), "middle": normal(jax.random.fold_in(key, 1), 6, 6)}


def through_tied(params: Any, x: Any) -> Any:
    return jax.checkpoint(lambda x: jnp.tanh(x @ params["words"] @ params["middle"]))(x) @ params["words"].T


def stacked(key: Any) -> Any:
    return {"layers": normal(key, 3, 6, 6), "out": normal(key, 6, 6)}


def through_stacked(params: Any, x: Any) -> Any:
    x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, params["layers"])
    return x @ params["out"]


def stacked_twice(key: Any) -> Any:
    one, two = jax.random.split(key)
    return {
        "kernel": normal(one, 3, 6, 6),
        "scale": 1 + normal(two, 3, 6),
        "out": normal(key, 6, 6),
        "back": normal(two, 3, 6, 6),
    }


def through_stacked_twice(params: Any, x: Any) -> Any:
    """One loop hands what it leaves of each turn to another that goes backwards; each turn is computed again on the way back; one stack is used once more as a whole."""

    @jax.checkpoint
    def there(x: Any, layer: Any) -> Any:
        x = jnp.tanh(x @ layer["kernel"].astype(jnp.float32)) * layer["scale"].astype(jnp.float32)[None]
        return x, x

    def back(x: Any, given: Any) -> Any:
        kernel, before = given
        return jnp.tanh(x @ kernel) + before, None

    layers = {name: params[name].astype(jnp.bfloat16) for name in ("kernel", "scale")}
    x, each = jax.lax.scan(there, x, layers)
    x, _ = jax.lax.scan(back, x, (params["back"], each), reverse=True)
    return x @ params["out"] + jnp.sum(jnp.square(params["kernel"]))


@jax.custom_vjp
def doubled(x: Any) -> Any:
    return x * 2


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (g * 2,))


def through_stacked_of_own(params: Any, x: Any) -> Any:
    """A way back of its own, which calls itself."""
    x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(doubled(x @ kernel)), None), x, params["layers"])
    return doubled(x @ params["out"])


def always(whole: Any, piece: Any) -> bool:
    return True


NETS = {
    "chain": (chain, through),
    "branching": (branching, through_branches),
    "tied": (tied, through_tied),
    "stacked": (stacked, through_stacked),
    "stacked-own": (stacked, through_stacked_of_own),
    "stacked-twice": (stacked_twice, through_stacked_twice),
}


def task_of(net: str) -> shoal.Task:
    init, apply = NETS[net]
    return shoal.Task(
        name=net, init=init, loss=lambda params, state, batch, key: jnp.mean(jnp.square(apply(params, batch["x"]) - batch["y"]), axis=1),
        evaluate=lambda params, state, batch: {"size": shoal.Sum(jnp.sum(jnp.abs(apply(params, batch["x"])), axis=1), jnp.ones(batch["x"].shape[0]), (0.0, 1e3))},
        batch={"x": ((6,), "float32"), "y": ((6,), "float32")}, local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=BATCH),
    )  # fmt: skip


def inputs(seed: int = 0) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    batch = {name: jnp.asarray(rng.normal(size=(BATCH, 6)), jnp.float32) for name in ("x", "y")}
    batch["mask"] = jnp.array([True, True, True, False])
    return {}, {}, batch, jnp.float32(3), jnp.zeros(2, jnp.uint32)


def done(step: Step, params: Any, order: Any) -> tuple[Any, list[int]]:
    """The step, whose parameters arrive in an order, and the transfers in the order in which their gradients were made."""
    run, staged = step.begin(*inputs()), step.staged
    left, made = list(order), list[int]()
    while not run.is_done:
        stage = run.ready()
        if stage is None:
            transfer = left.pop(0)
            run.give(transfer, {name: params[name] for name in staged.members[transfer]})
        else:
            run.run(stage)
            for transfer in staged.graph.stages[stage].makes:
                run.gradients(transfer)
                made.append(transfer)
    return step.returned(run), made


WHOLE: dict[str, Any] = {}
LAYERS: dict[str, Any] = {"takes_apart": always}
PIECES: dict[str, Any] = {"takes_apart": always, "piece_bytes": 2 * 6 * 4}


@pytest.mark.parametrize(
    ("net", "how"),
    [
        *((net, WHOLE) for net in NETS),
        *((net, LAYERS) for net in NETS if "stacked" in net),
        *((net, PIECES) for net in NETS),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_stages_are_the_step(net: str, how: dict[str, Any]) -> None:
    task = task_of(net)
    step = Step(task, BATCH, joined_bytes=32, **how)
    params = task.variables(jax.random.key(0)).params
    _, _, batch, _, key = inputs()

    def objective(params: Any) -> Any:
        each = task.losses(params, {}, batch, jax.random.wrap_key_data(key)).per_example
        return jnp.sum(jnp.where(batch["mask"], each, 0.0)) / 3

    wanted = named(jax.grad(objective)(params), "params")
    flat, rng = step.apart(named(params, "params")), np.random.default_rng(0)
    num = len(step.staged.graph.transfers)
    found = [done(step, flat, order) for order in [range(num), range(num)[::-1], rng.permutation(num).tolist()]]
    for (gradients, _, metrics), made in found:
        assert sorted(made) == list(range(num))
        assert metrics["loss/denominator"] == 3
        for name, value in step.whole(gradients).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-6)
        for name, value in gradients.items():
            np.testing.assert_array_equal(value, found[0][0][0][name])  # bit for bit, whatever arrived first


def test_a_chain_has_a_stage_for_each_layer_and_gradients_come_back_in_reverse() -> None:
    step = Step(task_of("chain"), BATCH, joined_bytes=32)
    graph = step.staged.graph
    assert step.staged.members == tuple((f"params/layer{n}/kernel", f"params/layer{n}/bias") for n in range(3))
    firsts = [next(number for number, stage in enumerate(graph.stages) if n in stage.needs) for n in range(3)]
    assert firsts == sorted(firsts)
    _, made = done(step, named(task_of("chain").variables(jax.random.key(0)).params, "params"), range(3))
    assert made == [2, 1, 0]
    assert [transfer.size_bytes for transfer in graph.transfers] == [4 * 42] * 3


def test_branches_do_not_wait_for_one_another() -> None:
    step = Step(task_of("branching"), BATCH, joined_bytes=32)
    names = [transfer.name.removeprefix("params/") for transfer in step.staged.graph.transfers]
    depends = {frozenset(names[r] for r in np.flatnonzero(row)) for row in step.staged.graph.forward.depends}
    assert frozenset(["in", "right"]) in depends
    assert frozenset(["in", "left1"]) in depends


@pytest.mark.parametrize("net", ["branching", "stacked-own", "stacked-twice"])
def test_evaluation_has_stages_too(net: str) -> None:
    task = task_of(net)
    step = Step(task, BATCH, is_training=False, joined_bytes=32, takes_apart=always)
    params = task.variables(jax.random.key(0)).params
    metrics, made = done(step, step.apart(named(params, "params")), range(len(step.staged.graph.transfers)))
    _, _, batch, *_ = inputs()
    each = jnp.sum(jnp.abs(NETS[net][1](params, batch["x"])), axis=1)
    np.testing.assert_allclose(metrics["size/numerator"], jnp.sum(jnp.where(batch["mask"], each, 0.0)), rtol=1e-5)
    assert made == []
    assert not any(stage.makes for stage in step.staged.graph.stages)


def test_a_loop_is_one_stage_and_says_so() -> None:
    step = Step(task_of("stacked"), BATCH, joined_bytes=32)
    assert any("a loop of 3 turns that needs all of params/layers" in note for note in step.staged.notes)


def test_layers_of_a_stack_travel_one_by_one() -> None:
    step = Step(task_of("stacked"), BATCH, joined_bytes=32, takes_apart=always)
    graph = step.staged.graph
    assert step.rows == {"params/layers": (1, 1, 1)}
    assert [transfer.name for transfer in graph.transfers] == [*(f"params/layers[{n}]" for n in range(3)), "params/out"]
    assert not step.staged.notes
    depends = {tuple(np.flatnonzero(row).tolist()) for row in graph.forward.depends}
    assert depends == {tuple(range(n)) for n in range(5)}  # nothing, the first, the first two, …
    params = named(task_of("stacked").variables(jax.random.key(0)).params, "params")
    _, made = done(step, step.apart(params), range(4))
    assert made == [3, 2, 1, 0]
    whole = step.whole(step.apart(params))
    assert {name: value.shape for name, value in whole.items()} == {name: value.shape for name, value in params.items()}
    np.testing.assert_array_equal(whole["params/layers"], params["params/layers"])


@pytest.mark.parametrize("num", [3, 12])
def test_a_layer_travels_as_one_and_turns_share_their_programs(num: int) -> None:
    def through(params: Any, x: Any) -> Any:
        def layer(x: Any, p: Any) -> Any:
            return x + jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"], None

        return jax.lax.scan(layer, x, params)[0]

    def init(key: Any) -> Any:
        return {"up": normal(key, num, 6, 6), "down": normal(key, num, 6, 6), "bias": jnp.zeros((num, 6))}

    task = task_of("chain").replace(init=init, loss=lambda params, state, batch, key: jnp.mean(through(params, batch["x"]), axis=1), evaluate=None)  # fmt: skip
    staged = Step(task, BATCH, joined_bytes=32, takes_apart=always).staged
    names = [{f"params/{name}[{n}]" for name in ("up", "down", "bias")} for n in range(num)]
    assert [set(each) for each in staged.members] == names
    assert len(staged.graph.stages) <= 3 * num + 4
    assert len({id(program) for program in staged._programs}) <= 10


def test_a_large_tensor_travels_in_pieces_and_takes_no_further_stages() -> None:
    whole, step = Step(task_of("chain"), BATCH, joined_bytes=32), Step(task_of("chain"), BATCH, joined_bytes=32, **PIECES)  # fmt: skip
    assert step.rows == {f"params/layer{n}/kernel": (2, 2, 2) for n in range(3)}
    assert step.staged.members[0] == ("params/layer0/kernel[0:2]",)
    assert step.staged.members[2] == ("params/layer0/kernel[4:6]", "params/layer0/bias")
    assert len(step.staged.graph.stages) == len(whole.staged.graph.stages)
    by_layer = [{3 * n, 3 * n + 1, 3 * n + 2} for n in range(3)]
    assert all(
        by_layer[n] <= set(stage.makes) or not by_layer[n] & set(stage.makes)
        for stage in step.staged.graph.stages
        for n in range(3)
    )
    params = named(task_of("chain").variables(jax.random.key(0)).params, "params")
    for name, value in step.whole(step.apart(params)).items():
        np.testing.assert_array_equal(value, params[name])


@pytest.mark.parametrize(("piece_bytes", "rows"), [(4 * 19, 1), (4 * 18, 2), (1, 3)])
def test_pieces_are_no_smaller_than_asked_for_and_have_rows(piece_bytes: int, rows: int) -> None:
    step = Step(task_of("branching"), BATCH, joined_bytes=32, takes_apart=always, piece_bytes=piece_bytes)
    assert [len(each) for each in step.rows.values()] == ([rows] * 5 if rows > 1 else [])


def test_whoever_updates_them_decides_what_is_taken_apart() -> None:
    asked: list[Any] = []

    def never(whole: Any, piece: Any) -> bool:
        asked.append(({name: value.shape for name, value in whole.items()}, {name: value.shape for name, value in piece.items()}))  # fmt: skip
        return False

    step = Step(task_of("stacked"), BATCH, joined_bytes=32, takes_apart=never)
    assert asked == [({"params/layers": (3, 6, 6)}, {"params/layers[0]": (1, 6, 6)})]
    assert step.rows == {}
    assert step.staged.notes


def test_a_stack_of_small_layers_stays_whole() -> None:
    step = Step(task_of("stacked"), BATCH, joined_bytes=4 * 36, takes_apart=always)
    assert step.rows == {}


def test_frozen_parameters_do_not_travel() -> None:
    task = task_of("tied").replace(leaves={"params/middle": "frozen"})
    step = Step(task, BATCH, joined_bytes=32)
    assert [transfer.name for transfer in step.staged.graph.transfers] == ["params/words"]


def test_small_tensors_travel_with_the_one_before() -> None:
    step = Step(task_of("chain"), BATCH, joined_bytes=1 << 20)
    assert len(step.staged.graph.transfers) == 1
