"""A plan of today on a device with an older JAX: the same Runner, another interpreter behind it.

The environments are made once, with the package index, in `$SHOAL_TEST_CACHE` or `~/.cache/shoal/tests`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from shoal.errors import PlanError
from shoal.plan.build import Built, build
from shoal.plan.child import ChildRunner
from shoal.plan.manifest import Runtime
from shoal.plan.runner import Runner
from shoal.task import Local, Task
from shoal.tensors import Tensors
from tests.plan.plan_tasks import B, K, evaluate_feed, feed, zero_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PACKAGES = ("numpy", "cryptography", "absl-py")
UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeout|Connection refused|Temporary failure in name resolution|ProxyError|"
    r"Network is unreachable|Failed to establish a new connection|ReadTimeout|Could not fetch URL|Max retries exceeded"
)


@pytest.fixture(scope="module", params=["0.6.2", "0.4.35"])
def older_python(request: pytest.FixtureRequest) -> str:
    """An interpreter with that version of JAX and nothing else of ours."""
    cache = Path(os.environ.get("SHOAL_TEST_CACHE") or Path.home() / ".cache" / "shoal" / "tests")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"jax-{request.param}-python-{version}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=300)
        install = [python, "-m", "pip", "install", "-q", "--retries", "1", f"jax[cpu]=={request.param}", *PACKAGES]
        made = subprocess.run(install, capture_output=True, text=True, timeout=800, check=False)
        if made.returncode and UNREACHABLE.search(made.stderr):
            pytest.skip(f"no package index can be reached: {made.stderr.strip().splitlines()[-1]}")
        assert made.returncode == 0, made.stderr
        (folder / "ready").touch()
    return str(python)


class Convolutional(linen.Module):
    """A little of everything that a plan may hold: convolution, pooling, batch norm with mask, dropout."""

    @linen.compact
    def __call__(self, x: Any, train: bool, mask: Any) -> Any:
        # No bias before a norm: its gradient is zero but for rounding, which Adam would blow up to a full step.
        x = linen.Conv(4, (3, 3), use_bias=False)(x.reshape(x.shape[0], 3, 1, 1))
        x = linen.BatchNorm(use_running_average=not train)(x, mask=mask[:, None, None, None])
        x = linen.max_pool(jax.nn.gelu(x), (2, 1), padding="SAME").reshape(x.shape[0], -1)
        x = linen.Dropout(0.3, deterministic=not train)(x)
        largest, _ = jax.lax.top_k(x, 3)
        return linen.Dense(2)(jnp.concatenate([x, jnp.sort(largest, axis=-1)], axis=-1))


@pytest.fixture(scope="module")
def built() -> Built:
    import optax

    task = Task.from_flax(
        Convolutional(), loss="softmax_cross_entropy", batch={"x": ((3,), "float32"), "y": ((), "int32")},
        labels="y", name="older", leaves={"params/Dense_0/bias": "private"},
        local=Local(batch_size=B, steps_per_block=K, optimizer=optax.adam(0.05)),
    )  # fmt: skip
    return build(task)


def everything(runner: Runner, built: Built) -> Tensors:
    """All that the device's programs give, by name."""
    rng = np.random.default_rng(11)
    runner.set_model("a", built.model)
    runner.begin("a", zero_state(built.plan.manifest))
    batches, mask, key = feed(rng)
    runner.block(batches, mask, key)
    mask = mask.copy()
    mask[1, 2:] = False
    runner.block(batches, mask, key)
    update = runner.finish()
    batch, live = evaluate_feed(rng, built.plan.manifest.training.evaluate_batch_size)
    live[150:] = False
    made = {**update.sums, **update.device_state, **runner.evaluate("a", batch, live)}
    return {**made, "weight": np.asarray(update.weight), "prediction": runner.predict("a", batch, live)}


def test_an_older_jax_gives_the_same(built: Built, older_python: str) -> None:
    with ChildRunner(built.plan, threads=1) as today:
        expected = everything(today, built)
        newest = today.runtime
    with ChildRunner(built.plan, threads=1, python=older_python) as runner:
        got = everything(runner, built)
        assert runner.runtime.version < newest.version
    assert list(got) == list(expected)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_runtime_that_is_too_old_is_told_what_is_needed(built: Built) -> None:
    old = Runtime(kind="stablehlo", version=(0, 9, 0))
    with pytest.raises(
        PlanError, match=r"of task 'older' needs stablehlo 1\.\d+\.0 .*this runtime is stablehlo 0\.9\.0"
    ):
        built.plan.manifest.pick(old)
