"""A task without JAX: plans whose programs do nothing, a runner that adds up what it is fed, hosts and devices around.

An update holds, for every tensor of the model, the mean of the member's `x` in each element; its weight is the number of
examples. So a test knows what a commit must be.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from shoal.data.store import Examples
from shoal.errors import RoundError
from shoal.fixed import STEPS, SumSpec
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.entrance import Entrance
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.link import Link, LocalLink, Stream
from shoal.fleet.staging import Limits
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest, Program, Promises, Runtime, ServerHalf, Training
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.plan.runner import Update
from shoal.policy import About, Privacy, RoundPolicy, Selection, ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.store import Store
from shoal.tensors import Index, Tensors, TensorSpec, sha256, to_bytes

RUNTIME = Runtime(kind="toy", version=(1, 0, 0))
KEYS = HostKeys(bytes(range(64)))
ONE = {"params/w": (1,)}
BATCH = 4


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes an ordinary test of an asynchronous one."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), timeout=25))

    return run


def exact(*ids: str, **changes: Any) -> RoundPolicy:
    """Rounds of just these devices."""
    return RoundPolicy(**{"goal": len(ids), "minimum_group": 1, "selection": Selection.exact(ids), **changes})


def plan(
    policy: RoundPolicy,
    shapes: Mapping[str, tuple[int, ...]] = ONE,
    *,
    dtype: str = "float32",
    rule: ServerRule | None = None,
    partial: bool = False,
    task: str = "toy",
    field: str = "x",
    privacy: Privacy | None = None,
    max_weight: int = 1 << 20,
) -> Plan:
    model = tuple(TensorSpec(name=name, shape=shape, dtype=dtype) for name, shape in shapes.items())
    deltas = tuple(TensorSpec(name=f"delta/{spec.name}", shape=spec.shape, dtype="float32") for spec in model)
    if partial:
        deltas = (*deltas, TensorSpec(name=STEPS, shape=(), dtype="float32"))
    half = ServerHalf(rounds=policy, rule=rule or ServerRule(), about=About())
    batch = (TensorSpec(name=field, shape=(), dtype="float32"),)
    programs = _programs(model, deltas, field, key_words=(privacy or Privacy()).key_words)
    manifest = Manifest(
        task=task,
        programs=tuple(programs),
        broadcast=model,
        device_state=(),
        sums=tuple(SumSpec(tensor=spec, bound=256.0 if privacy is None else privacy.delta_bound, weighted=True) for spec in deltas),
        metrics=(),
        batch=batch,
        training=Training(
            batch_size=BATCH, steps_per_block=1, epochs=1, max_examples=1024, max_weight=max_weight, whole_batches=False,
            drop_remainder=False, evaluate_batch_size=BATCH,
        ),
        promises=Promises.of(privacy or Privacy(), minimum_group=policy.minimum_group),
        server_hash=sha256(half.data),
        half=half,
    )  # fmt: skip
    return Plan(manifest, {program.hash: program.name.encode() for program in programs}).sign(KEYS.signing)


def _programs(
    model: tuple[TensorSpec, ...], deltas: tuple[TensorSpec, ...], field: str, *, key_words: int
) -> list[Program]:
    def renamed(prefix: str, specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=prefix + s.name, shape=s.shape, dtype=s.dtype) for s in specs)

    feed = (
        TensorSpec(name=f"batch/{field}", shape=(1, BATCH), dtype="float32"),
        TensorSpec(name="mask", shape=(1, BATCH), dtype="bool"),
        TensorSpec(name="key", shape=(key_words,), dtype="uint32"),
    )
    report = sorted(
        (*renamed("sum/", deltas), TensorSpec(name="weight", shape=(), dtype="int32")), key=lambda s: s.name
    )
    given = renamed("broadcast/", model)
    signatures: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = {
        "begin": (given, ()),
        "block": (feed, ()),
        "finish": (given, tuple(report)),
    }
    return [
        Program(
            name=name, needs=RUNTIME, inputs=inputs, outputs=outputs, hash=sha256(name.encode()), size_bytes=len(name)
        )
        for name, (inputs, outputs) in signatures.items()
    ]


class ToyRunner:
    """A `Runner` of such plans."""

    runtime, pid = RUNTIME, None

    def __init__(self, plan: Plan) -> None:
        self.manifest = plan.manifest
        self.models: dict[str, Tensors] = {}
        self.values: list[float] = []
        self.steps = 0

    def compile(self) -> float:
        return 0.0

    def set_model(self, root: str, tensors: Tensors) -> None:
        self.models = {root: tensors}

    def has_model(self, root: str) -> bool:
        return root in self.models

    def begin(self, root: str, device_state: Tensors) -> None:
        self.values, self.steps = [], 0

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        self.values += next(iter(batches.values()))[mask].tolist()
        self.steps += 1

    def carry(self) -> Tensors:
        return {"carry/values": np.array(self.values), "carry/steps": np.array(self.steps)}

    def resume(self, root: str, carry: Tensors) -> None:
        self.values, self.steps = carry["carry/values"].tolist(), int(carry["carry/steps"])

    def finish(self) -> Update:
        mean = float(np.mean(self.values))
        sums = {s.name: np.full(s.shape, mean, s.numpy_dtype) for s in self.manifest.update}
        if STEPS in sums:
            sums[STEPS] = np.array(self.steps, np.float32)
        return Update(sums, len(self.values), {}, {"compute": 0.0})

    def evaluate(self, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        raise NotImplementedError

    def predict(self, root: str, batch: Tensors, mask: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def call(self, program: str, inputs: Tensors) -> Tensors:
        raise NotImplementedError

    def close(self) -> None:
        self.models.clear()


class RandomRunner(ToyRunner):
    """Its updates take on the wire what they take in memory."""

    def finish(self) -> Update:
        rng, update = np.random.default_rng(0), super().finish()
        for name, value in update.sums.items():
            if name.startswith("delta/"):
                update.sums[name] = rng.normal(size=value.shape).clip(-3, 3).astype(value.dtype)
        return update


def examples(value: float = 1.0, num: int = 3) -> Examples:
    return Examples({"x": np.full(num, value, np.float32)})


def device(
    name: str,
    link: Link,
    *,
    value: float = 1.0,
    host: DeviceHost | None = None,
    runner: Any = ToyRunner,
    stays: bool = True,
    num: int = 3,
) -> Device:
    """A device whose update is `value` in every element, of weight `num`."""
    return Device(
        name,
        lambda: examples(value, num),
        link=link,
        host=host or device_host(runner),
        rng=np.random.default_rng(0),
        stays=stays,
    )


def device_host(runner: Callable[[Plan], Any] = ToyRunner) -> DeviceHost:
    return DeviceHost(make_runner=runner, runtime=RUNTIME)


@dataclass
class Fleet:
    """A host with its run, and what runs around it."""

    store: Store
    host: Host
    tasks: list["asyncio.Task[Any]"] = field(default_factory=list)

    @property
    def link(self) -> LocalLink:
        return LocalLink(self.host.edge)

    def start(self, *devices: Device) -> None:
        self.tasks += [asyncio.create_task(device.run()) for device in devices]

    @property
    def model(self) -> dict[str, np.ndarray]:
        commit = self.store.last_commit(self.host.run_id)
        assert commit is not None
        return {entry.spec.name: self.store.blobs.view(entry.hash, entry.spec) for entry in commit.model}

    @property
    def members(self) -> list[int]:
        return [commit.members for commit in self.store.commits(self.host.run_id)]


@asynccontextmanager
async def fleet(
    made: Plan,
    *,
    rounds: int = 1,
    store: Store | None = None,
    limits: Limits | None = None,
    events_kept: int = 100,
    config: Mapping[str, Any] | None = None,
    entrance: Entrance | None = None,
    population: str = "default",
) -> AsyncIterator[Fleet]:
    """A running host in this process; `tasks[0]` ends with its last version."""
    store = store or MemoryStore()
    model = {s.name: np.zeros(s.shape, s.numpy_dtype) for s in made.manifest.broadcast}
    kept = {"events_kept": events_kept, **(config or {})}
    run_id = begin_run(store, made, model, kind="host", rounds=rounds, seed=0, config=kept, population=population)
    host = Host(store, run_id, KEYS, limits=limits, rng=np.random.default_rng(0), entrance=entrance)
    running = Fleet(store, host)
    running.tasks.append(asyncio.create_task(host.run()))
    try:
        yield running
    finally:
        await host.edge.close()
        for task in running.tasks:
            task.cancel()
        await asyncio.gather(*running.tasks, return_exceptions=True)


def fail_once(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Lets the host's next commit fail for a reason of its own."""
    write = host.coordinator._write_commit

    def failing(*args: Any) -> Any:
        monkeypatch.setattr(host.coordinator, "_write_commit", write)
        raise RoundError("it fails, once")

    monkeypatch.setattr(host.coordinator, "_write_commit", failing)


class Peer:
    """One who speaks the protocol by hand."""

    def __init__(self, stream: Stream, name: str = "peer") -> None:
        self.stream, self.name = stream, name

    async def say(self, **kind: Any) -> None:
        await self.stream.send(pb.FromDevice(**kind))

    async def hear(self) -> tuple[str, Any]:
        """The next message: its kind and itself."""
        message = await asyncio.wait_for(self.stream.receive(), timeout=10)
        kind = message.WhichOneof("kind")
        assert kind is not None
        return kind, getattr(message, kind)

    async def check_in(self, **changes: Any) -> None:
        runtime = pb.RuntimeInfo(kind=RUNTIME.kind, version=RUNTIME.version, calling_convention=9, platforms=["cpu"])
        await self.say(check_in=pb.CheckIn(**{"device_id": self.name, "runtime": runtime, **changes}))

    async def assigned(self) -> pb.Assigned:
        """Checks in and waits for the assignment."""
        await self.check_in()
        kind, message = await self.hear()
        assert kind == "assigned", (kind, message)
        return message  # type: ignore[no-any-return]


@asynccontextmanager
async def peer(link: Link, name: str = "peer") -> AsyncIterator[Peer]:
    async with link.session() as stream:
        yield Peer(stream, name)


def update(made: Plan, value: float = 1.0, **tensors: np.ndarray) -> Tensors:
    """An update of the plan's tensors; some may be given."""
    return {s.name: tensors.get(s.name, np.full(s.shape, value, s.numpy_dtype)) for s in made.manifest.update}


def report(token: pb.Token, sums: Tensors, *, inline: bool = True, **changes: Any) -> pb.Report:
    """The report of an update, of weight 3."""
    made = pb.Report(**{"token": token, "root": Index.of(sums).root, "weight": 3, **changes})
    if inline and "slices" not in changes:
        made.slices.extend(pb.PushSlice(tensor=name, data=to_bytes(value)) for name, value in sums.items())
    return made
