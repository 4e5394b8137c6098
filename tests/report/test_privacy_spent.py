"""The statement says on what its epsilon rests, and nothing that does not hold."""

from dataclasses import replace

from shoal.policy import Correlated, Privacy, RoundPolicy, Secure
from shoal.privacy.device_noise import device_noise
from shoal.privacy.spending import release_of
from shoal.record.store import LedgerRow
from shoal.report.privacy_spent import Spent, statement

SERVER = Privacy(clip_norm=1.0, noise_multiplier=2.0)
DEVICES = replace(SERVER, distributed=True, secure=Secure(members=40, authority="ab" * 32))


def told(privacy: Privacy, *, min_separation: int = 1, rounds: int = 6) -> str:
    """The statement of a run of so many rounds."""
    devices = device_noise(privacy, units={2.0**-16}, elements=1000)
    release = release_of(privacy, RoundPolicy(min_separation=min_separation), run="r", devices=devices)
    ledger = [
        LedgerRow(
            number=number, population="p", budget="privacy", entry="reservation", amount=1.0, run_id="r", round=number,
            time_s=0.0, data=release.data,
        )
        for number in range(rounds)
    ]  # fmt: skip
    return statement(Spent(run="r", privacy=privacy, min_separation=min_separation, ledger=ledger))


def test_noise_of_the_server_takes_a_server_that_is_trusted() -> None:
    made = told(SERVER)
    assert "saw sums without noise, and is trusted" in made
    assert "every device may have been in every round" in made and "rested" not in made


def test_noise_of_devices_takes_a_server_that_counts_truly() -> None:
    made = told(DEVICES, min_separation=4)
    assert (
        "the server, which may lie there, worked with at most 10% of the members and saw no sum without noise" in made
    )
    assert (
        "epsilon holds if it counted truly, in a ledger of its own, which devices were in how many versions and kept them resting"
        in made
    )
    assert "against a server that lies about that, the noise of each sum holds, and no more" in made
    assert "kept them resting" not in told(DEVICES)


def test_nothing_is_promised_against_a_lying_server_where_nobody_vouches_for_members() -> None:
    made = told(replace(DEVICES, secure=Secure(members=40)))
    assert "the server, which followed the protocol," in made and "counted truly" in made and "lie" not in made


def test_correlated_noise_rests_on_devices_that_rest() -> None:
    correlated = replace(SERVER, correlated=Correlated(rounds=512))
    made = told(correlated, min_separation=64)
    assert "all rounds of the run, 512 at most, are one release" in made
    assert (
        "A device that was in a version rested for the next 63 at least, so one device was in at most 8 of 512 rounds"
        in made
    )
    assert "epsilon rests on that, and the server saw to it" in made
    assert "Every device may have been in every round" in told(correlated)


def test_how_often_a_device_was_in_is_said_of_rounds_with_noise_of_their_own_too() -> None:
    assert "one device was in at most 2 of 6 rounds" in told(SERVER, min_separation=4)
