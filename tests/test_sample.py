"""What `@pytest.mark.sample` leaves of a product of parameters."""

from __future__ import annotations

import itertools
import math

import pytest
from conftest import in_sample


@pytest.mark.parametrize("sizes", [(2,), (4, 4), (5, 2), (2, 5), (4, 5, 2), (3, 2, 2)], ids=str)
def test_a_sample_has_all_that_one_list_less_can_make(sizes: tuple[int, ...]) -> None:
    """Of two lists each value, of three each pair of values."""
    product = itertools.product(*map(range, sizes))
    sample = [places for number, places in enumerate(product) if in_sample(sizes, number)]
    for few in itertools.combinations(range(len(sizes)), len(sizes) - 1):
        assert {tuple(places[k] for k in few) for places in sample} == set(
            itertools.product(*(range(sizes[k]) for k in few))
        )
    assert len(sample) * min(sizes) == math.prod(sizes)
