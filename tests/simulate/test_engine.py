"""The engine: a run that was interrupted and taken up has the bits of one that was not."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.errors import DataError
from shoal.fleet.host import run_seed
from shoal.policy import Selection
from shoal.record.memory import MemoryStore
from shoal.simulate.engine import go_on, simulate
from shoal.simulate.reference import reference_rounds


def init(key: jax.Array) -> dict[str, jax.Array]:
    return {"w": 0.1 * jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}


def loss(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
    out = batch["x"] @ params["w"] + params["b"][None, :]
    return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"])


def task(**changes: Any) -> shoal.Task:
    settings: dict[str, Any] = {
        "name": "small", "init": init, "loss": loss, "batch": {"x": ((3,), "float32"), "y": ((), "int32")},
        "local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, epochs=2, steps_per_block=2),
        "rounds": shoal.RoundPolicy(goal=3, minimum_group=3), "server": shoal.server.adam(0.05),
    }  # fmt: skip
    return shoal.Task(**{**settings, **changes})


def population(num: int = 6) -> shoal.data.Population:
    rng = np.random.default_rng(0)
    return shoal.data.Population.from_arrays(
        {
            f"m{i}": {
                "x": rng.normal(size=(5 + i, 3)).astype(np.float32),
                "y": rng.integers(0, 2, 5 + i).astype(np.int32),
            }
            for i in range(num)
        }
    )


def test_a_run_taken_up_has_the_bits_of_one_that_was_not_interrupted() -> None:
    through, halted = MemoryStore(), MemoryStore()
    whole = simulate(task(), population(), rounds=4, store=through, seed=3)

    class Halt(Exception):
        pass

    def after_two(result: Any) -> None:
        if result.version == 2:
            raise Halt

    with pytest.raises(Halt):
        simulate(task(), population(), rounds=4, store=halted, seed=3, on_round=after_two)
    run_id = halted.runs()[0].id
    assert halted.run(run_id).status == "failed" and halted.last_version(run_id) == 2
    resumed = go_on(halted, run_id, population())
    assert [r.members for r in whole.history[2:]] == [r.members for r in resumed.history]
    for name, value in whole.model.items():
        np.testing.assert_array_equal(resumed.model[name], value, err_msg=name)


@pytest.mark.parametrize("partial", ["drop", "fednova"])
def test_the_engine_agrees_with_the_readable_loop(partial: Any) -> None:
    ids = ("m0", "m3", "m4")
    rounds = shoal.RoundPolicy(goal=3, minimum_group=3, selection=Selection.exact(ids))
    chosen = task(rounds=rounds, server=shoal.server.sgd())
    chosen = chosen.replace(local=dataclasses.replace(chosen.local, partial=partial))
    fast = simulate(chosen, population(), rounds=3, store=MemoryStore(), seed=1).model
    members = {name: population()[name] for name in ids}
    slow = reference_rounds(chosen, members, [ids] * 3, run_seed=run_seed(1), seed=1)
    for name, value in fast.items():
        np.testing.assert_allclose(value, slow[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_too_few_members_are_said() -> None:
    with pytest.raises(DataError, match="at least 3 members"):
        simulate(task(), population(2), rounds=1, store=MemoryStore())


def test_users_who_cannot_take_part_are_left_out_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    none = {"x": np.zeros((0, 3), np.float32), "y": np.zeros(0, np.int32)}
    users = {f"none-{i}": none for i in range(5)} | {user: examples for user, examples in population(4).items()}
    made = simulate(
        task(), shoal.data.Population.from_arrays(users), rounds=3, store=MemoryStore(), seed=0
    )  # fmt: skip
    assert {member for result in made.history for member in result.members} <= {"m0", "m1", "m2", "m3"}
    assert caplog.messages == ["none-0, none-1, none-2 and 2 more are left out: no examples"]


def test_too_few_who_can_take_part_are_said() -> None:
    small = task(heeds_mask=False, local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=5))
    with pytest.raises(DataError, match=r"at least 3 members .* has 2 who can take part, and 4 who cannot"):
        simulate(small, population(), rounds=1, store=MemoryStore())


def taken_up(other: shoal.data.Population, asked: shoal.Task | None = None) -> None:
    """A run of two rounds that goes on for a third."""
    store = MemoryStore()
    made = simulate(task(), population(), rounds=2, store=store, seed=3)
    go_on(store, made.run_id, other, rounds=3, task=asked)


@pytest.mark.slow
def test_other_data_is_told(caplog: pytest.LogCaptureFixture) -> None:
    taken_up(population(), task())
    assert not caplog.messages, "the same"
    taken_up(population(5), task())
    assert "the data is not what the run began with: 6 users then, 5 now" in caplog.messages[-1]
    others = {user: {**each.fields, "x": each.fields["x"] + 1} for user, each in population().items()}
    taken_up(shoal.data.Population.from_arrays(others), task())
    assert "as many users and examples, but others" in caplog.messages[-1]


def test_settings_that_the_task_has_otherwise_are_told(caplog: pytest.LogCaptureFixture) -> None:
    taken_up(population(), task(server=shoal.server.adam(0.1), rounds=shoal.RoundPolicy(goal=4, minimum_group=3)))
    assert caplog.messages == [
        "the run keeps its own settings: rounds.goal is 3 (the task has 4); server.learning_rate is 0.05 (the task has 0.1)"
    ]


def test_a_task_that_trains_otherwise_is_refused() -> None:
    with pytest.raises(shoal.errors.PlanError, match=r"local training \(optimizer, rates"):
        taken_up(population(), task(local=dataclasses.replace(task().local, optimizer=optax.sgd(0.2))))


@pytest.mark.slow
def test_scaffold_for_another_number_of_devices_is_told(caplog: pytest.LogCaptureFixture) -> None:
    plain = task(server=shoal.server.sgd())
    for devices, word in ((10, "small"), (5, "large")):
        simulate(shoal.scaffold(plain, devices=devices), population(), rounds=1, store=MemoryStore())
        assert f"devices={devices}, and 6 can take part: its corrections are too {word}. Set devices=6" in caplog.text
        caplog.clear()
    simulate(shoal.scaffold(plain, devices=6), population(), rounds=1, store=MemoryStore())
    assert not caplog.messages


def test_losses_near_their_bound_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def far(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
        return loss(params, state, batch, key) + 2e6

    made = simulate(task(loss=far), population(), rounds=2, store=MemoryStore())
    assert made.history[0].metrics["train/loss"] == pytest.approx(1e6), "clipped"
    assert [message for message in caplog.messages if "counts as that in the metric" in message] == caplog.messages
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("train/loss is 1e+06")
