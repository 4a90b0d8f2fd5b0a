"""A cluster on a Ray that is there already. What `quire controller` starts, watches and ends; the rest of that Ray is not touched."""

import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any, Final, Self

import ray

from quire.cluster.controller.actor_wait import ActorWait
from quire.cluster.controller.controller import CONTROLLER_NAME, NAMESPACE, Controller
from quire.cluster.controller.desired_state import has_state
from quire.cluster.controller.listen_address import split_address
from quire.cluster.controller.local_cluster import MAX_BASE_CHARS
from quire.cluster.controller.rank_actors import HEAD_RESOURCE
from quire.cluster.controller.stop_signals import StopSignals
from quire.common.config import ModelPlan, ServeConfig
from quire.common.curve import CLIENT_KEY, CurveKeys
from quire.common.errors import AlreadyExists, NotFound, Unavailable

# How long the controller may take to end what it started.
LEAVE_TIMEOUT_S: Final = 60.0
# How long Ray's store may take to accept a connection.
CONNECT_TIMEOUT_S: Final = 5.0
# How often is looked while waiting.
POLL_S: Final = 0.2


class RayConnection:
    """This process as a driver of somebody's Ray, for the time of a `with`. It works in an empty folder meanwhile (see
    LocalCluster): Ray's workers can import from the folder that their driver is in."""

    def __init__(self, address: str) -> None:
        """address: HOST:PORT of Ray's store, or "auto" for the one that RAY_ADDRESS or this host's files name."""
        self._address = address
        self._empty = Path(tempfile.mkdtemp(prefix="quire-driver-"))

    def __enter__(self) -> Self:
        if self._address != "auto":
            _check_answers(self._address)
        os.chdir(self._empty)
        try:
            ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # whatever Ray raises here, the message is what the user can act on
            raise Unavailable(f"Ray at {self._address} cannot be joined: {error}", reason="NO_RAY") from error
        return self

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        os.chdir("/")
        shutil.rmtree(self._empty, ignore_errors=True)


class JoinedCluster:
    """Starts a controller in `start`; it lives on without this process, until `stop` or `leave_ray` of another one."""

    def __init__(
        self,
        config: ServeConfig,
        plan: ModelPlan,
        stop: StopSignals,
        *,
        discovery_listen: str,
        scheduler_listen: str | None = None,
        keys: CurveKeys | None = None,
    ) -> None:
        self._config = config
        self._plan = plan
        self._stop = stop
        self._discovery_listen = discovery_listen
        self._scheduler_listen = scheduler_listen
        self._keys = keys  # None: new ones are made
        self._controller: Any = None
        self._over: ActorWait
        self._folder: Path
        self.metrics_address = ""  # of the controller, once it serves

    def start(self) -> str:
        """Start everything and wait until every group is ready; the address of discovery. "" when a signal came meanwhile.

        Raises:
            QuireError: it cannot serve; the message says why.
        """
        deadline_s = time.monotonic() + self._config.start_timeout_s
        if _find_controller() is not None:
            text = "a controller of Quire runs on this Ray already; end it with: quire controller --stop"
            raise AlreadyExists(text, reason="CONTROLLER_EXISTS")
        _check_head()
        base = tempfile.gettempdir()
        self._folder = folder = Path(tempfile.mkdtemp(prefix="quire-", dir=base if len(base) <= MAX_BASE_CHARS else "/tmp"))  # mode 0700
        (folder / "logs").mkdir()
        (self._keys or CurveKeys.of_hosts()).put_into(folder)
        rank_resource = "GPU" if self._plan.device == "cuda" else "CPU"
        options = Controller.options(name=CONTROLLER_NAME, lifetime="detached")
        self._controller = options.remote(
            self._config, self._plan, str(folder), rank_resource, self._discovery_listen, self._scheduler_listen
        )
        try:
            address, self.metrics_address = ray.get(self._controller.wait_listening.remote(), timeout=self._config.start_timeout_s)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise Unavailable(f"the controller could not start: {error} (logs: {folder}/logs)") from error
        self._over = ActorWait(self._controller.wait_over)
        ready = ActorWait(self._controller.wait_ready)
        while (reason := ready.poll(timeout_s=POLL_S)) is None:
            if self._stop.is_set():
                return ""
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the groups were not ready within {self._config.start_timeout_s:g} s (logs: {folder}/logs)")
        if reason:
            raise Unavailable(f"{reason} (logs: {folder}/logs)")
        return str(address)

    @property
    def cluster_key(self) -> str:
        """The file with the key that gateways of other hosts need."""
        return str(self._folder / CLIENT_KEY)

    def run(self) -> None:
        """Wait for a signal, or for somebody else to end the controller.

        Raises:
            Unavailable: nothing is left that could serve, or the controller died too often.
        """
        while not self._stop.is_set():
            try:
                reason = self._over.poll(timeout_s=POLL_S)
            except ray.exceptions.RayError as error:
                if not has_state(self._folder):
                    return  # somebody else ended it
                raise Unavailable(f"the controller is gone: {error}") from error
            if reason is not None:
                raise Unavailable(reason)

    def stop(self, *, keep_logs: bool) -> None:
        """End everything that was started; Ray stays."""
        if self._controller is not None:
            _end(self._controller, keep_logs=keep_logs)


def leave_ray() -> None:
    """End the controller that another process started, and everything of it.

    Raises:
        NotFound: there is none.
    """
    controller = _find_controller()
    if controller is None:
        raise NotFound("no controller of Quire runs on this Ray", reason="NO_CONTROLLER")
    _end(controller, keep_logs=False)


def _check_answers(address: str) -> None:
    """Ray itself would try for two minutes, and say so all the time."""
    try:
        socket.create_connection(split_address(address), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise Unavailable(f"nothing answers at Ray's address {address}: {error.strerror or error}", reason="NO_RAY") from None


def _find_controller() -> Any:
    try:
        return ray.get_actor(CONTROLLER_NAME)
    except ValueError:
        return None


def _check_head() -> None:
    """The controller and the scheduler are on Ray's head, and their folder, which we look into, is there."""
    own_node = ray.get_runtime_context().get_node_id()
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD_RESOURCE in node["Resources"]]
    if heads != [own_node]:
        text = "this host is not the head of that Ray; run quire controller on the head"
        raise Unavailable(text, reason="NOT_ON_HEAD")


def _end(controller: Any, *, keep_logs: bool) -> None:
    try:
        folder = ray.get(controller.leave.remote(), timeout=LEAVE_TIMEOUT_S)
    except ray.exceptions.ActorDiedError:
        return  # it could not even start, or somebody else was quicker
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise Unavailable(f"the controller did not end what it started within {LEAVE_TIMEOUT_S:g} s: {error}") from error
    ray.kill(controller)
    if not keep_logs:
        shutil.rmtree(folder, ignore_errors=True)
