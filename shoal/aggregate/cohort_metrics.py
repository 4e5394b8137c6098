"""What a round tells of its cohort: the metrics that came with the updates, and the clip norm that they were over, where it changes."""

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import scale_of
from shoal.policy import Privacy
from shoal.record.store import Blobs
from shoal.tensors import Index

CLIP_NORM = "clip_norm"


def cohort_metrics(sums: Accumulator, privacy: Privacy, base: Index, blobs: Blobs) -> dict[str, float]:
    """Name -> value, of the version that the cohort trained from.

    Args:
        sums: of the round.
        privacy: of the task.
        base: that version.
        blobs: where it is.
    """
    clip = privacy.adaptive_clip
    return sums.metrics() | ({} if clip is None else {CLIP_NORM: clip.initial * scale_of(base, blobs)})
