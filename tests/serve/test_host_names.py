"""Names in addresses."""

import pytest

from rgexport.serve.host_names import authority_of, host_name, is_allowed


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost.:8080", "localhost"),
        ("127.0.0.1:1", "127.0.0.1"),
        ("[::1]:8080", "::1"),
        ("", None),
        ("a b", None),
        ("user@localhost", None),
        ("localhost:80:80", None),
        ("localhost:port", None),
        ("::1", None),
        ("[evil.test]", None),
    ],
)
def test_the_name_in_an_authority(authority: str, name: str | None) -> None:
    assert host_name(authority) == name


@pytest.mark.parametrize("host", ["127.0.0.1:80", "[::1]", "10.0.0.1:8080", "chat.example"])
def test_addresses_and_listed_names_are_allowed(host: str) -> None:
    assert is_allowed(host, ["chat.example"])


@pytest.mark.parametrize("host", ["evil.test", "127.0.0.1.evil.test", "chat.example.evil", "1.2.3"])
def test_other_names_are_not(host: str) -> None:
    assert not is_allowed(host, ["chat.example"]) and is_allowed(host, ["*"])


def test_an_address_of_ipv6_has_brackets() -> None:
    assert authority_of("::1", 80) == "[::1]:80"
    assert authority_of("127.0.0.1", 80) == "127.0.0.1:80"
