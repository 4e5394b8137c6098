import numpy as np
import pytest

from shoal.embed import Layout
from shoal.embed.generator import TableKind, generate
from shoal.embed.miniature import Setting, foretold, rate_for, read_curve, sample_blocks
from shoal.embed.partition import Settings, partition
from shoal.embed.placement import depth_above
from shoal.embed.simulate import replay

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


@pytest.fixture(scope="module")
def placed():
    trace = generate(
        TableKind(name="small", rows=32_000, mean_bag=10, compulsory=0.2, cold=0.2, epochs=1, seed=3)
    ).trace
    counts = trace.counts()
    return trace, counts, Layout.from_order(partition(trace, 32, Settings()), 32).hot_first(counts)


def test_a_sample_keeps_whole_blocks(placed):
    trace, _, layout = placed
    sample = sample_blocks(trace, layout, 0.3)
    assert len(sample.trace) == len(trace)
    assert sample.rate == pytest.approx(0.3, abs=0.02)
    kept = set(layout.block_of[sample.trace.ids].tolist())
    of_kept = np.isin(layout.block_of[trace.ids], list(kept))
    assert of_kept.sum() == sample.trace.num_lookups
    assert set(layout.block_of[sample_blocks(trace, layout, 0.3, seed=1).trace.ids].tolist()) != kept


def test_the_whole_is_a_sample_of_itself(placed):
    trace, _, layout = placed
    sample = sample_blocks(trace, layout, 1.0)
    setting = Setting(policy="lru")
    assert (
        sample.reads(layout, setting.cache(100, 32_000))
        == replay(trace, layout, setting.cache(100, 32_000)).block_reads
    )


@pytest.mark.parametrize("setting", [Setting(policy="s3-fifo"), Setting(policy="lru", threshold=20)])
def test_miniatures_foretell_the_full_cache(placed, setting):
    trace, counts, layout = placed
    capacity = setting.capacity(1200 * 150.0, 128)
    assert rate_for(capacity, layout.num_blocks) == pytest.approx(0.5)
    full = replay(trace, layout, setting.cache(capacity, 32_000), depth_above(layout, counts, setting.threshold))
    small = foretold(trace, layout, counts, setting, capacity, may_replay=False)
    assert small == pytest.approx(full.block_reads, rel=0.03)
    # Three halves cost more than the whole, so a curve has the whole.
    curve = read_curve(trace, layout, counts, [1200 * 150.0], 128, settings=[setting])
    assert curve.reads[0] == full.block_reads


def test_a_curve_falls_and_picks_the_better(placed):
    trace, counts, layout = placed
    settings = [Setting(policy="lru"), Setting(policy="s3-fifo", read_aware=True)]
    curve = read_curve(trace, layout, counts, [2e4, 1e5, 4e5], 128, settings=settings)
    assert curve.reads[0] > curve.reads[1] > curve.reads[2]
    assert curve.settings[1] == settings[1]
