"""Room for more groups, and the arithmetic of a refusal."""

import pytest

from quire.cluster.controller.placement import placement_refusal


@pytest.mark.parametrize(
    ("free", "ranks_per_group", "num_placed", "num_groups", "possible"),
    [
        ({"a": 2.0}, 1, 1, 3, None),
        ({"a": 2.0}, 1, 1, 4, 3),
        ({"a": 3.0, "b": 1.0}, 2, 0, 1, None),
        ({"a": 3.0, "b": 1.0}, 2, 0, 2, 1),  # four in all, but no host has two more
        ({"a": 0.0}, 4, 2, 2, None),
        ({}, 1, 5, 0, None),
        ({}, 1, 0, 1, 0),
    ],
)
def test_a_group_has_its_ranks_on_one_host(
    free: dict[str, float], ranks_per_group: int, num_placed: int, num_groups: int, possible: int | None
) -> None:
    refusal = placement_refusal(
        free, model="m", resource="GPU", ranks_per_group=ranks_per_group, num_placed=num_placed, num_groups=num_groups
    )
    assert (refusal is None) == (possible is None)
    if refusal is not None:
        assert (refusal.reason, refusal.metadata["possible"]) == ("NO_PLACE", str(possible))


def test_a_refusal_says_what_was_asked_what_there_is_and_what_to_change() -> None:
    refusal = placement_refusal({"a": 3.0, "b": 1.0}, model="m", resource="GPU", ranks_per_group=2, num_placed=2, num_groups=5)
    assert refusal is not None
    assert refusal.message == (
        "model m has 2 groups in place, and 5 were asked for: 3 more of 2 ranks each, a rank taking 1 GPU, all of a group on one host; "
        "Ray has 3, 1 GPU left on its 2 hosts, room for 1 more; ask for at most 3, or add hosts to Ray"
    )

    refusal = placement_refusal({"a": 0.0}, model="m", resource="GPU", ranks_per_group=1, num_placed=1, num_groups=2)
    assert refusal is not None
    assert refusal.message == (
        "model m has 1 group in place, and 2 were asked for: 1 more of 1 rank each, a rank taking 1 GPU, all of a group on one host; "
        "Ray has 0 GPU left on its 1 host, room for 0 more; ask for at most 1, or add hosts to Ray"
    )


def test_a_group_that_spans_hosts_takes_what_all_of_them_have_left() -> None:
    how = {"model": "m", "resource": "GPU", "ranks_per_group": 4, "num_placed": 0, "spans_hosts": True}
    assert placement_refusal({"a": 2.0, "b": 3.0}, num_groups=1, **how) is None  # type: ignore[arg-type]
    refusal = placement_refusal({"a": 2.0, "b": 3.0}, num_groups=2, **how)  # type: ignore[arg-type]
    assert refusal is not None
    assert refusal.metadata["possible"] == "1"
    assert "on one host" not in refusal.message
