"""Bytes of the images that a chat names: data: URLs, and files or hosts that the operator has allowed.

Remote fetching is off unless ``--allowed-media-domains`` names the host. One parser reads a URL, its host is resolved
once, every address must be public, and the connection goes to that address; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx

from outrider.config import ServerConfig
from outrider.errors import MediaError, RequestError
from outrider.text.images import MAX_BYTES, ImageProcessor, ProcessedImage

DEFAULT_MAX_IMAGES = 32
FETCH_TIMEOUT_S = 5.0
MAX_DECODING = 2  # decoders at work at once; each may need 400 MB
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # leads to IPv4 addresses that are not checked
_PORTS = {"http": 80, "https": 443}


class MediaLoader:
    """Fetches and processes images; one per application."""

    def __init__(self, processor: ImageProcessor, config: ServerConfig) -> None:
        self.processor = processor
        self._domains = frozenset(domain.lower() for domain in config.allowed_media_domains)
        self._folder = (
            Path(config.allowed_local_media_path).resolve() if config.allowed_local_media_path else None
        )
        self._max_images = _max_images(config.limit_mm_per_prompt)
        self._decoding = asyncio.Semaphore(MAX_DECODING)

    async def load(self, urls: Sequence[str]) -> list[ProcessedImage]:
        """The images behind ``urls``, in order; ``RequestError`` or ``MediaError`` for the first that fails."""
        if len(urls) > self._max_images:
            raise RequestError(
                f"At most {self._max_images} image(s) may be provided in one prompt, got {len(urls)}.",
                param="messages",
            )
        return [await self._image(url) for url in urls]

    async def _image(self, url: str) -> ProcessedImage:
        data = await self._read(url)
        async with self._decoding:
            return await asyncio.to_thread(self.processor.process, data)

    async def _read(self, url: str) -> bytes:
        scheme = url.partition(":")[0].lower()
        if scheme == "data":
            return await asyncio.to_thread(_decode_data_url, url)
        if scheme == "file":
            return await asyncio.to_thread(self._read_file, url)
        try:
            return await asyncio.wait_for(self._fetch(url), FETCH_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, UnicodeError) as error:
            raise _refused("The image could not be fetched; send it as a data: URL.") from error

    def _read_file(self, url: str) -> bytes:
        if self._folder is None:
            raise _refused("file: URLs are not allowed here; send a data: URL.")
        path = Path(unquote(url.removeprefix("file://"))).resolve()
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise _refused("The file is not below the folder that this server allows.")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)

    async def _fetch(self, url: str) -> bytes:
        target = httpx.URL(url)
        host = target.host.lower().rstrip(".")
        port = target.port or _PORTS.get(target.scheme)
        if target.scheme not in _PORTS or port != _PORTS[target.scheme] or target.userinfo:
            raise _refused(
                "Image URLs must be data:, http: or https: on the usual port, without user or password."
            )
        if host not in self._domains:
            raise _refused("This server does not fetch images from that host; send a data: URL.")
        address = await _public_address(host, port)
        pinned = target.copy_with(host=address)
        headers = {"Host": host, "Accept": "image/*"}
        async with httpx.AsyncClient(
            follow_redirects=False, timeout=FETCH_TIMEOUT_S, trust_env=False
        ) as client:
            request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": host})
            response = await client.send(request, stream=True)
            try:
                if response.status_code != 200:
                    raise _refused("The image's host did not answer with the image itself.")
                return await _read_bounded(response)
            finally:
                await response.aclose()


async def _read_bounded(response: httpx.Response) -> bytes:
    chunks, size = [], 0
    async for chunk in response.aiter_bytes():
        size += len(chunk)
        if size > MAX_BYTES:
            raise _refused(f"The image has more than {MAX_BYTES >> 20} MiB; send a smaller one.")
        chunks.append(chunk)
    return b"".join(chunks)


async def _public_address(host: str, port: int) -> str:
    """The address to connect to; refuses a name of which any address is private, local or reserved."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise _refused("This server does not fetch images from that host; send a data: URL.")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    inner = mapped or address
    return inner.is_global and not inner.is_multicast and not (inner.version == 6 and inner in _NAT64)


def _decode_data_url(url: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("data: URLs must look like data:image/png;base64,....")
    if len(payload) > MAX_BYTES * 4 // 3 + 4:
        raise _refused(f"The image has more than {MAX_BYTES >> 20} MiB; send a smaller one.")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise _refused("The data: URL is not valid base64.") from error


def _max_images(limits: dict[str, Any]) -> int:
    limit = limits.get("image", DEFAULT_MAX_IMAGES)
    return int(limit.get("count", DEFAULT_MAX_IMAGES) if isinstance(limit, dict) else limit)


def _refused(message: str) -> MediaError:
    return MediaError(message, param="image_url")
