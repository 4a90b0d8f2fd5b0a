"""`quire key new`: makes the keys of a cluster before there is one, for hosts that get them from somewhere else than its run folder."""

import argparse
from pathlib import Path

from quire.common.curve import CLIENT_KEY, CLUSTER_KEY, CurveKeys
from quire.common.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"Make the keys by which the parts of a cluster on several hosts know each other: FOLDER/{CLUSTER_KEY} for the controller "
        f"(quire controller --cluster-key), and its part FOLDER/{CLIENT_KEY} for gateways (quire gateway --cluster-key)."
    )
    parser.add_argument("what", choices=("new",), metavar="new")
    parser.add_argument("folder", metavar="FOLDER", help="where they go; it must hold none yet")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        CurveKeys.of_hosts().put_into(folder)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} is there already; a cluster's key is not overwritten") from None
    except OSError as error:
        raise ConfigError(f"the keys cannot be written to {folder}: {error.strerror}") from None
    print(f"{folder / CLUSTER_KEY}  for quire controller")
    print(f"{folder / CLIENT_KEY}   for quire gateway")
    return 0
