"""Parameter servers: what they decide, what they compute, and that no order, slice or number of servers changes a bit of it."""

import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shoal
from shoal.errors import DeadlineExceeded, NetworkError, ProtocolError, StoreError
from shoal.local import named
from shoal.pod import Trainer, Version, Watch
from shoal.pod.servers.checkpoints import Parts
from shoal.pod.servers.clocks import Clocks, Update
from shoal.pod.servers.exchange import Exchange, whole
from shoal.pod.servers.lines import PULL, Frame, Line
from shoal.pod.servers.packing import Packing
from shoal.pod.servers.server import Server, Serving
from shoal.pod.servers.trainer import ServerTrainer
from shoal.pod.servers.updates import Updates

WIDTHS = (6, 16, 16, 3)


def init(key: Any) -> Any:
    return {
        f"layer{n}": {"kernel": jax.random.normal(jax.random.fold_in(key, n), pair) * 0.3, "bias": jnp.zeros(pair[1])}
        for n, pair in enumerate(pairwise(WIDTHS))
    }


def scores(params: Any, x: Any) -> Any:
    for n in range(3):
        x = x @ params[f"layer{n}"]["kernel"] + params[f"layer{n}"]["bias"][None]
        x = jnp.tanh(x) if n < 2 else x
    return x


def task(optimizer: Any = None) -> shoal.Task:
    return shoal.Task(
        name="small", init=init, batch={"x": ((6,), "float32"), "y": ((), "int32")},
        loss=lambda params, state, batch, key: optax.softmax_cross_entropy_with_integer_labels(scores(params, batch["x"]), batch["y"]),
        evaluate=lambda params, state, batch: {"right": shoal.Sum((jnp.argmax(scores(params, batch["x"]), 1) == batch["y"]).astype(jnp.float32), jnp.ones(batch["y"].shape[0]), (0.0, 1.0))},
        local=shoal.Local(optimizer=optimizer or optax.adam(1e-2), batch_size=8),
    )  # fmt: skip


def examples(num: int = 44) -> shoal.data.Examples:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, 6)).astype(np.float32)
    return shoal.data.Examples({"x": x, "y": (x[:, 0] > 0).astype(np.int32) + (x[:, 1] > 0).astype(np.int32)})


def trained(steps: int = 7, **how: Any) -> dict[str, np.ndarray]:
    given = {"workers": 2, "servers": 1, "order": "layer", **how}
    made = ServerTrainer(task(), joined_bytes=100, **given).train(examples(), steps=steps, commit_every=4, seed=3)
    return {name: np.asarray(value) for name, value in made["params"].items()}


class TestClocks:
    def test_synchronous_waits_for_all_and_adds_up_in_their_order(self) -> None:
        clocks = Clocks((0,), 3, staleness=0)
        assert clocks.pushed(2, 0, 0) is None
        assert clocks.pushed(0, 0, 0) is None
        assert clocks.pushed(1, 0, 0) == Update(0, (0, 1, 2))
        assert not clocks.may_have(1, 0, 1, 1)
        clocks.updated(Update(0, (0, 1, 2)))
        assert clocks.may_have(1, 0, 1, 1)
        assert not clocks.may_have(1, 0, 2, 2)

    def test_a_gradient_out_of_turn_is_refused(self) -> None:
        clocks = Clocks((0,), 1, staleness=0)
        with pytest.raises(ProtocolError, match="for step 0, got one for 1"):
            clocks.pushed(0, 0, 1)
        with pytest.raises(ProtocolError, match="of this server"):
            clocks.pushed(0, 5, 0)

    @given(st.integers(1, 4), st.integers(1, 3), st.data())
    @settings(max_examples=100, deadline=None)
    def test_nobody_is_further_ahead_than_allowed(self, num_workers: int, staleness: int, data: Any) -> None:
        clocks, at = Clocks((0,), num_workers, staleness=staleness), [0] * num_workers
        for _ in range(30):
            allowed = [worker for worker in range(num_workers) if clocks.may_have(worker, 0, at[worker], at[worker])]
            assert allowed  # the slowest may always go on
            worker = data.draw(st.sampled_from(allowed))
            assert clocks.pushed(worker, 0, at[worker]) == Update(0, (worker,))
            at[worker] += 1
            assert not clocks.may_have(worker, 0, at[worker], at[worker])  # its own gradient is not in it yet
            clocks.updated(Update(0, (worker,)))
            assert max(at) - min(at) <= staleness + 1
        assert clocks.done(0) == sum(at) // num_workers

    def test_a_worker_reads_what_it_wrote(self) -> None:
        clocks = Clocks((0,), 2, staleness=None)
        assert clocks.pushed(0, 0, 0) == Update(0, (0,))
        assert not clocks.may_have(0, 0, 1, 1)
        assert clocks.may_have(1, 0, 0, 0)
        clocks.updated(Update(0, (0,)))
        assert clocks.may_have(0, 0, 1, 1)
        assert not clocks.may_have(1, 0, 1, 1)

    def test_who_asks_ahead_is_given_what_was_before_the_last_update(self) -> None:
        clocks = Clocks((0,), 1, staleness=0)
        clocks.pushed(0, 0, 0)
        assert clocks.may_have(0, 0, 1, 0)
        assert clocks.back(0, 0) == 0
        clocks.updated(Update(0, (0,)))
        assert clocks.may_have(0, 0, 1, 0)
        assert clocks.back(0, 0) == 1  # synchronous: neither less nor more than it asked for
        assert clocks.back(0, 1) == 0
        assert not clocks.may_have(0, 0, 2, 2)

    def test_what_is_asked_for_the_last_step_is_what_came_of_all(self) -> None:
        clocks = Clocks((0,), 2, staleness=None, last_step=1)
        clocks.pushed(0, 0, 0)
        clocks.updated(Update(0, (0,)))
        assert not clocks.may_have(0, 0, 1, 1)
        clocks.pushed(1, 0, 0)
        clocks.updated(Update(0, (1,)))
        assert clocks.may_have(0, 0, 1, 1)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1),
    "lamb": optax.lamb(0.1),
    "masked decay": optax.adamw(0.1, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_by_transfer_are_the_update(name: str) -> None:
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (4,), "c": (2, 2)}
    params = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}
    members = (("a", "b"), ("c",))
    optimizer = OPTIMIZERS[name]
    updates, opt = Updates(optimizer, params, members), optimizer.init(params)
    parts, wanted = updates.begin(params), dict(params)
    mine = dict(params)
    for _ in range(3):
        gradients = {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}
        with jax.numpy_dtype_promotion("standard"):
            step, opt = optimizer.update(gradients, opt, wanted)
        wanted = optax.apply_updates(wanted, step)
        for transfer in (1, 0):
            reached, parts[transfer] = updates.updated(transfer, gradients, mine, parts[transfer])
            mine |= reached
    for n in shapes:
        np.testing.assert_allclose(mine[n], wanted[n], rtol=2e-6, atol=1e-7)


def test_an_optimizer_that_looks_at_all_gradients_is_refused() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match="looks at one tensor at a time"):
        Updates(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), params, (("a",), ("b",)))


def test_packing_and_back() -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(7, np.int32)}
    packing = Packing(("b", "a"), tensors)
    data = packing.packed(tensors)
    assert data.ctypes.data % 64 == 0
    assert packing.size_bytes == 28
    for name, value in packing.unpacked(data).items():
        np.testing.assert_array_equal(value, tensors[name])


def test_it_is_the_training_of_a_mesh() -> None:
    mesh = Trainer(task(), mesh="data=2", devices=jax.devices()[:2])
    wanted = mesh.whole(mesh.train(examples(), steps=7, commit_every=7, seed=3))
    for name, value in trained(servers=2).items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"servers": 2, "order": "random"},
        {"order": "auto", "slice_bytes": 64, "credit_bytes": 64},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"order": "tree"},
                {"order": "tic"},
                {"order": "tac"},
                {"has_barrier": True},
                {"slice_bytes": 1 << 20, "credit_bytes": 100},
            )
        ),
    ],
    ids=str,
)
def test_no_order_changes_a_bit(how: Any) -> None:
    wanted = trained()
    for name, value in trained(**how).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_no_order_changes_a_bit_of_a_tensor_that_travels_in_pieces() -> None:
    whole, wanted = trained(), trained(piece_bytes=50)
    for name, value in trained(piece_bytes=50, servers=3, order="random").items():
        np.testing.assert_array_equal(value, wanted[name])
        np.testing.assert_allclose(value, whole[name], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "how", [{"workers": 1}, {"workers": 2}, {"order": "tac"}, {"servers": 2, "order": "random", "slice_bytes": 64, "credit_bytes": 64}], ids=str
)  # fmt: skip
def test_ahead_each_gradient_is_of_the_parameters_before_the_last_update(how: Any) -> None:
    data, tune = examples(), optax.sgd(0.5, momentum=0.9)
    trainer = ServerTrainer(task(tune), joined_bytes=100, ahead=True, **{"workers": 2, "order": "layer"} | how)
    made = trainer.train(data, steps=11, commit_every=4, checkpoint_every=6, seed=3)["params"]
    params = trainer.task.variables(jax.random.key(3)).params
    before, opt, batches = params, tune.init(params), trainer.order(len(data), seed=3).steps(0)

    def loss(params: Any, rows: np.ndarray, mask: np.ndarray) -> Any:
        batch = {name: values[rows] for name, values in data.fields.items()}
        return jnp.where(mask, task().loss(params, {}, batch, None), 0.0).sum() / float(mask.sum())

    for step in range(11):
        used = params if step % 4 == 0 or step % 6 == 0 else before
        gradients = jax.grad(loss)(used, *next(batches))
        with jax.numpy_dtype_promotion("standard"):
            change, opt = tune.update(gradients, opt)
        before, params = params, optax.apply_updates(params, change)
    wanted = named(params, "params")
    for name, value in made.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["layer", "auto"])
def test_ahead_a_run_goes_on_as_it_would_have_done_and_stops_with_all_its_updates(order: Any, tmp_path: Path) -> None:
    def run(steps: int, stop_at: int | None = None, folder: Path | None = None) -> Any:
        trainer = ServerTrainer(task(), workers=1, order=order, joined_bytes=100, ahead=True)
        watch = Watch(should_stop=lambda step: step == stop_at)
        return trainer.train(examples(), steps=steps, commit_every=4, seed=3, folder=folder, watch=watch)

    run(8, folder=tmp_path)
    again, wanted = run(14, folder=tmp_path), run(14)
    stopped = run(14, stop_at=7)
    assert stopped["step"] == 7
    shorter = run(7)
    for name in wanted["params"]:
        np.testing.assert_array_equal(again["params"][name], wanted["params"][name])
        np.testing.assert_array_equal(stopped["params"][name], shorter["params"][name])
    with pytest.raises(StoreError, match="ahead"):
        ServerTrainer(task(), workers=1, joined_bytes=100).train(
            examples(), steps=14, commit_every=4, seed=3, folder=tmp_path
        )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("staleness", [1, None])
def test_those_who_do_not_wait_learn_too(staleness: int | None, ahead: bool) -> None:
    found: list[Version] = []
    trainer = ServerTrainer(
        task(), workers=2, servers=1, staleness=staleness, ahead=ahead, order="layer", joined_bytes=100
    )
    watch = Watch(on_version=found.append)
    trainer.train(examples(200), steps=60, commit_every=60, seed=0, held_out=examples(200), watch=watch)
    assert found[-1].metrics["right"] > 0.8


def stacked(optimizer: Any) -> shoal.Task:
    def through(params: Any, x: Any) -> Any:
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, params["layers"])
        return x @ params["out"]

    return shoal.Task(
        name="stacked", init=lambda key: {"layers": jax.random.normal(key, (4, 6, 6)), "out": jax.random.normal(key, (6, 3))}, batch=task().batch,
        loss=lambda params, state, batch, key: optax.softmax_cross_entropy_with_integer_labels(through(params, batch["x"]), batch["y"]),
        local=shoal.Local(optimizer=optimizer, batch_size=8),
    )  # fmt: skip


ONE_BY_ONE = {
    "adamw": (optax.adamw(1e-2, mask=lambda params: jax.tree.map(lambda p: p.ndim > 2, params)), 5),
    "lamb": (optax.lamb(1e-2), 2),
    "mask by name": (optax.adamw(1e-2, weight_decay=0.5, mask=lambda params: {n: n.endswith("layers") for n in params}), 2),
    "mask by size": (optax.adamw(1e-2, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.size > 36, params)), 2),
}  # fmt: skip


@pytest.mark.parametrize(("optimizer", "num"), ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_stacked_layers_travel_one_by_one_where_updates_are_of_elements(optimizer: Any, num: int, tmp_path: Path) -> None:  # fmt: skip
    mesh = Trainer(stacked(optimizer), mesh="data=2", devices=jax.devices()[:2])
    wanted = mesh.whole(mesh.train(examples(), steps=7, commit_every=7, seed=3))
    found: list[Version] = []
    for steps in (4, 7):  # goes on from a checkpoint
        trainer = ServerTrainer(stacked(optimizer), workers=2, servers=2, order="layer", joined_bytes=70)
        made = trainer.train(examples(), steps=steps, commit_every=4, seed=3, folder=tmp_path, watch=Watch(on_version=found.append))["params"]  # fmt: skip
    assert len(trainer.step.staged.graph.transfers) == num
    assert set(made) == set(found[-1].model) == set(wanted)
    for name, value in made.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-4, atol=2e-5)


def test_versions_are_told() -> None:
    found: list[Version] = []
    trainer = ServerTrainer(task(), workers=2, order="layer", joined_bytes=100)
    trainer.train(examples(), steps=6, commit_every=4, held_out=examples(), watch=Watch(on_version=found.append))
    assert [(version.version, version.step) for version in found] == [(1, 4), (2, 6)]
    assert found[0].metrics["right"] > 0
    assert found[0].training["loss"] > 0
    assert set(found[0].model) == {f"params/layer{n}/{kind}" for n in range(3) for kind in ("kernel", "bias")}


def test_servers_share_a_large_tensor() -> None:
    def shares(optimizer: Any) -> list[int]:
        big = task().replace(local=shoal.Local(optimizer=optimizer, batch_size=8))
        trainer = ServerTrainer(big, servers=2, joined_bytes=20, piece_bytes=50)
        sizes = [packing.size_bytes for packing in trainer.packings]
        return [sum(size for size, owner in zip(sizes, trainer.owners, strict=True) if owner == n) for n in range(2)]

    assert abs(np.subtract(*shares(optax.adam(1e-3)))) < 100
    assert len(set(shares(optax.adafactor(1e-3)))) == 2


def test_it_goes_on_from_a_checkpoint_with_another_number_of_servers(tmp_path: Path) -> None:
    def run(steps: int, servers: int) -> Any:
        trainer = ServerTrainer(task(), workers=2, servers=servers, order="layer", joined_bytes=100)
        return trainer.train(examples(), steps=steps, commit_every=3, seed=3, folder=tmp_path)["params"]

    run(3, 2)
    again = run(7, 1)
    wanted = trained(steps=7)
    for name, value in again.items():
        np.testing.assert_array_equal(value, wanted[name])
    with pytest.raises(StoreError, match="seed"):
        ServerTrainer(task(), workers=2, order="layer", joined_bytes=100).train(
            examples(), steps=9, commit_every=3, seed=4, folder=tmp_path
        )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 3}, "share evenly"),
        ({"servers": 9}, "as many servers as tensors"),
        ({"staleness": -1}, "staleness of 0"),
    ],
)
def test_bad_settings_have_one_clear_error(how: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerTrainer(task(), joined_bytes=100, **how).train(examples(), steps=1, commit_every=1)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_not_held_any_more_ends_the_line(ahead: bool) -> None:
    params = {"a": np.zeros(3, np.float32)}
    updates, packing = Updates(optax.sgd(1.0), params, (("a",),)), Packing(("a",), params)
    serving = Serving(num_workers=1, ahead=ahead)
    with Server(updates, params, dict(enumerate(updates.begin(params))), {0: packing}, serving, secret=b"s") as server:
        exchange = Exchange([("127.0.0.1", server.port)], b"s", worker=0, packings=[packing], owners=[0])
        for step in range(2):
            exchange.push(0, step, {"a": jnp.ones(3)}, 0)
        exchange.flushed()
        exchange.pull(2, np.zeros(1, np.int64))
        np.testing.assert_array_equal(whole(exchange)["a"], np.full(3, -2.0))
        exchange.pull(2, np.zeros(1, np.int64), updates=1)
        if ahead:
            np.testing.assert_array_equal(whole(exchange)["a"], np.full(3, -1.0))
            exchange.pull(1, np.zeros(1, np.int64), updates=0)
        with pytest.raises(NetworkError, match="gone"):
            whole(exchange)
        exchange.close()


class TestLines:
    def pair(self, secret: bytes, other: bytes) -> tuple[Any, Any]:
        listening = socket.create_server(("127.0.0.1", 0))
        found: list[Any] = []

        def accept() -> None:
            made, _ = listening.accept()
            try:
                found.append(Line.accepted(made, secret, silence_s=1.0))
            except ProtocolError as error:
                found.append(error)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            port = listening.getsockname()[1]
            dialled: Any = Line.dialled("127.0.0.1", port, other, role="up", worker=3, silence_s=1.0)
        except (ProtocolError, NetworkError) as error:
            dialled = error
        thread.join()
        listening.close()
        return dialled, found[0]

    def test_frames_go_over(self) -> None:
        dialled, (accepted, role, worker) = self.pair(b"secret", b"secret")
        assert (role, worker) == ("up", 3)
        dialled.send(Frame(PULL, 1, 2, 3), b"abc")
        frame = accepted.receive()
        assert frame == Frame(PULL, 1, 2, 3, 3)
        place = bytearray(3)
        accepted.read_into(memoryview(place))
        assert bytes(place) == b"abc"
        dialled.close()
        with pytest.raises(NetworkError, match="gone"):
            accepted.receive()
        accepted.close()

    def test_who_does_not_know_the_secret_is_not_heard(self) -> None:
        dialled, accepted = self.pair(b"secret", b"another")
        assert isinstance(accepted, ProtocolError)
        assert isinstance(dialled, NetworkError | ProtocolError)

    def test_one_that_is_slow_is_heard(self) -> None:
        dialled, (accepted, *_) = self.pair(b"secret", b"secret")
        place = bytearray(16 << 10)

        def send() -> None:
            for _ in range(8):
                time.sleep(0.3)
                dialled._socket.sendall(bytes([7]) * (2 << 10))

        thread = threading.Thread(target=send)
        thread.start()
        accepted.read_into(memoryview(place))  # whoever reads waits for no more than a part of it without being told
        thread.join()
        assert bytes(place) == bytes([7]) * (16 << 10)
        for line in (dialled, accepted):
            line.close()

    def test_a_frame_that_is_none_is_refused(self) -> None:
        dialled, (accepted, *_) = self.pair(b"secret", b"secret")
        dialled._socket.sendall(bytes([9]) + bytes(27))
        with pytest.raises(ProtocolError, match="kind 9"):
            accepted.receive()
        for line in (dialled, accepted):
            line.close()

    def test_one_that_stops_in_the_middle_of_a_frame_is_given_up(self) -> None:
        dialled, (accepted, *_) = self.pair(b"secret", b"secret")
        dialled._socket.sendall(bytes([1]) + bytes(5))
        with pytest.raises(DeadlineExceeded, match="did nothing for 1 s"):
            accepted.receive()
        for line in (dialled, accepted):
            line.close()


def test_a_checkpoint_is_of_one_writing_and_old_ones_go(tmp_path: Path) -> None:
    parts, about = Parts(tmp_path), {"seed": 0}
    one, two = np.ones(1, np.float32), np.full(1, 2, np.float32)
    parts.write(10, 0, 2, {"a": one}, {}, about)  # its other server was killed, and the next life has one
    parts.write(20, 1, 2, {"b": one}, {}, about)
    assert parts.latest() is None
    parts.write(10, 0, 1, {"a": two, "b": two}, {0: two}, about)
    params, opt = parts.read(10, about)
    assert [float(value[0]) for value in (params["a"], params["b"], opt[0])] == [2, 2, 2]
    for step in (30, 40, 50):
        parts.write(step, 0, 1, {"a": one, "b": one}, {}, about)
    assert sorted(int(place.name) for place in tmp_path.iterdir()) == [40, 50]
