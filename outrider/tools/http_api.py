"""The little that every tool needs of a running server: its address, its key, the name of its model.

Used by chat, complete, the benchmarks and the evaluation. Talks HTTP only.
"""

from __future__ import annotations

import os

import httpx

from outrider.errors import ConfigError


def base_url(host: str, port: int) -> str:
    """URL of a server by host and port; the listen-on-all address 0.0.0.0 is reached as 127.0.0.1."""
    name = "127.0.0.1" if host == "0.0.0.0" else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def bearer(api_key: str | None = None) -> dict[str, str]:
    """The Authorization header for ``api_key`` or OPENAI_API_KEY; none when neither is set."""
    key = api_key or os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def first_model(url: str, headers: dict[str, str], *, verify: bool = True) -> str:
    """The first name of ``GET {url}/v1/models``. Raises ConfigError when the server does not tell one."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, verify=verify, timeout=10.0)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except httpx.TransportError as error:
        raise ConfigError(f"No server answers at {url} ({error}); start one or fix the address.") from error
    except httpx.HTTPStatusError as error:
        message = (
            f"{url}/v1/models answers {error.response.status_code}; give the API key or the model's name."
        )
        raise ConfigError(message) from error
    except (LookupError, ValueError, TypeError) as error:
        raise ConfigError(f"{url}/v1/models names no model; give its name.") from error


def model_root(url: str, headers: dict[str, str], model: str, *, verify: bool = True) -> str | None:
    """The ``root`` (checkpoint folder or hub id) that ``/v1/models`` tells of ``model``, if it tells one."""
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, verify=verify, timeout=10.0)
        entries = answer.raise_for_status().json()["data"]
        return next(
            (str(entry["root"]) for entry in entries if entry["id"] == model and "root" in entry), None
        )
    except (httpx.HTTPError, LookupError, ValueError, TypeError):
        return None
