"""The law between the cost of whole plans and what their groups add alone."""

from __future__ import annotations

import pytest

from clipq.search.predict import Interaction

ALONE = [0.01, 0.1, 1.0]
WHOLE = [0.03, 0.3, 3.0]


def test_the_law_is_found() -> None:
    law = Interaction.fit(ALONE, WHOLE, 1e-5)
    assert [law.whole(alone) for alone in ALONE] == pytest.approx(WHOLE)


@pytest.mark.parametrize("noise", [-1e-3, 0.0, 2e-5, 2e-3])
def test_a_plan_that_adds_next_to_nothing_does_not_turn_it(noise: float) -> None:
    law = Interaction.fit([1e-5, *ALONE], [noise, *WHOLE], 1e-5)
    assert law == Interaction.fit(ALONE, WHOLE, 1e-5)


def test_without_two_plans_that_tell_something_whole_plans_add_what_their_groups_add() -> None:
    assert Interaction.fit([0.1, 1e-6], [0.5, 0.4], 1e-5).whole(0.2) == pytest.approx(0.2)
