"""The demo's net, trained for as long as a device lets it: what taking part costs a machine."""

import optax

import shoal
from shoal.cli.demo_task import task as demo_task

task = demo_task.replace(
    name="impact",
    local=shoal.Local(optimizer=optax.sgd(1e-4), batch_size=20, epochs=400, steps_per_block=2, max_examples=1 << 24),
    rounds=shoal.RoundPolicy(goal=1, minimum_group=1, over_selection=1.0, reporting_window_s=3600.0),
)

unreached = task.replace(
    name="unreached", rounds=shoal.RoundPolicy(goal=1000, over_selection=1.0, selection_window_s=36_000.0)
)
"""A round that one device waits for in vain."""
