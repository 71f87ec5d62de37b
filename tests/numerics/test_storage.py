from __future__ import annotations

import pytest

from fxquant.numerics.storage import storage


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 255, ("uint8", 0, 255)),
        (0, 1, ("uint8", 0, 255)),
        (-1, 0, ("int8", -128, 127)),
        (-128, 127, ("int8", -128, 127)),
        (0, 256, ("uint16", 0, 65535)),
        (-129, 0, ("int16", -32768, 32767)),
        (-1, 255, ("int16", -32768, 32767)),
        (-32768, 32767, ("int16", -32768, 32767)),
    ],
)
def test_the_narrowest_type_that_holds_the_codes(low: int, high: int, expected: tuple[str, int, int]) -> None:
    assert storage(low, high) == expected


@pytest.mark.parametrize(("low", "high"), [(-1, 65535), (0, 65536), (-32769, 0)])
def test_more_than_16_bits_have_none(low: int, high: int) -> None:
    with pytest.raises(AssertionError, match="no integer type"):
        storage(low, high)
