"""The line that a second machine pastes: one text for one invitation, and nothing else is taken for one."""

import base64
import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet.invitation import PREFIX, Invitation

ONE = Invitation(
    address="train.example.org:443", population="watches", plan_key=bytes(range(32)), pin=b"p" * 32, token=b"t" * 16,
    expires_s=2_000_000_000,
)  # fmt: skip

words = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F, exclude_categories=["C", "Z"]), max_size=60)

addresses = st.builds(
    "{}:{}".format,
    st.from_regex(r"[A-Za-z0-9]([a-z0-9.-]*[a-z0-9])?", fullmatch=True).map(lambda n: n[:200].rstrip(".-")),
    st.integers(1, 65_535),
)


@given(
    st.builds(
        Invitation, address=addresses, population=words.filter(bool), server_name=words, plan_key=st.binary(min_size=32, max_size=32),
        pin=st.sampled_from([b"", b"x" * 32]), token=st.sampled_from([b"", b"y" * 16]), expires_s=st.integers(0, (1 << 63) - 1),
    )
)  # fmt: skip
def test_an_invitation_is_read_as_it_was_made(made: Invitation) -> None:
    assert Invitation.parse(f"  {made.text}\n") == made
    assert " " not in made.text and made.text.isascii()


def test_a_line_is_short_and_its_repr_keeps_the_secret() -> None:
    assert len(ONE.text) < 240
    assert "ttt" not in repr(ONE)


@given(st.integers(0, len(ONE.text) - 1), st.characters(codec="ascii"))
def test_one_letter_that_is_wrong_is_seen(place: int, letter: str) -> None:
    altered = ONE.text[:place] + letter + ONE.text[place + 1 :]
    if altered.strip() != ONE.text:
        with pytest.raises(ValueError, match="invitation"):
            Invitation.parse(altered)


@given(st.integers(0, len(ONE.text) - 1))
def test_what_is_cut_short_is_said_to_be(length: int) -> None:
    with pytest.raises(ValueError, match="Paste the whole line"):
        Invitation.parse(ONE.text[:length])


@given(st.text(max_size=80) | st.binary(max_size=400).map(lambda b: PREFIX + base64.urlsafe_b64encode(b).decode()))
def test_noise_is_no_invitation(text: str) -> None:
    with pytest.raises(ValueError, match="invitation"):
        Invitation.parse(text)


@given(st.binary(max_size=200))
def test_noise_with_a_good_checksum_is_none_either_or_is_written_the_one_way(body: bytes) -> None:
    data = body + hashlib.sha256(body).digest()[:4]
    text = PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")
    try:
        assert Invitation.parse(text).text == text
    except ValueError as error:
        assert "invitation" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Expected an invitation, shoal1:"),
        ("shoal2:" + ONE.text.removeprefix(PREFIX), "another version of shoal"),
        (ONE.text + "A", "cut short or altered"),
        (ONE.text + "=", "not written as"),
        (ONE.text[:90] + " " + ONE.text[90:], "cut short or altered"),
        (PREFIX + "A" * 3000, "at most 2000 characters"),
        ("train.example.org:8500", "Expected an invitation"),
    ],
)
def test_what_is_wrong_is_said(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Invitation.parse(text)


def test_an_invitation_ends() -> None:
    ONE.check(1_999_999_999.0)
    replace(ONE, expires_s=0).check(9e9)
    with pytest.raises(ValueError, match=r"ended on 2033-05-18 03:33 UTC\. Ask for a new one"):
        ONE.check(2_000_000_000.0)


@pytest.mark.parametrize(
    "wrong",
    [{"address": ""}, {"address": "two words:1"}, {"address": "no-port"}, {"population": "x" * 256}, {"plan_key": b"x"}, {"pin": b"x"}, {"token": b"x"}, {"server_name": "a\nb"}, {"expires_s": -1}],
)  # fmt: skip
def test_what_cannot_be_an_invitation_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        replace(ONE, **wrong)  # type: ignore[arg-type]
