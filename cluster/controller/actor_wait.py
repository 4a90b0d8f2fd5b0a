"""Waiting for an actor's word, also over its deaths."""

from typing import Any

import ray


class ActorWait:
    """The answer of an actor's method that waits. Where the actor dies and Ray starts it anew, it is asked again."""

    def __init__(self, method: Any) -> None:
        self._method = method
        self._call = method.remote()

    def poll(self, *, timeout_s: float) -> str | None:
        """The answer, None if it is not there yet.

        Raises:
            RayError: the actor is gone for good.
        """
        if not ray.wait([self._call], timeout=timeout_s)[0]:
            return None
        try:
            return str(ray.get(self._call))
        except ray.exceptions.ActorUnavailableError:
            self._call = self._method.remote()
            return None
