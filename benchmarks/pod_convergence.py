"""Whether what a pod does to save time and bytes changes what is learned: a perceptron by Adam on Fashion-MNIST, three seeds.

O1  the exact ways (updates in pieces, two levels, tensors split by rules, accumulation, a batch that members cannot share evenly) against one
    device, after 50 steps: |parameters - those of one device| / |those of one device - the first ones|, the largest of all ways and seeds. Beside it
    the same of one device whose batches have their rows the other way round: what another order of additions alone does.
O2  accuracy of what is not exact, mean over seeds, less that of one device, in units of that one's spread (largest less smallest over the seeds): at
    least -1. O2a gradients summed in bfloat16; O2b two processes of `shoal train --workers 2`, one of which is killed; O2c DiLoCo, four machines that
    send an update every 20 steps; O2d its streaming form, a quarter of the model every 5. All see as many examples.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)

import os  # noqa: E402 (devices are counted when JAX starts)
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, Final  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402

import shoal  # noqa: E402
from benchmarks.frame import Goal, run, table  # noqa: E402
from shoal.cli.task_argument import load_task  # noqa: E402
from shoal.pod import MeshSpec, Trainer, Version, Watch  # noqa: E402
from shoal.record.run import open_run  # noqa: E402

BATCH, EPOCHS, EXACT_STEPS = 256, 4, 50
MACHINES, INNER_STEPS, FRAGMENTS = 4, 20, 4
EXACT: Final[dict[str, dict[str, Any]]] = {
    "sharded, two levels": {"mesh": "slow=2,data=4", "update": "sharded"},
    "fully sharded": {"mesh": "data=8", "update": "fully_sharded"},
    "split by rules": {
        "mesh": "data=4,model=2",
        "rules": {"params/layer0/kernel": "-,model", "params/layer1/kernel": "model,-"},
    },
    "accumulated": {"mesh": "data=2", "accumulate": 4},
    "shared unevenly": {"mesh": "data=3"},
}
perceptron = load_task("examples/pod/mlp.py")
TASK = perceptron.replace(local=shoal.Local(optimizer=perceptron.local.optimizer, batch_size=BATCH))


def trainer(mesh: str, **how: Any) -> Trainer:
    return Trainer(TASK, mesh=mesh, devices=jax.devices()[: MeshSpec.parse(mesh).num_devices], **how)


def parameters(made: Trainer, examples: shoal.data.Examples, steps: int, seed: int) -> dict[str, np.ndarray]:
    state = made.train(examples, steps=steps, commit_every=steps, seed=seed)
    return {name: np.asarray(value) for name, value in made.whole(state).items()}


def accuracy(made: Trainer, data: Any, seed: int) -> float:
    """After all epochs."""
    steps, found = EPOCHS * made.order(len(data.train), seed=seed).steps_per_epoch, list[Version]()
    made.train(
        data.train, steps=steps, commit_every=steps, seed=seed, held_out=data.test, watch=Watch(on_version=found.append)
    )
    return 100 * float(found[-1].metrics["accuracy"])


def distances(data: Any, seed: int) -> dict[str, float]:
    """Way -> how far from one device's parameters."""
    alone = trainer("data=1")
    first = {n: np.asarray(v) for n, v in alone.whole(alone.program.begin(jax.random.key(seed))).items()}
    reached = parameters(alone, data.train, EXACT_STEPS, seed)

    def apart(other: Mapping[str, np.ndarray]) -> float:
        far = sum(float(np.sum(np.square(other[n].astype("d") - reached[n]))) for n in reached)
        moved = sum(float(np.sum(np.square(reached[n].astype("d") - first[n]))) for n in reached)
        return float(np.sqrt(far / moved))

    made = {name: apart(parameters(trainer(**how), data.train, EXACT_STEPS, seed)) for name, how in EXACT.items()}
    return made | {"rows the other way round": apart(_reversed(alone, data, seed))}


def _reversed(alone: Trainer, data: Any, seed: int) -> dict[str, np.ndarray]:
    """One device whose batches have their rows in reverse."""
    order, program = alone.order(len(data.train), seed=seed), alone.program
    step, state = jax.jit(program.steps, donate_argnums=0), program.begin(jax.random.key(seed))
    for (indices, mask), _ in zip(order.steps(0), range(EXACT_STEPS), strict=False):
        fields = {name: value[None] for name, value in data.train.take(indices[::-1]).items()}
        state, _ = step(state, fields, mask[None, ::-1], np.zeros(2, np.uint32))
    return {name: np.asarray(value) for name, value in alone.whole(state).items()}


def killed(seed: int) -> float:
    """Accuracy of two processes of which one is killed on the way."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "shoal", "train", "examples/pod/mlp.py", "--data", "name:fashion-mnist", "--epochs", str(EPOCHS), "--batch",
            str(BATCH), "--workers", "2", "--checkpoint-every", "40", "--seed", str(seed), "--run", f"{folder}/run",
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)
            while "version 1/" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
            workers = [
                each
                for each in psutil.Process(process.pid).children(recursive=True)
                if "shoal.cli.train_pod" in each.cmdline() and each.net_connections()  # spares have none
            ]
            os.kill(workers[0].pid, signal.SIGKILL)
            assert process.wait(600) == 0, log.read_text()
        assert "life 2 begins" in log.read_text(), log.read_text()
        with open_run(Path(folder) / "run") as found:
            return 100 * float(found.history("accuracy")[1][-1])


def diloco(data: Any, seed: int, *, fragments: int = 1) -> float:
    local = shoal.Local(optimizer=TASK.local.optimizer, batch_size=BATCH // MACHINES)
    policy = shoal.RoundPolicy(goal=MACHINES, minimum_group=MACHINES)
    task = shoal.diloco(TASK.replace(local=local, rounds=policy), inner_steps=INNER_STEPS, fragments=fragments)
    split = shoal.data.iid(len(data.train), MACHINES, rng=np.random.default_rng(seed))
    rounds = fragments * round(EPOCHS * len(data.train) / (INNER_STEPS * BATCH))
    made = shoal.simulate(
        task, shoal.data.Population.from_split(data.train, split), rounds=rounds, seed=seed, held_out=data.test, evaluate_every=rounds,
        progress=False,
    )  # fmt: skip
    return 100 * float(made.history[-1].metrics["accuracy"])


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    data, seeds = shoal.data.load("fashion-mnist"), (0,) if quick else (0, 1, 2)
    apart = {seed: distances(data, seed) for seed in seeds}
    table(
        ["way", *(f"seed {seed}" for seed in seeds)],
        [[way, *(f"{apart[s][way]:.2e}" for s in seeds)] for way in apart[0]],
    )
    control = "rows the other way round"
    worst = max(value for each in apart.values() for way, value in each.items() if way != control)
    why = "" if not quick else "three seeds are needed for a spread"
    ways = {"one device": [], "bfloat16 sums": [], "one of two killed": [], "DiLoCo": [], "streaming": []}  # type: dict[str, list[float]]
    for seed in seeds if not quick else ():
        ways["one device"].append(accuracy(trainer("data=1"), data, seed))
        ways["bfloat16 sums"].append(
            accuracy(trainer("slow=2,data=4", update="sharded", sum_type="bfloat16"), data, seed)
        )
        ways["one of two killed"].append(killed(seed))
        ways["DiLoCo"].append(diloco(data, seed))
        ways["streaming"].append(diloco(data, seed, fragments=FRAGMENTS))
    table(
        ["accuracy, %", *(f"seed {seed}" for seed in seeds)], [[way, *values] for way, values in ways.items() if values]
    )
    alone = ways["one device"]
    spread = max(alone) - min(alone) if alone else 1.0

    def behind(way: str) -> float | None:
        return (float(np.mean(ways[way])) - float(np.mean(alone))) / spread if alone else None

    goals = [
        Goal("O1", "exact ways, distance from one device after 50 steps, of what it moved", worst, "<= 1e-4"),
        Goal("O2a", "bfloat16 sums, accuracy less one device's, in spreads", behind("bfloat16 sums"), ">= -1", why=why),
        Goal("O2b", "one of two processes killed, likewise", behind("one of two killed"), ">= -1", why=why),
        Goal("O2c", "DiLoCo, likewise", behind("DiLoCo"), ">= -1", why=why),
        Goal("O2d", "DiLoCo, streaming, likewise", behind("streaming"), ">= -1", why=why),
    ]
    return goals, {"distances": apart, "accuracy": ways, "spread": spread}


if __name__ == "__main__":
    run("pod_convergence", measure, __doc__ or "")
