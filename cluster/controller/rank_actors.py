"""Ray's side of the groups' ranks: an actor per rank, all of a group in one place, found again by their names.

Actors and places are detached, so that they outlive the controller. Each term has its own, so that nothing of two terms meets.
"""

import asyncio
import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import ray
from ray._private.state import available_resources_per_node  # Ray tells it per node nowhere else
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quire.cluster.controller.early_ranks import early_names
from quire.cluster.controller.groups import Group
from quire.cluster.controller.process_actor import ProcessActor
from quire.common.errors import Unavailable
from quire.common.gpu import visible_gpus

# How long Ray may take to place a group whose resources are there.
PLACEMENT_TIMEOUT_S: Final = 60.0
# How long the actors may take to end their child in order before Ray kills them.
STOP_TIMEOUT_S: Final = 15.0
# How long the actors that a controller finds may take to say whether they have a child.
ADOPTION_TIMEOUT_S: Final = 10.0
# Ray's name for the node that its own store runs on. Controller and scheduler are there.
HEAD_RESOURCE: Final = "node:__internal_head__"
# Scheduler and controller ask for this much of it, and so do ranks that reach the scheduler by a socket that is a file.
HEAD_SHARE: Final = 0.001
# How much of Ray's pool of resources a rank takes.
RANK_SHARE: Final = 1.0


@dataclass(frozen=True, slots=True)
class Child:
    """What a rank's actor is to start."""

    spec: dict[str, Any]
    log_path: str


class RankActors:
    """The ranks of all groups. Calls for one group do not overlap, but for `end`, which ends what the others wait for."""

    def __init__(self, rank_resource: str, *, may_leave_head: bool = False, early_folder: str | None = None) -> None:
        """
        rank_resource: of which Ray resource a rank takes one
        may_leave_head: whether groups may be on other hosts than the scheduler
        early_folder: where ranks wait that began to load before there was a controller (early_ranks.py)
        """
        self._rank_resource = rank_resource
        self._may_leave_head = may_leave_head
        self._early_folder = early_folder
        self._actors: dict[str, list[Any]] = {}
        self._places: dict[str, PlacementGroup] = {}
        self.placed: dict[str, int] = {}  # groups whose place Ray has made, with their number of ranks

    def free_on_nodes(self) -> dict[str, float]:
        """What each of Ray's nodes that can hold ranks has left for them, by node id. Asks Ray's store.

        Ray tells with a delay what was taken; what we took ourselves is known, on the only node that it can have been taken from.
        """
        totals = {node["NodeID"]: float(node["Resources"].get(self._rank_resource, 0.0)) for node in ray.nodes() if node["Alive"]}
        nodes = available_resources_per_node()
        usable = {node: free for node, free in nodes.items() if node in totals and (self._may_leave_head or HEAD_RESOURCE in free)}
        taken = RANK_SHARE * sum(self.placed.values()) if len(usable) == 1 else 0.0
        return {node: min(float(free.get(self._rank_resource, 0.0)), totals[node] - taken) for node, free in usable.items()}

    async def start(self, group: Group, children: Sequence[Child]) -> None:
        """Place the group's ranks together and start them.

        Raises:
            Unavailable: Ray found no place, or they were ended meanwhile.
        """
        bundle = {self._rank_resource: RANK_SHARE} | ({} if self._may_leave_head else {HEAD_RESOURCE: HEAD_SHARE})
        bundles = [bundle] * group.tensor_parallel_size
        # On this host alone there is nothing to ask, and so no moment in which `end` could come before the place is known.
        several = self._may_leave_head and await asyncio.to_thread(self.needs_several_hosts, group.tensor_parallel_size)
        place = placement_group(bundles, strategy="PACK" if several else "STRICT_PACK", name=_place_name(group), lifetime="detached")
        self._places[group.group_id] = place
        try:
            await asyncio.wait_for(place.ready(), PLACEMENT_TIMEOUT_S)
        except TimeoutError:
            asked = f"{group.tensor_parallel_size} ranks of 1 {self._rank_resource} each on one host"
            there = f"{ray.cluster_resources().get(self._rank_resource, 0):g} {self._rank_resource}, others' included"
            text = f"Ray found no place for {asked} within {PLACEMENT_TIMEOUT_S:g} s; it has {there}"
            raise Unavailable(text, reason="NO_PLACE") from None
        if self._places.get(group.group_id) is not place:
            raise Unavailable("its place was given back before it was used")
        self.placed[group.group_id] = group.tensor_parallel_size
        # Ray hides GPUs from whoever asked for none.
        num_gpus = 1 if self._rank_resource == "GPU" else 0
        actors = []
        for rank in range(group.tensor_parallel_size):
            strategy = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=rank)
            options = ProcessActor.options(
                name=_actor_name(group, rank), lifetime="detached", num_gpus=num_gpus, scheduling_strategy=strategy
            )
            actors.append(options.remote())
        self._actors[group.group_id] = actors
        try:
            meeting = await self._meeting_specs(actors)
            environs = await self._environs(actors)
            early = await self._early(actors)
            await asyncio.gather(
                *(
                    actor.start.remote("quire.worker.rank_process", child.spec | spec, child.log_path, environ, early)
                    for actor, child, spec, environ in zip(actors, children, meeting, environs, strict=True)
                )
            )
        except ray.exceptions.RayActorError as error:
            raise Unavailable(f"an actor for a rank died before the rank was started: {error}") from error

    def needs_several_hosts(self, num_ranks: int) -> bool:
        """Whether groups may be elsewhere than here, and no host has as much as so many ranks take, used or not. Asks Ray's store."""
        if not self._may_leave_head:
            return False
        most = max((node["Resources"].get(self._rank_resource, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        return bool(most < num_ranks * RANK_SHARE)

    async def _meeting_specs(self, actors: Sequence[Any]) -> list[dict[str, str]]:
        """What ranks on several hosts must be told to find each other; those of one host meet at a file."""
        if not self._may_leave_head or len(actors) == 1:
            return [{}] * len(actors)
        found = await asyncio.gather(*(actor.meeting_place.remote() for actor in actors))
        if len({host for host, _ in found}) == 1:
            return [{}] * len(actors)
        return [{"rendezvous_address": found[0][1], "host_address": host} for host, _ in found]

    async def _environs(self, actors: Sequence[Any]) -> list[dict[str, str]]:
        """What ranks with a GPU each must see: Ray shows each its own alone."""
        if self._rank_resource != "GPU" or len(actors) == 1:
            return [{}] * len(actors)
        found = await asyncio.gather(*(actor.gpus.remote() for actor in actors))
        gpus = [gpu for of_rank in found for gpu in of_rank]
        return [{"CUDA_VISIBLE_DEVICES": visible_gpus(gpus, rank=rank)} for rank in range(len(actors))]

    async def _early(self, actors: Sequence[Any]) -> tuple[str, str] | None:
        """Where early ranks may be, and the names of those that can be this group's: with a GPU, those that have that one."""
        if self._early_folder is None or len(actors) > 1:
            return None
        return self._early_folder, early_names((await actors[0].gpus.remote())[0] if self._rank_resource == "GPU" else None)

    async def adopt(self, group: Group) -> bool:
        """Take the ranks that a controller before this one started under the group's ranks_term; whether all are there, each with a
        child, dead or alive."""
        try:
            actors = [await asyncio.to_thread(ray.get_actor, _actor_name(group, rank)) for rank in range(group.tensor_parallel_size)]
            place = await asyncio.to_thread(ray.util.get_placement_group, _place_name(group))
            pids = await asyncio.wait_for(asyncio.gather(*(actor.pid.remote() for actor in actors)), ADOPTION_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayActorError, TimeoutError):
            return False
        if None in pids:
            return False
        self._actors[group.group_id] = actors
        self._places[group.group_id] = place
        self.placed[group.group_id] = group.tensor_parallel_size
        return True

    async def first_end(self, group: Group) -> tuple[int, int | None, str] | None:
        """Wait for the first rank that ends: which one, its exit code, None if its actor died, and what it left as its report. None if
        we ended them ourselves."""
        actors = self._actors.get(group.group_id)
        if actors is None:
            return None
        ends = [asyncio.ensure_future(_end_of(rank, actor)) for rank, actor in enumerate(actors)]
        done, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in pending:
            end.cancel()
        return next(iter(done)).result() if self._actors.get(group.group_id) is actors else None

    async def end(self, group_id: str, *, is_lost: bool, folder: str | None = None) -> None:
        """End a group's ranks and give their place back.

        is_lost: whatever they do, at once
        folder: the run's, for its end: removed from hosts where the controller is not
        """
        actors = self._actors.pop(group_id, [])
        await asyncio.gather(*(stop_child(actor, is_lost=is_lost) for actor in actors))
        if folder is not None:
            await asyncio.gather(*(_remove_folder(actor, folder) for actor in actors))
        place = self._places.pop(group_id, None)
        self.placed.pop(group_id, None)
        await asyncio.to_thread(_give_back, actors, [place] if place is not None else [])

    async def end_leftovers(self, group_id: str) -> None:
        """End at once what a controller before this one started for a group, under any term."""
        await asyncio.to_thread(lambda: _give_back(*_leftovers(group_id)))

    async def end_children(self) -> None:
        """End all ranks in order; actors and places are left for Ray, which is ending too and may answer no more."""
        await asyncio.gather(*(stop_child(actor) for actors in self._actors.values() for actor in actors))


async def stop_child(actor: Any, *, is_lost: bool = False) -> None:
    """End an actor's child, in order or at once."""
    with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
        await asyncio.wait_for(actor.kill.remote() if is_lost else actor.stop.remote(), STOP_TIMEOUT_S)


async def _remove_folder(actor: Any, folder: str) -> None:
    with contextlib.suppress(ray.exceptions.RayActorError, TimeoutError):
        await asyncio.wait_for(actor.remove_folder.remote(folder), STOP_TIMEOUT_S)


async def _end_of(rank: int, actor: Any) -> tuple[int, int | None, str]:
    try:
        return rank, await actor.wait.remote(), await actor.report.remote()
    except ray.exceptions.RayActorError:
        return rank, None, ""


def _actor_name(group: Group, rank: int) -> str:
    return f"quire-{group.group_id}-{rank}-{group.ranks_term}"


def _place_name(group: Group) -> str:
    return f"quire-{group.group_id}-{group.ranks_term}"


def _leftovers(group_id: str) -> tuple[list[Any], list[PlacementGroup]]:
    """What Ray has of a group, by name."""
    name = re.compile(rf"quire-{re.escape(group_id)}-[-0-9]+")
    actors = []
    for found in filter(name.fullmatch, ray.util.list_named_actors()):
        with contextlib.suppress(ValueError):  # it went by itself
            actors.append(ray.get_actor(found))
    places = []
    for found in {place["name"] for place in placement_group_table().values() if place["state"] != "REMOVED"}:
        if name.fullmatch(found):
            with contextlib.suppress(ValueError):
                places.append(ray.util.get_placement_group(found))
    return actors, places


def _give_back(actors: list[Any], places: list[PlacementGroup]) -> None:
    """Give actors and places back to Ray. Blocks for as long as Ray's store does not answer."""
    for actor in actors:
        ray.kill(actor)
    for place in places:
        ray.util.remove_placement_group(place)
