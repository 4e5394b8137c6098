"""The runner in a child process: the same results, and whatever happens in it stays in it."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from shoal.errors import PlanError, ProgramError, ShoalError
from shoal.plan.build import Built, build
from shoal.plan.child import ChildRunner, child_command, probe
from shoal.plan.child_process import Child, environment_for
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.runner import Limits, Runner, Update
from shoal.tensors import Tensors
from tests.plan.plan_tasks import artifact, evaluate_feed, feed, replaced, tiny_task, with_function, zero_state

pytestmark = pytest.mark.timeout(120)
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def runner(noisy: Built) -> Iterator[ChildRunner]:
    """One child for all tests that leave it in order."""
    with ChildRunner(noisy.plan, threads=1) as made:
        yield made


def train(runner: Runner, built: Built, *, blocks: int = 2) -> Update:
    runner.set_model("a" * 64, built.model)
    runner.begin("a" * 64, zero_state(built.plan.manifest))
    rng = np.random.default_rng(0)
    for _ in range(blocks):
        runner.block(*feed(rng))
    return runner.finish()


def assert_same(one: Tensors, other: Tensors, *, rtol: float = 0.0) -> None:
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.slow
def test_it_agrees_with_the_runner_in_process(noisy: Built, runner: ChildRunner) -> None:
    here, there = train(JaxRunner(noisy.plan), noisy), train(runner, noisy)
    # Not bit for bit: the test's own JAX has eight devices.
    assert_same(here.sums, there.sums, rtol=1e-6)
    assert_same(here.device_state, there.device_state, rtol=1e-6)
    assert (here.weight, here.padding) == (there.weight, there.padding) == (16, 0.0)
    assert there.device_state["rounds"] == 1 and there.seconds["compute"] > 0


@pytest.mark.slow
def test_two_runs_are_bit_identical(noisy: Built, runner: ChildRunner) -> None:
    assert_same(train(runner, noisy).sums, train(runner, noisy).sums)


@pytest.mark.slow
def test_evaluate_predict_and_call(noisy: Built, runner: ChildRunner, rng: np.random.Generator) -> None:
    size = noisy.plan.manifest.training.evaluate_batch_size
    batch, mask = evaluate_feed(rng, size)
    here = JaxRunner(noisy.plan)
    for each in (here, runner):
        each.set_model("b" * 64, noisy.model)
    assert_same(here.evaluate("b" * 64, batch, mask), runner.evaluate("b" * 64, batch, mask), rtol=1e-5)
    expected = batch["x"] @ noisy.model["params/w"] + noisy.model["params/b"]
    np.testing.assert_allclose(runner.predict("b" * 64, batch, mask), expected, rtol=1e-5, atol=1e-6)
    inputs = {f"broadcast/{name}": value for name, value in noisy.model.items()}
    inputs |= {f"device_state/{name}": value for name, value in zero_state(noisy.plan.manifest).items()}
    assert_same(here.call("begin", inputs), runner.call("begin", inputs))


@pytest.mark.slow
def test_it_is_a_runner_and_says_what_it_runs(runner: ChildRunner) -> None:
    assert isinstance(runner, Runner)
    assert runner.runtime.kind == "stablehlo" and runner.runtime.platforms == ("cpu",)
    assert probe(threads=1) == runner.runtime


@pytest.mark.slow
def test_only_the_last_two_models_are_held(noisy: Built, runner: ChildRunner) -> None:
    for root in ("1", "2", "3"):
        runner.set_model(root, noisy.model)
    assert [runner.has_model(root) for root in ("1", "2", "3")] == [False, True, True]


@pytest.mark.slow
def test_wrong_calls_are_refused_and_it_goes_on(noisy: Built, runner: ChildRunner) -> None:
    pid = runner.pid
    with pytest.raises(ProgramError, match="before begin"):
        runner.finish()
    with pytest.raises(ProgramError, match="is not held"):
        runner.begin("nobody", zero_state(noisy.plan.manifest))
    with pytest.raises(ValueError, match="the model"):
        runner.set_model("x", {})
    with pytest.raises(PlanError, match="no program"):
        runner.call("other", {})
    runner.set_model("c", noisy.model)
    runner.begin("c", zero_state(noisy.plan.manifest))
    batches, mask, key = feed(np.random.default_rng(0))
    runner.block({"x": batches["x"]}, mask, key)  # it fails behind the call
    with pytest.raises(ProgramError, match=r"Expected batch/y to be int32\[2, 4\], got nothing"):
        runner.finish()
    runner.begin("c", zero_state(noisy.plan.manifest))
    runner.block(batches, mask[:1], key)
    runner.begin("c", zero_state(noisy.plan.manifest))  # what was given up fails nobody
    runner.block(batches, mask, key)
    assert runner.finish().weight == 8 and runner.pid == pid


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_crash_is_a_program_error_and_the_next_call_starts_another(noisy: Built, runner: ChildRunner) -> None:
    runner.set_model("d", noisy.model)
    runner.begin("d", zero_state(noisy.plan.manifest))
    pid = runner.pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    psutil.wait_procs([psutil.Process(pid)], timeout=5) if psutil.pid_exists(pid) else None
    with pytest.raises(ProgramError, match=r"The process that runs task 'noisy'.*hand the model over again") as caught:
        runner.block(*feed(np.random.default_rng(0)))
        runner.finish()
    assert "\n" not in str(caught.value)
    assert not runner.has_model("d")
    with pytest.raises(ProgramError, match="is not held"):
        runner.begin("d", zero_state(noisy.plan.manifest))
    assert train(runner, noisy).weight == 16 and runner.pid != pid


@pytest.mark.slow
def test_one_call_at_a_time_from_many_threads(noisy: Built, runner: ChildRunner, rng: np.random.Generator) -> None:
    runner.set_model("e", noisy.model)
    batch, mask = evaluate_feed(rng, noisy.plan.manifest.training.evaluate_batch_size)
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(runner.predict("e", batch, mask))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(np.array_equal(results[0], result) for result in results)


def test_a_plan_that_asks_for_too_much_starts_nothing(noisy: Built) -> None:
    with pytest.raises(PlanError, match="asks for"):
        ChildRunner(noisy.plan, Limits(memory_bytes=1000))


def test_closing_twice_and_calling_after_it(noisy: Built) -> None:
    runner = ChildRunner(noisy.plan)
    runner.close()
    runner.close()
    assert runner.pid is None and not runner.has_model("a")
    with pytest.raises(ProgramError, match="closed"):
        runner.compile()


def test_an_interpreter_that_cannot_is_said_to(noisy: Built) -> None:
    with pytest.raises(ProgramError, match="could not be started"):
        ChildRunner(noisy.plan, python="/nowhere/python").compile()


def test_no_secret_reaches_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "SHOAL_API_KEY", "XLA_PASSWORD", "EDITOR"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("XLA_FLAGS", "")
    kept = environment_for(python_path="", threads=2)
    assert "hush" not in kept.values() and kept["NPROC"] == "2"
    assert {"PATH", "XLA_FLAGS", "JAX_PLATFORMS"} <= set(kept)


def block_of(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A block program that gives the carry back, with the weight changed."""

    def block(given: Any) -> Any:
        carry = {name: value for name, value in given.items() if name.startswith("carry/")}
        return carry | {"carry/params/w": change(given["carry/params/w"])}

    return block


def endless(w: Any) -> Any:
    return jax.lax.while_loop(lambda v: jnp.any(v < 1e30), lambda v: jnp.minimum(v * 0.5 + 1.0, 5.0), w)


def enormous(w: Any) -> Any:
    column = jnp.broadcast_to(w.reshape(-1)[:1], (1 << 19,)) + jnp.arange(1 << 19, dtype=jnp.float32)
    return w + jnp.sort(column[:, None] * column[None, :], axis=0)[5, 7]


@pytest.mark.slow
def test_the_deadline_ends_a_program_that_does_not(tiny: Built) -> None:
    plan = with_function(tiny, "block", block_of(endless))
    with ChildRunner(plan, Limits(seconds=4.0), threads=1) as runner:
        start = time.monotonic()
        with pytest.raises(ProgramError, match="took longer than 4 s"):
            train(runner, tiny)
        assert time.monotonic() - start < 30 and runner.pid is None
        assert runner.compile() > 0  # a fresh one


@pytest.mark.slow
def test_closing_does_not_wait_for_a_call(tiny: Built) -> None:
    runner = ChildRunner(with_function(tiny, "block", block_of(endless)), threads=1)
    failures: list[Exception] = []

    def work() -> None:
        try:
            train(runner, tiny)
        except ProgramError as error:
            failures.append(error)

    runner.compile()
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    runner.close()
    thread.join(timeout=10)
    assert (not thread.is_alive() and "stopped" in str(failures[0])) or "closed" in str(failures[0])


@pytest.mark.slow
def test_a_tebibyte_inside_a_program_is_a_program_error(tiny: Built) -> None:
    plan = with_function(tiny, "block", block_of(enormous))
    with ChildRunner(plan, Limits(memory_bytes=1 << 30, seconds=60.0), threads=1) as runner:
        with pytest.raises(ProgramError) as caught:
            train(runner, tiny)
        assert "\n" not in str(caught.value)
        assert runner.compile() > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="where the system limits memory")
def test_memory_is_limited_not_only_the_impossible(tiny: Built) -> None:
    def large(w: Any) -> Any:  # 4 GiB, which this machine may well have
        column = jnp.broadcast_to(w.reshape(-1)[:1], (1 << 15,)) + jnp.arange(1 << 15, dtype=jnp.float32)
        return w + jnp.sort(column[:, None] * column[None, :], axis=0)[5, 7]

    plan = with_function(tiny, "block", block_of(large))
    with ChildRunner(plan, Limits(memory_bytes=1 << 30, seconds=60.0), threads=1) as runner:
        start = time.monotonic()
        with pytest.raises(ProgramError):
            train(runner, tiny)
        assert time.monotonic() - start < 20


@pytest.mark.slow
def test_the_watch_ends_a_child_that_takes_too_much(tiny: Built) -> None:
    """What macOS and Windows rely on, on any system."""
    child = Child(*command_and_environment())
    try:
        child.hello(timeout_s=60)
        child.watch_memory(-1)
        load(child, with_function(tiny, "block", block_of(endless)), match="of memory, this device allows")
    finally:
        child.stop()


@pytest.mark.slow
def test_a_callback_is_refused_by_the_child(tiny: Built) -> None:
    text = """
    func.func public @main(%arg0: tensor<i32>) -> tensor<f32> {
      %0 = stablehlo.custom_call @xla_ffi_python_cpu_callback() {api_version = 4 : i32} : () -> tensor<f32>
      return %0 : tensor<f32>
    }"""
    with ChildRunner(replaced(tiny.plan, "block", artifact(text)), threads=1) as runner:
        with pytest.raises(PlanError, match="calls back into Python"):
            runner.compile()
        assert runner.pid is None


@pytest.mark.slow
def test_a_program_with_another_hash_is_refused_by_the_child(tiny: Built) -> None:
    programs = {hash: data + b"\0" for hash, data in tiny.plan.programs.items()}
    with ChildRunner(Plan(tiny.plan.manifest, programs), threads=1) as runner, pytest.raises(PlanError, match="hash"):
        runner.compile()


@pytest.mark.slow
def test_a_large_model_is_copied_once_at_most_in_the_parent() -> None:
    size = 16_000_000  # 64 MB
    task = tiny_task(
        init=lambda key: {"w": jnp.zeros(size)}, loss=lambda params, state, batch, key: batch["x"] @ params["w"][:3]
    )
    built = build(task)
    peaks: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peaks.append(psutil.Process().memory_info().rss)

    with ChildRunner(built.plan) as runner:
        runner.compile()
        before = psutil.Process().memory_info().rss
        thread = threading.Thread(target=watch)
        thread.start()
        runner.set_model("a", built.model)
        handed_over = max(peaks) - before
        runner.begin("a", {})
        update = runner.finish()
        over.set()
        thread.join()
    assert update.sums["delta/params/w"].nbytes == 64_000_000
    assert handed_over < 32_000_000 and max(peaks) - before < 96_000_000


def test_a_child_that_is_not_needed_ends_unless_it_is_claimed() -> None:
    idle = Child([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    claimed = Child([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    try:
        assert idle.rest_after(0.05) and claimed.rest_after(0.05) and claimed.is_claimed()
        deadline = time.monotonic() + 10.0
        while idle.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not idle.is_claimed() and claimed.is_alive()
    finally:
        idle.stop()
        claimed.stop()


def command_and_environment() -> tuple[list[str], dict[str, str]]:
    limits = Limits(seconds=20.0, memory_bytes=1 << 30)
    command = child_command(limits, python=None, priority="normal", cache=None, engine="jax", threads=None)
    return command, environment_for(python_path=ROOT, threads=1)


def load(child: Child, plan: Plan, *, match: str) -> None:
    from shoal.plan.child_process import ChildEnded

    with pytest.raises(ChildEnded, match=match):
        for _ in range(100):
            data = {"plan": np.frombuffer(plan.to_bytes(), np.uint8)}
            child.request({"call": "load"}, data, timeout_s=20, most_bytes=0)
            child.request({"call": "compile"}, {}, timeout_s=20, most_bytes=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_the_child_dies_with_its_parent(tiny: Built, tmp_path: Path, busy: bool) -> None:
    plan = with_function(tiny, "block", block_of(endless))
    plan.save(tmp_path / "plan")
    np.savez(tmp_path / "model.npz", **tiny.model)
    script = f"""
        import sys, threading, numpy as np
        from pathlib import Path
        from shoal.plan.child import ChildRunner
        from shoal.plan.plan import Plan
        runner = ChildRunner(Plan.load(Path({str(tmp_path / "plan")!r})), threads=1)
        runner.set_model("a", dict(np.load({str(tmp_path / "model.npz")!r})))
        runner.begin("a", {{}})
        print(runner.pid, flush=True)
        if {busy}:
            runner.block({{"x": np.zeros((2, 4, 3), np.float32), "y": np.zeros((2, 4), np.int32)}},
                         np.ones((2, 4), bool), np.zeros(2, np.uint32))
            runner.finish()
        threading.Event().wait()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT}
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.3)  # well into the program
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 2.0
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_child_outlives_the_thread_that_first_called(noisy: Built) -> None:
    with ChildRunner(noisy.plan, threads=1) as runner:
        thread = threading.Thread(target=runner.compile)
        thread.start()
        thread.join()
        pid = runner.pid
        time.sleep(0.2)
        assert runner.pid == pid is not None


@pytest.mark.slow
def test_what_is_printed_does_not_reach_the_channel(tiny: Built, tmp_path: Path) -> None:
    command, environment = command_and_environment()
    code = "import os, sys; from shoal.plan import child_main as c; os.write(2, b'early'); old = c.Session.hello\n"
    code += "def hello(self): print('printed'); os.write(1, b'written'); return old(self)\n"
    code += "c.Session.hello = hello; c.main(sys.argv)"
    child = Child([command[0], "-P", "-c", code, command[-1]], environment)
    try:
        assert child.hello(timeout_s=60)["pid"] == child.pid
    finally:
        child.stop()


def three_bytes(data: bytearray, draw: random.Random) -> None:
    for position in draw.sample(range(len(data)), 3):
        data[position] ^= draw.randrange(1, 256)


def one_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("damage", "variants"), [(three_bytes, 200), (one_bit, 100)], ids=["three bytes", "one bit"])
def test_damaged_programs_never_reach_the_caller(tiny: Built, damage: Any, variants: int) -> None:
    """Hashes made right again: each fails cleanly, or runs. Most do not parse; of one bit, every tenth still runs."""
    draw = random.Random(7)
    original = tiny.plan.program(tiny.plan.manifest.variants("block")[0])
    ended = {"ran": 0, "refused": 0, "died": 0}
    child: Child | None = None
    for _ in range(variants):
        damaged = bytearray(original)
        damage(damaged, draw)
        if child is None:
            child = Child(*command_and_environment())
            child.hello(timeout_s=60)
        outcome = run_in(child, replaced(tiny.plan, "block", bytes(damaged)), tiny)
        ended[outcome] += 1
        if outcome == "died":
            child.stop()
            child = None
    if child is not None:
        assert run_in(child, tiny.plan, tiny) == "ran"
        child.stop()
    assert sum(ended.values()) == variants and ended["refused"] > variants / 2, ended


@pytest.mark.slow
def test_a_program_of_another_signature_is_refused(tiny: Built) -> None:
    finish = tiny.plan.program(tiny.plan.manifest.variants("finish")[0])
    with ChildRunner(replaced(tiny.plan, "block", finish), threads=1) as runner, pytest.raises(ProgramError):
        train(runner, tiny)


def run_in(child: Child, plan: Plan, built: Built) -> str:
    """Loads and trains one block in a child that is already warm."""
    from shoal.plan.child_process import ChildEnded

    def ask(call: str, tensors: Tensors | None = None, **header: str) -> bool:
        answer, _ = child.request({"call": call, **header}, tensors or {}, timeout_s=10, most_bytes=1 << 20)
        return "error" not in answer

    batches, mask, key = feed(np.random.default_rng(0))
    fields = {f"batch/{name}": value for name, value in batches.items()}
    try:
        good = (
            ask("load", {"plan": np.frombuffer(plan.to_bytes(), np.uint8)})
            and ask("set_model", built.model, root="a")
            and ask("begin", {}, root="a")
            and ask("block", {**fields, "mask": mask, "key": key})
            and ask("finish")
        )
    except ChildEnded:
        return "died"
    return "ran" if good else "refused"


@pytest.mark.slow
def test_any_crash_of_a_damaged_program_is_a_shoal_error(tiny: Built) -> None:
    plan = replaced(tiny.plan, "block", b"ML\xefR" + bytes(200))
    with ChildRunner(plan, threads=1) as runner, pytest.raises(ShoalError):
        train(runner, tiny)
