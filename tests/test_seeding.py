"""Seeds are hashes of addresses."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iet_sd.seeding import seed_for

PARTS = st.one_of(st.integers(), st.text(st.characters(categories=["L", "N"])))


def by_hand(text):
    """The first 8 bytes of SHA-256, lowest first, without their lowest bit."""
    number = int.from_bytes(bytes.fromhex(hashlib.sha256(text.encode()).hexdigest()[:16]), "little")
    return (number - number % 2) // 2


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ((0,), "0"),
        ((0, "adapter"), "0/adapter"),
        ((7, "order", 1, 2, 3), "7/order/1/2/3"),
        ((2**31, "score/noise"), "2147483648/score/noise"),
        ((5, "Übung"), "5/Übung"),
    ],
)
def test_seed_is_the_hash_of_its_address(address, text):
    assert seed_for(*address) == by_hand(text)


@given(seed=st.integers(), address=st.lists(PARTS, max_size=4))
def test_seed_fits_into_63_bits_and_is_stable(seed, address):
    found = seed_for(seed, *address)
    assert 0 <= found < 2**63
    assert found == seed_for(seed, *address)


def test_different_addresses_differ():
    """Neighbours, other orders, and digits that would run together without a separator."""
    addresses = [
        (s, name, i, j) for s in range(4) for name in "ab" for i in (1, 11) for j in (1, 2)
    ]
    addresses += [(0,), (0, 0), (0, 0, 0), (1, 11), (11, 1), (0, "a", 2, 1), (111,)]
    assert len({seed_for(*address) for address in addresses}) == len(addresses)


def test_all_bits_are_used():
    seen, always = 0, 2**63 - 1
    for i in range(200):
        seen |= seed_for(i)
        always &= seed_for(i)
    assert (seen, always) == (2**63 - 1, 0)
