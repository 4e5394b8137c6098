"""Strictness for every test: no silent promotion, eight host devices, no surviving warning."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

hypothesis.settings.register_profile("shoal", deadline=None)  # machines are shared: a slow moment is no fault
hypothesis.settings.load_profile("shoal")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
