"""Strictness for every test: no silent promotion, eight host devices, no surviving warning."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("shoal", deadline=None)  # machines are shared: a slow moment is no fault
hypothesis.settings.load_profile("shoal")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that are named in `left_to_all.txt` are slow ones."""
    lines = (Path(__file__).parent / "left_to_all.txt").read_text(encoding="utf-8").splitlines()
    named = {line for line in lines if not line.startswith("#")}
    for item in items:
        if item.nodeid in named:
            item.add_marker(pytest.mark.slow)
