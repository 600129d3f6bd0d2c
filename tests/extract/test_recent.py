"""What was used lately stays, within its limit."""

from __future__ import annotations

from mhim.extract.recent import Recent


def test_what_is_kept_stays_within_its_bytes() -> None:
    kept: Recent[int, bytes] = Recent(10, len)
    made: list[int] = []

    def make(key: int) -> bytes:
        made.append(key)
        return b"1234"

    for key in (1, 2, 3, 3, 1):
        assert kept.made(key, lambda key=key: make(key)) == b"1234"
    assert made == [1, 2, 3, 1]  # two of four bytes fit; 1 had to go
    assert 2 not in kept
    assert 3 in kept


def test_use_makes_it_the_latest_and_the_latest_always_stays() -> None:
    kept: Recent[str, int] = Recent(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert [key in kept for key in "abc"] == [True, False, True]
    large: Recent[str, bytes] = Recent(3, len)
    large.put("x", b"12345")
    assert large.get("x") == b"12345"
    large.put("x", b"1")  # its place is counted once
    large.put("y", b"12")
    assert len(large) == 2
