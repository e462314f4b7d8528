"""From what the user typed as MODEL to files on disk: embedded, a folder, a ``.gguf`` file, or a hub id.

Called by ``cli/serve.py`` before the engine starts, so that the engine process never talks to the network.
Reads no weights and never runs code that a checkpoint ships.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from outrider.errors import ConfigError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"

_TEXT_FILES = ["*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    weights: bool = True,
) -> Path:
    """The folder or ``.gguf`` file of ``model``; a hub id is fetched unless the cache has it.

    ``weights`` False fetches only configuration and tokenizer. Raises ConfigError with what to change.
    """
    if not model:
        from outrider.models.gguf import embedded_model_path

        return embedded_model_path()
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.resolve()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise ConfigError(f"{model} is a file that cannot be served; give a .gguf file or a model folder.")
    if model.startswith(("/", ".", "~")) or model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        raise ConfigError(f"{model} does not exist; give a model folder, a .gguf file or a hub id.")
    return _fetch(model, revision, download_dir, token, weights)


def _fetch(model: str, revision: str | None, folder: str | None, token: str | None, weights: bool) -> Path:
    """Download with the hub client, which resumes and draws its own bar; offline it looks in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_TEXT_FILES, "*.safetensors"] if weights else _TEXT_FILES
    try:
        found = snapshot_download(
            model,
            revision=revision,
            cache_dir=folder,
            token=token or None,
            allow_patterns=patterns,
            ignore_patterns=["original/*"],
        )
    except GatedRepoError:
        raise ConfigError(
            f"{model} is gated on the hub; accept its licence there and set HF_TOKEN."
        ) from None
    except LocalEntryNotFoundError:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise ConfigError(
            f"{model} is neither a local folder nor in the hub cache, and {why}; "
            "give a local folder or run 'outrider download' first."
        ) from None
    except HfHubHTTPError as error:
        raise ConfigError(f"{model} cannot be fetched from the hub: {' '.join(str(error).split())}") from None
    return Path(found)
