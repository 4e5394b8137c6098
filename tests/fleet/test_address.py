"""HOST:PORT."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.fleet import address


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("train.example.org:443", "train.example.org", 443),
        ("192.0.2.1:65535", "192.0.2.1", 65535),
        ("[::1]:8500", "::1", 8500),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1),
        ("edge_1:80", "edge_1", 80),
    ],
)
def test_what_is_written_well_is_read(text: str, host: str, port: int) -> None:
    assert address.split(text) == (host, port)
    assert address.joined(host, port) == text


@pytest.mark.parametrize(
    "text",
    ["", "host", ":1", "host:", "host:0", "host:65536", "host:1x", "host:٣", "a b:1", "::1:8500", "[::1:8500", "[x]:1", "unix:/tmp/x", "dns:///x:1", "a/b:1", "-a:1", "x" * 300 + ":1"],
)  # fmt: skip
def test_anything_else_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(ValueError, match="Expected --server HOST:PORT"):
        address.split(text, what="--server")


@given(st.text())
def test_no_text_does_more_than_be_refused(text: str) -> None:
    try:
        host, port = address.split(text)
    except ValueError:
        return
    assert address.split(address.joined(host, port)) == (host, port)
