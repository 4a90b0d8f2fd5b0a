"""What a controller must know again when Ray has started it anew: a file in the run's folder, written before anything is done."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from quire.cluster.controller.groups import GroupTable
from quire.common.errors import InternalError

FILE_NAME: Final = "controller.json"


@dataclass(slots=True)
class DesiredState:
    """The groups as they shall be, and the scheduler that plans for them."""

    table: GroupTable = field(default_factory=GroupTable)
    scheduler_id: str = ""  # of the latest scheduler, "" before the first
    num_schedulers: int = 0  # that there were, this one included
    discovery_port: int = 0  # at which discovery answers, if by TCP
    metrics_port: int = 0  # of the metrics page; 0 before the first controller has one


def load_state(folder: Path) -> DesiredState | None:
    """What the controller before this one left; None if this is the first.

    Raises:
        InternalError: the file is not one of ours.
    """
    try:
        contents = (folder / FILE_NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(contents, type=DesiredState)
    except msgspec.MsgspecError as error:
        raise InternalError(f"the controller's file {FILE_NAME} cannot be read: {error}") from error


def save_state(folder: Path, state: DesiredState) -> None:
    """Whole or not at all. It need not outlive the host, whose processes would be gone as well, so it is not synced."""
    temporary = folder / f"{FILE_NAME}.new"
    temporary.write_bytes(msgspec.json.encode(state))
    temporary.replace(folder / FILE_NAME)


def drop_state(folder: Path) -> None:
    """Nothing shall be any more."""
    (folder / FILE_NAME).unlink(missing_ok=True)


def has_state(folder: Path) -> bool:
    """Whether a controller is to live in this folder."""
    return (folder / FILE_NAME).exists()
