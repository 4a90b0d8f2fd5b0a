"""The settings as flags, for commands that start a cluster. A value comes from a flag, the environment, or the config file."""

import argparse
import os
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from quire.common.config import ModelConfig, ServeConfig, resolve_config, setting_type
from quire.common.errors import ConfigError

_SETTING_NAMES = {setting.name for cls in (ServeConfig, ModelConfig) for setting in fields(cls)} - {"models"}


def add_setting_arguments(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """Flags for the model and every setting. without: settings that this command does not take."""
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        help="folder of the model, or its id on the hub (organisation/name, perhaps with @revision); the built-in model when not given",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; those of the model under `models:`, a list of one")
    for cls in (ServeConfig, ModelConfig):
        group = parser.add_argument_group("model" if cls is ModelConfig else "server")
        for setting in fields(cls):
            if setting.name not in ("model", "models", *without):
                add_setting(group, cls, setting.name, setting.default, setting.metadata)


def read_settings(args: argparse.Namespace) -> ServeConfig:
    """The settings as resolved.

    Raises:
        ConfigError: one of them cannot be; the message names its source.
    """
    flags = {name: value for name, value in vars(args).items() if name in _SETTING_NAMES}
    return resolve_config(flags, file=_read_config_file(args.config))


def add_setting(group: Any, cls: type, name: str, default: Any, metadata: Any) -> None:
    """A flag for one setting. Its value stays text: `resolve_config` reads flags, environment and file by the same rules."""
    flag = f"--{name.replace('_', '-')}"
    shown = "" if default is None else f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    kind, _ = setting_type(cls, name)
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=metadata["help"] + shown)
        return
    metavar = (
        "|".join(metadata["choices"]) if metadata["choices"] else "BYTES" if metadata["is_bytes"] else {int: "N", float: "S"}.get(kind)
    )
    group.add_argument(flag, metavar=metavar, default=argparse.SUPPRESS, help=metadata["help"] + shown)


def _read_config_file(path: str | None) -> dict[str, Any]:
    path = path or os.environ.get("QUIRE_CONFIG")
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the config file {path} is not YAML: {str(error).splitlines()[0]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"the config file {path} must hold a mapping of settings")
    return values
