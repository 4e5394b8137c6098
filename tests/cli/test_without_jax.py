"""`shoal-device` and `--runtime iree`: what they refuse, what they import, and rounds of devices with and without JAX."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest

import shoal.cli as shoal_cli
from shoal.cli import device_main, plain
from shoal.cli.device import EPILOG, device
from shoal.fleet.device_host import DeviceHost
from shoal.plan.iree_targets import TARGETS
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.manifest import IREE
from shoal.record.run import open_run

from .conftest import Shoal
from .test_host_device import Start, begin_host, last

ROOT = Path(__file__).parents[2]
PACKAGE = tomllib.loads((ROOT / "packaging/shoal-device/pyproject.toml").read_text())
SHOAL = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_THERE = (
    "jax", "jaxlib", "flax", "optax", "scipy", "sqlalchemy", "matplotlib", "safetensors", "typer", "rich", "pydantic", "uvloop", "pandas",
)  # fmt: skip
"""Libraries that a device without JAX does not have."""
HOOK = f"""
import sys

ROOMS = {sorted(PACKAGE["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].values())!r}
NOT_THERE = {NOT_THERE!r}


class Refuse:
    def find_spec(self, name, path=None, target=None):
        top, _, rest = name.partition(".")
        room = "shoal/" + rest.partition(".")[0]
        if top in NOT_THERE or (top == "shoal" and rest and room not in ROOMS and room + ".py" not in ROOMS):
            raise ModuleNotFoundError(f"{{name}} is not on a device without JAX", name=name)


sys.meta_path.insert(0, Refuse())
"""
has_iree = find_spec("iree") is not None and find_spec("iree.compiler") is not None
needs_iree = pytest.mark.skipif(not has_iree, reason="needs IREE's compiler and runtime: pip install 'shoal[iree]'")


@pytest.fixture
def without_jax(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which nothing can be imported that `shoal-device` does not bring."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), str(ROOT)])}


def test_a_device_without_jax_keeps_account_of_its_examples(without_jax: dict[str, str]) -> None:
    program = """
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.example_ledger import ExampleBudget, ExampleLedger
from shoal.policy import ExamplePrivacy
from shoal.privacy.examples import rho

ledger = ExampleLedger(DeviceFile(None), "anna")
ledger.add(rho(ExamplePrivacy(clip_norm=1.0, noise_multiplier=2.0, delta=1e-6), epochs=2))
print(ledger.rho, ExampleBudget(epsilon=8.0).allows(ledger.rho), ExampleBudget(epsilon=0.5).allows(ledger.rho))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, env=without_jax, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.split() == ["0.25", "True", "False"], done.stderr


# What is refused.


def test_native_code_is_run_for_a_named_key_only(shoal: Shoal, place: Path) -> None:
    refused = shoal("device", "--server", "127.0.0.1:1", "--data", place / "users", "--runtime", "iree")
    assert refused.code == 1 and "Expected --key with --runtime iree" in last(refused.err)
    with pytest.raises(ValueError, match="trusted_key"):
        DeviceHost(make_runner=JaxRunner, runtime=TARGETS["aarch64-linux"].needs((3, 13, 0)))


def test_an_unknown_runtime_or_target_is_refused_with_those_there_are(shoal: Shoal, place: Path) -> None:
    refused = shoal("device", "--server", "127.0.0.1:1", "--data", place / "users", "--runtime", "torch")
    assert "jax | iree, got 'torch'" in last(refused.err)
    refused = shoal("host", place / "line.py", "--rounds", 1, "--port", 0, "--iree", "pdp11")
    assert "aarch64-linux-android, got 'pdp11'" in last(refused.err)


@pytest.mark.skipif(find_spec("iree") is not None, reason="IREE is installed")
def test_without_iree_it_says_what_to_install(shoal: Shoal, place: Path) -> None:
    refused = shoal(
        "device", "--server", "127.0.0.1:1", "--data", place / "users", "--runtime", "iree", "--key", "ab" * 32
    )
    assert "iree-base-runtime" in last(refused.err)


def test_it_is_to_be_told_where_the_host_is(shoal: Shoal) -> None:
    refused = shoal("device", "--data", "users")
    assert refused.code == 1 and "Expected --server HOST:PORT, or --join LINE" in last(refused.err)


# What it imports, and its options.


@pytest.mark.integration
def test_a_device_imports_neither_jax_nor_sql_nor_what_it_does_not_bring(
    without_jax: dict[str, str], place: Path
) -> None:
    code = f"""
import json, sys
from shoal.cli import device_main, plain
device = plain.load_command("shoal.cli.device", "device")
from shoal.cli import device_process
light = []
def run(settings, population, **given):
    assert len(population) == 6
    light.extend(sorted({{name.split(".")[0] for name in sys.modules}}))
device_process.run = run
plain.leave = lambda code: None
plain.run(device, name="shoal-device", epilog="", arguments=["--server", "127.0.0.1:1", "--data", {str(place / "users")!r}])
import shoal.fleet.secure_offer, shoal.fleet.kept_model, shoal.plan.child, shoal.plan.child_main
import shoal.fleet.invitation, shoal.fleet.handshake, shoal.fleet.tls
print(json.dumps(light))
"""
    done = subprocess.run([sys.executable, "-c", code], env=without_jax, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    light = json.loads(done.stdout)
    assert light and not {"cryptography", "psutil", "urllib3", "http", *NOT_THERE} & set(light), (
        "what only work needs comes with work"
    )


def test_every_example_of_shoal_device_says_whose_programs_are_run() -> None:
    lines = [line for line in device_main._examples(EPILOG).splitlines() if "shoal-device" in line]
    assert len(lines) > 5 and all((" --join " in line) != (" --key KEY" in line) for line in lines)
    assert not any("--runtime" in line for line in lines), "there is one"


def test_shoal_device_has_the_options_of_shoal_device(capsys: pytest.CaptureFixture[str]) -> None:
    command = plain.load_command("shoal.cli.device", "device")
    assert inspect.signature(command) == inspect.signature(device), (
        "the module was loaded once, with typer, in this process"
    )
    with pytest.raises(SystemExit):
        plain.run(_loaded_anew(), name="shoal-device", epilog="Examples:", arguments=["--help"], runtime="iree")
    said = capsys.readouterr().out
    for name in inspect.signature(device).parameters:
        assert f"--{name.replace('_', '-')}" in said
    assert "Examples:" in said and re.search(r"--runtime\b.*\[default:\s+iree\]", said, re.S)


def _loaded_anew() -> plain.Command:
    """The command as a process without typer has it."""
    kept = {name: sys.modules.pop(f"shoal.cli.{name}") for name in ("device", "options")}
    vars(shoal_cli).pop("options")  # else `from shoal.cli import options` finds it there
    try:
        return plain.load_command("shoal.cli.device", "device")
    finally:
        for name, module in kept.items():
            sys.modules[f"shoal.cli.{name}"] = module
            setattr(shoal_cli, name, module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--server", "a:1", "--count", "0"), "'0' is not in the range >= 1"),
        (("--server", "a:1", "--threads", "x"), "invalid int value: 'x'"),
        (("--server", "a:1", "--serv", "b"), "unrecognized arguments: --serv b"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        plain.run(_loaded_anew(), name="shoal-device", epilog="", arguments=arguments)
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_a_command_gets_what_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    command, got = _loaded_anew(), {}

    def taken(**given: object) -> None:
        got.update(given)

    taken.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    arguments = ["--server", "a:1", "--task", "x", "--task", "y", "--ca", "ca.pem", "--visits", "--noise", "2.5"]
    with pytest.raises(SystemExit) as ended:
        plain.run(taken, name="shoal-device", epilog="", arguments=arguments)
    assert ended.value.code == 0, capsys.readouterr().err
    defaults = {name: p.default for name, p in inspect.signature(device).parameters.items() if name != "server"}
    expected = {"server": "a:1", "task": ["x", "y"], "ca": Path("ca.pem"), "visits": True, "noise": 2.5}
    assert got == {**defaults, **expected}


def test_its_distribution_asks_for_what_shoal_asks_for() -> None:
    ours = set(SHOAL["project"]["dependencies"]) | {
        text for extra in SHOAL["project"]["optional-dependencies"].values() for text in extra
    }
    own = set(PACKAGE["project"]["dependencies"])
    assert {text for text in own - ours if not text.startswith("ml_dtypes")} == set()
    assert PACKAGE["project"]["version"] == SHOAL["project"]["version"]
    assert not {text for text in own if re.split(r"[<>=]", text)[0] in NOT_THERE}


# Rounds.


@needs_iree
@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(240)
def test_devices_with_and_without_jax_train_together(
    start: Start, place: Path, tmp_path: Path, without_jax: dict[str, str], shoal: Shoal
) -> None:
    from shoal.plan.iree_targets import this_runtime

    target = this_runtime().kind.removeprefix(IREE)
    host, address = begin_host(
        start, place, tmp_path, place / "line.py", "--rounds", 5, "--goal", 6, "--over-selection", 1.0, "--iree", target,
        "--held-out", place / "test.npz",
    )  # fmt: skip
    (key,) = re.findall(r"--key ([0-9a-f]{64})", host.text)
    log = tmp_path / "plain.log"
    with log.open("w") as file:
        without = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli.device_main", "--server", address, "--data", place / "users", "--count", "3", "--key", key,
             "--state", tmp_path / "kept", "--with-parent"],
            env=without_jax, stdout=file, stderr=file,
        )  # fmt: skip
    with_jax = start("device", "--server", address, "--data", place / "users", "--first", 3)
    host.until(lambda: "version 2/5" in host.text, 120)
    if sys.platform == "linux":
        family = [psutil.Process(without.pid), *psutil.Process(without.pid).children(recursive=True)]
        loaded = "\n".join(entry.path for process in family for entry in process.memory_maps())
        assert "iree" in loaded and "jaxlib" not in loaded
    assert host.wait() == 0, host.text
    assert with_jax.wait() == 0 and without.wait(30) == 0, log.read_text()
    assert "updates 15 counted" in with_jax.text and "updates 15 counted" in log.read_text()
    with open_run(tmp_path / "run") as run:
        _, error = run.history("error")
        assert error[-1] < 0.5 * error[0]
    _predicts_as_jax(shoal, tmp_path, without_jax, key)


def _predicts_as_jax(shoal: Shoal, tmp_path: Path, without_jax: dict[str, str], key: str) -> None:
    """What the device has kept answers as the run's own version does, and only for the key."""
    x = np.linspace(-1, 1, 9, dtype=np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    refused = shoal("predict", tmp_path / "kept", tmp_path / "x.npz")
    assert refused.code == 1 and "Expected --key" in last(refused.err)
    other = shoal("predict", tmp_path / "kept", tmp_path / "x.npz", "--key", "ab" * 32)
    assert other.code == 1 and "from the holder of key abab" in last(other.err)
    kept = shoal("predict", tmp_path / "kept", tmp_path / "x.npz", "--key", key, "--json")
    assert kept.code == 0, kept
    without = subprocess.run(
        [sys.executable, "-m", "shoal.cli.device_main", "predict", tmp_path / "kept", tmp_path / "x.npz", "--key", key, "--json"],
        env=without_jax, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert without.returncode == 0, without.stderr
    assert json.loads(without.stdout)["prediction"] == kept.json["prediction"]
    whole = shoal("predict", tmp_path / "run", tmp_path / "x.npz", "--version", kept.json["version"], "--json")
    np.testing.assert_allclose(kept.json["prediction"], whole.json["prediction"], rtol=1e-5, atol=1e-6)


def test_shoal_device_predicts_with_what_a_device_has_kept_alone(
    without_jax: dict[str, str], place: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.ones(3))
    for folder, words in ((tmp_path, "no device's --state folder"), (tmp_path / "none", "no device's --state folder")):
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.device_main", "predict", folder, tmp_path / "x.npy"],
            env=without_jax, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1, done
