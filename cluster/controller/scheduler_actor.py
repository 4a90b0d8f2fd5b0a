"""The scheduler's Ray actor: one per scheduler, with its id in its name, on the head. It outlives the controller."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from quire.cluster.controller.process_actor import ProcessActor
from quire.cluster.controller.rank_actors import HEAD_RESOURCE, HEAD_SHARE
from quire.cluster.scheduler.process import ProcessConfig
from quire.cluster.scheduler.scheduler import SchedulerConfig


async def start_scheduler(process: ProcessConfig, scheduler: SchedulerConfig, journal: str | None, *, log_path: Path) -> Any:
    """Start a scheduler; its actor."""
    options = ProcessActor.options(name=_name(scheduler.scheduler_id), lifetime="detached", resources={HEAD_RESOURCE: HEAD_SHARE})
    actor = options.remote()
    spec = {"process": asdict(process), "scheduler": asdict(scheduler), "journal": journal}
    await actor.start.remote("quire.cluster.scheduler.process", spec, str(log_path))
    return actor


async def find_scheduler(scheduler_id: str) -> Any:
    """The actor of a scheduler that a controller before this one started; None if it is not there, or holds none."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, _name(scheduler_id))
        return actor if await actor.pid.remote() is not None else None
    except (ValueError, ray.exceptions.RayActorError):
        return None


def _name(scheduler_id: str) -> str:
    return f"quire-scheduler-{scheduler_id}"
