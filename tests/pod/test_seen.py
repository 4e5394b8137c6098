"""What processes of a pod see of themselves, and who is called slow."""

from dataclasses import replace

from shoal.pod.seeing import Seeing
from shoal.pod.seen import NUM_BINS, MemberSeen, slow, within_s


def member(process: int, **changed: object) -> MemberSeen:
    plain = MemberSeen(
        process=process, life=1, step_s=(0,) * NUM_BINS, wait_s=(0,) * NUM_BINS, waited=0.01, stalls=0, memory_bytes=1 << 20, job_s=0.01
    )  # fmt: skip
    return replace(plain, **changed)  # type: ignore[arg-type]


def test_counts_are_of_what_was_seen_since_the_last_version() -> None:
    seeing = Seeing(life=3)
    for _ in range(10):
        seeing.saw(2, waited_s=0.0, worked_s=0.006)  # 3 ms a step
    seeing.saw(1, waited_s=0.03, worked_s=0.07)
    (found,) = seeing.gathered()
    assert sum(found.step_s) == 21 and found.step_s[2] == 20 and found.step_s[7] == 1  # up to 4 ms, up to 128 ms
    assert sum(found.wait_s) == 11 and found.wait_s[0] == 10
    assert (found.process, found.life, found.stalls) == (0, 3, 1)
    assert abs(found.waited - 0.03 / 0.16) < 1e-3 and found.memory_bytes > 1 << 20
    (after,) = seeing.gathered()
    assert not any(after.step_s) and after.waited == 0


def test_times_of_any_length_are_counted() -> None:
    seeing = Seeing(life=1)
    for seconds in (0.0, 1e-9, 1.0, 1e9):
        seeing.saw(1, waited_s=seconds, worked_s=0.0)
    (found,) = seeing.gathered()
    assert sum(found.step_s) == 4 and found.step_s[0] == 2 and found.step_s[-1] == 1


def test_who_is_slow_is_named_with_the_reason() -> None:
    alike = [member(0), member(1, job_s=0.011), member(2)]
    assert not slow(alike)
    assert "3.0 times" in slow([*alike, member(3, job_s=0.03)])[3]
    assert "40%" in slow([*alike, member(3, waited=0.4)])[3]
    assert not slow([member(0, waited=0.9)]), "alone there is nobody to be slower than"


def test_several_versions_are_added_up_and_read_back() -> None:
    one = member(0, step_s=(0, 6, 2, *(0,) * (NUM_BINS - 3)), stalls=1, memory_bytes=3 << 20, waited=0.2)
    other = member(0, step_s=(0, 0, 8, *(0,) * (NUM_BINS - 3)), life=2, waited=0.4, job_s=0.02)
    both = one.plus(MemberSeen.from_json(other.to_json()))
    assert both.step_s[:3] == (0, 6, 10) and (both.life, both.stalls, both.memory_bytes) == (2, 1, 3 << 20)
    assert abs(both.waited - 0.3) < 1e-9 and both.job_s == 0.02
    assert (within_s(both.step_s, 0.3), within_s(both.step_s, 0.9), within_s(one.wait_s, 0.5)) == (0.002, 0.004, 0.0)
