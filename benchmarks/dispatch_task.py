"""What `benchmarks.dispatch` trains: the small net, every device in every round, which is 20 steps: near to a pod, which adds up after each."""

from dataclasses import replace

from benchmarks.small_net import task as small_net
from shoal.policy import RoundPolicy

DEVICES, BATCH, RATE, STEPS = 4, 10, 0.1, 20
_net = small_net(RoundPolicy(goal=DEVICES, minimum_group=DEVICES, over_selection=1.0), rate=RATE)
task = _net.replace(local=replace(_net.local, max_examples=STEPS * BATCH))
