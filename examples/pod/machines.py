"""DiLoCo: whole machines as devices, which take 100 steps on their own data and then send what they learned.

    shoal host examples/pod/machines.py --run runs/machines --rounds 50
    shoal device --server HOST:8500 --data half-0.npz --accelerators 4         # on each machine, with its part of the data
    shoal device --server HOST:8500 --data half-1.npz --accelerators 4

A machine with fewer examples than 100 batches takes as many steps as it has batches; `Local(epochs=…)` has it go over them again.

The fleet's policy says who is waited for: here for both. `RoundPolicy(goal=1, late=shoal.Late("discount", 0.7, 2))` would let a round close without the slower one, and count
what it sends later for less.
"""

import shoal
from shoal.cli.task_argument import load_task

task = shoal.diloco(
    load_task(__file__.replace("machines.py", "mlp.py")).replace(
        rounds=shoal.RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    ),
    inner_steps=100,
)
