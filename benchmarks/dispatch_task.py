"""What `benchmarks.dispatch` trains: the small net, every device in every round."""

from benchmarks.small_net import task as small_net
from shoal.policy import RoundPolicy

DEVICES, BATCH, RATE = 4, 10, 0.1
task = small_net(RoundPolicy(goal=DEVICES, minimum_group=DEVICES, over_selection=1.0), rate=RATE)
