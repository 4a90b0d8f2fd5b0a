"""Models by their id on a hub: the files that serving needs, brought into the hub's own cache on this machine."""

import re
from pathlib import Path
from typing import Final

from quire.common.errors import ConfigError

# Everything that is read of a model, and nothing else: not the same weights in other formats, no code, no pictures.
MODEL_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "model.safetensors",
    "model-*.safetensors",
)
# How long the hub may take to answer before it counts as out of reach.
HUB_TIMEOUT_S: Final = 5.0

_HUB_ID: Final = re.compile(r"(?P<repository>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def is_hub_id(model: str) -> bool:
    """Whether this can only be an id, organisation/name or organisation/name@revision: a folder of that name goes before."""
    return _HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def hub_name(model: str) -> str:
    """The id without a revision."""
    return model.partition("@")[0]


def fetch_model(model: str) -> Path:
    """The folder of a model in the hub's cache, brought up to date if the hub can be reached.

    The environment of huggingface_hub holds: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Raises:
        ConfigError: the hub does not have it or does not give it, or it cannot be reached and the cache has no copy.
    """
    from huggingface_hub import errors, snapshot_download  # seconds, for those who name a folder

    match = _HUB_ID.fullmatch(model)
    assert match is not None, model
    try:
        folder = snapshot_download(
            match["repository"], revision=match["revision"], allow_patterns=list(MODEL_FILES), etag_timeout=HUB_TIMEOUT_S
        )
    except errors.GatedRepoError as error:
        text = f"model {model} is given only to those who accepted its terms; do so on its page, and set HF_TOKEN"
        raise ConfigError(text, reason="MODEL_NOT_FOUND") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        text = f"{model} is neither a folder here nor a model on the hub (one that is not public needs HF_TOKEN); check its name"
        raise ConfigError(text, reason="MODEL_NOT_FOUND") from error
    except errors.LocalEntryNotFoundError as error:
        text = (
            f"{model} is no folder here, and the hub cannot be reached, nor does this machine's cache have it; name a folder, or fetch "
            f"it where there is a network: hf download {match['repository']}"
        )
        raise ConfigError(text, reason="HUB_OUT_OF_REACH") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        text = f"model {model} cannot be fetched from the hub: {str(error).strip().splitlines()[0]}"
        raise ConfigError(text, reason="HUB_OUT_OF_REACH") from error
    return Path(folder)
