"""On a CPU a pod is made of virtual devices: any mesh can be tried where there is no accelerator."""

import os

import jax


def make_virtual_devices(count: int) -> None:
    """So many CPU devices, where JAX has not started and nobody has said how many there should be. Other platforms do not mind."""
    if jax.config.values["jax_num_cpu_devices"] != -1 or "xla_force_host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    ):
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started: the mesh says what is missing
        pass
