"""Whether Ray has a place for so many groups, and the arithmetic for whoever asked."""

from collections.abc import Mapping

from quire.common.errors import ConfigError


def placement_refusal(
    free: Mapping[str, float],
    *,
    model: str,
    resource: str,
    ranks_per_group: int,
    num_placed: int,
    num_groups: int,
    spans_hosts: bool = False,
) -> ConfigError | None:
    """Why a model cannot have `num_groups` groups; None when it can. The ranks of a group lie on one node, unless it spans_hosts.

    free: what each node has left of `resource`, of which a rank takes one
    num_placed: groups that the model has in place, which is not free any more
    """
    num_more = num_groups - num_placed
    num_possible = int(sum(map(int, free.values())) // ranks_per_group)
    if not spans_hosts:
        num_possible = sum(int(left // ranks_per_group) for left in free.values())
    if num_more <= num_possible:
        return None
    ranks, groups, hosts = _count(ranks_per_group, "rank"), _count(num_placed, "group"), _count(len(free), "host")
    left = ", ".join(f"{amount:g}" for amount in free.values()) or "nothing"
    where = "" if spans_hosts else ", all of a group on one host"
    message = (
        f"model {model} has {groups} in place, and {num_groups} were asked for: {num_more} more of {ranks} each, a rank "
        f"taking 1 {resource}{where}; Ray has {left} {resource} left on its {hosts}, "
        f"room for {num_possible} more; ask for at most {num_placed + num_possible}, or add hosts to Ray"
    )
    numbers = {"groups": num_placed, "asked": num_groups, "possible": num_placed + num_possible, "ranks_per_group": ranks_per_group}
    return ConfigError(message, reason="NO_PLACE", metadata={name: str(number) for name, number in numbers.items()})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
