"""How much is tried: `make test` draws fewer examples than `make test-all` does, of the same."""

from hypothesis import settings

FEWER = 4  # times fewer

_all = True


def set_effort(*, with_slow: bool) -> None:
    """Said by conftest.py before the tests are imported. with_slow: whether the slow tests are run too."""
    global _all
    _all = with_slow


def examples(n: int, **others: object) -> settings:
    """Settings of a test that draws n examples among the slow tests, and a quarter of them, 8 at least, without."""
    return settings(max_examples=n if _all else min(n, max(8, n // FEWER)), **others)
