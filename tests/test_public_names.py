"""Public names: written out by hand, sorted, loaded only when used."""

import subprocess
import sys

import pytest

import shoal


def test_all_names_exist_and_are_sorted() -> None:
    assert shoal.__all__ == sorted(shoal.__all__)
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        shoal.nonsense


def test_the_names_of_data_are_loaded_when_used() -> None:
    for name in shoal.data.__all__:
        assert getattr(shoal.data, name) is not None
    assert dir(shoal.data) == sorted(shoal.data.__all__) and callable(shoal.data.load)
    with pytest.raises(AttributeError, match="nonsense"):
        shoal.data.nonsense


@pytest.mark.integration
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("shoal", ("jax", "numpy", "grpc", "sqlalchemy", "rich", "typer")),
        ("shoal.data", ("numpy", "urllib.request", "sqlite3")),
        ("shoal.fleet.edge", ("jax", "sqlalchemy", "matplotlib")),
        ("shoal.fleet.grpc_server", ("jax", "sqlalchemy", "matplotlib")),
        ("shoal.fleet.device", ("jax", "sqlalchemy", "matplotlib", "cryptography", "psutil", "urllib.request")),
        ("shoal.cli.main", ("jax", "numpy", "grpc", "sqlalchemy", "matplotlib")),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
