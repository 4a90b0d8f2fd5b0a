"""The version of this package, by which builds tell themselves apart."""

from importlib import metadata
from typing import Final

UNKNOWN_VERSION: Final = "0+source"


def quire_version() -> str:
    """As installed; UNKNOWN_VERSION where the source runs without having been installed."""
    try:
        return metadata.version("quire")
    except metadata.PackageNotFoundError:
        return UNKNOWN_VERSION
