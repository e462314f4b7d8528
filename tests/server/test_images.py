"""Images in chats: pixels and tokens against the fixtures of the model's own processor, hostile files, fetching."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from outrider.config import ServerConfig
from outrider.errors import ConfigError, MediaError
from outrider.models.config import VisionConfig
from outrider.server import media
from outrider.server.media import MediaLoader
from outrider.text import images
from outrider.text.images import ImageProcessor, ImageTokens, decode_image
from outrider.text.tokenizer import Tokenizer
from tests.server.conftest import TINY, Server, tiny_model_config

MakeServer = Callable[..., Server]
VISION = VisionConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=256,
    image_size=56,
    patch_size=14,
    pixel_shuffle_ratio=0.5,
    projector_input_dim=96,
    projector_output_dim=96,
    rope_theta=1e4,
    norm_eps=1e-5,
)
ONE_LEVEL = 0.012  # one step of an 8-bit value after normalisation, plus its rounding to bfloat16


@pytest.fixture(scope="module")
def processor(tokenizer: Tokenizer) -> ImageProcessor:
    loaded = ImageProcessor.load(TINY, tiny_model_config(vision=VISION), tokenizer.special_tokens)
    assert loaded is not None and loaded.max_tiles == 4 and loaded.patches_per_tile == 4
    return loaded


def fixture_images() -> list[dict[str, Any]]:
    return list(json.loads((TINY.parent / "refs.json").read_text())["images"])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize("index", range(3))
def test_pixels_agree_with_the_models_processor(processor: ImageProcessor, index: int) -> None:
    """Guards canvas, resize, padding, normalisation, tile order and the global tile, to one 8-bit level."""
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    facts = fixture_images()[index]
    processed = processor.process((TINY.parent / facts["file"]).read_bytes())
    with safe_open(str(TINY.parent / "refs.safetensors"), "pt") as file:
        expected = file.get_tensor(f"mm/p{index}/pixel_values")
    got = torch.frombuffer(bytearray(processed.pixels), dtype=torch.bfloat16).view(expected.shape)
    difference = (got.float() - expected.float()).abs()
    assert [processed.rows, processed.columns] == facts["aspect_ratio"]
    assert difference.max() <= ONE_LEVEL and (difference > 0).float().mean() < 0.03


def test_normalisation_rounds_after_each_step() -> None:
    """Guards the table of 256 values against the same arithmetic in torch's bfloat16."""
    torch = pytest.importorskip("torch")
    values = torch.arange(256, dtype=torch.bfloat16) * (1 / 255)
    expected = (values - 0.5) / 0.5
    assert images._BFLOAT16_OF_BYTE.tobytes() == expected.view(torch.int16).numpy().tobytes()


def test_grid_against_exact_arithmetic() -> None:
    """Guards the choice of canvas: brute force over all grids with fractions, for many sizes."""
    tokens = ImageTokens(0, 1, 2, 3, 4, 5)
    real = ImageProcessor(size=336, max_tiles=16, patches_per_tile=144, tokens=tokens)
    rng = random.Random()
    sizes = [(1, 1), (336, 336), (337, 336), (1344, 1344), (1, 50_000), (50_000, 1)]
    sizes += [(rng.randrange(1, 3000), rng.randrange(1, 3000)) for _ in range(300)]
    for height, width in sizes:
        grids = [(r, c) for r in range(1, 17) for c in range(1, 17) if r * c <= 16]
        scale = {g: min(Fraction(336 * g[0], height), Fraction(336 * g[1], width)) for g in grids}
        enlarging = [s for s in scale.values() if s >= 1]
        best = min(enlarging) if enlarging else max(scale.values())
        area = min(r * c for (r, c), s in scale.items() if s == best)
        rows, columns = real.grid(height, width)
        assert scale[rows, columns] == best and rows * columns == area, (height, width)


def test_tokens_agree_with_the_fixture(processor: ImageProcessor) -> None:
    """Guards separators, the order of tiles, and that spans point at exactly the patch tokens."""
    for facts in fixture_images():
        processed = processor.process((TINY.parent / facts["file"]).read_bytes())
        expected = facts["prompt"]
        start, end = expected.index(1005), expected.index(1006)
        ids, inputs = processor.expand([*expected[:start], 1009, *expected[end + 1 :]], [processed])
        assert ids == expected
        positions = [p for first, length in inputs[0].spans for p in range(first, first + length)]
        assert positions == [i for i, token in enumerate(ids) if token == 1010]
        assert len(inputs[0].pixels) == inputs[0].num_tiles * 3 * 56 * 56 * 2


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0" * 20
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"GIF89a",
        png_header(30_000, 30_000),
        png_header(10, 10),
        b"<svg/>",
        b"%PDF-1.4",
        b"\xff\xd8\xff",
    ],
    ids=["empty", "zeros", "gif", "bomb", "no pixels", "svg", "pdf", "jpeg"],
)
def test_files_that_are_refused(data: bytes) -> None:
    """Guards against decoder errors that leak, and against sizes that are only noticed after decoding."""
    with pytest.raises(MediaError) as caught:
        decode_image(data)
    assert "object at" not in caught.value.message and "cannot identify" not in caught.value.message


@pytest.mark.parametrize("side", [7_100, 30_000])
def test_too_many_pixels_are_refused_by_name(side: int) -> None:
    """Guards the reason: a header that claims too many pixels is not called a broken file."""
    with pytest.raises(MediaError, match="more than 50,000,000 pixels"):
        decode_image(png_header(side, side)[:33] + b"\0\0\0\x10IDAT" + b"\0" * 20)


def test_settings_that_change_the_pixels_are_not_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Guards against serving another normalisation or canvas than the checkpoint was trained with."""
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    changes = [{"image_mean": [0.48, 0.45, 0.4]}, {"image_std": [1, 1, 1]}, {"resize_to_max_canvas": True}]
    for change in changes:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(ConfigError, match=next(iter(change))):
            ImageProcessor.load(tmp_path, tiny_model_config(vision=VISION), tokenizer.special_tokens)


def test_too_many_bytes_are_refused() -> None:
    """Guards the bound on file size."""
    with pytest.raises(MediaError, match="MiB"):
        decode_image(b"\x89PNG" + bytes(images.MAX_BYTES))


def test_odd_images_are_served(processor: ImageProcessor) -> None:
    """Guards 1x1 and 1xN sizes and every colour mode and kind that people send."""
    noise = Image.effect_noise((40, 30), 90)
    files = [encoded(noise.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    files += [
        encoded(noise.convert("CMYK"), "JPEG"),
        encoded(noise, "WEBP"),
        encoded(noise.convert("RGB"), "BMP"),
    ]
    files += [encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)])]
    files += [encoded(Image.new("RGB", size)) for size in ((1, 1), (1, 3000), (3000, 1), (57, 56))]
    for data in files:
        processed = processor.process(data)
        assert len(processed.pixels) == processed.num_tiles * 3 * 56 * 56 * 2


def test_photographs_are_turned_upright(processor: ImageProcessor) -> None:
    """Guards EXIF orientation, without which phone photographs lie on their side."""
    image = Image.new("RGB", (60, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (30, 60)


@pytest.fixture
def seeing(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of a model with a vision tower."""
    from tests.server import conftest

    monkeypatch.setattr(conftest, "MODEL_PATH", str(TINY))
    return make_server(model={"vision": VISION})


def ask(server: Server, *urls: Any, text: str = "What is this?") -> Any:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return server.post("/v1/chat/completions", messages=messages, max_tokens=3)


def test_chat_with_images(seeing: Server) -> None:
    """Guards the whole way: two images in order, their spans, digests that tell contents apart."""
    files = [(TINY.parent / facts["file"]).read_bytes() for facts in fixture_images()]
    answer = ask(seeing, data_url(files[1]), data_url(files[0]))
    assert answer.status_code == 200, answer.text
    request = seeing.engine.submitted[0]
    assert [image.num_tiles for image in request.images] == [5, 1]
    assert request.prompt_token_ids.count(1010) == 24 == sum(n for i in request.images for _, n in i.spans)
    assert answer.json()["usage"]["prompt_tokens"] == len(request.prompt_token_ids)
    assert len({image.digest for image in request.images}) == 2
    ask(seeing, data_url(files[1]))
    assert seeing.engine.submitted[1].images[0].digest == request.images[0].digest


def test_placeholder_text_is_no_image(seeing: Server) -> None:
    """Guards against typed image tokens, which crashed other servers."""
    assert ask(seeing, text="<|image|><|patch|><|image_start|>").status_code == 200
    assert not {1005, 1009, 1010} & set(seeing.engine.submitted[0].prompt_token_ids)
    file = (TINY.parent / "image0.png").read_bytes()
    assert ask(seeing, data_url(file), text="<|image|>").status_code == 200
    assert seeing.engine.submitted[1].prompt_token_ids.count(1009) == 1


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:image/png;base64,@@@@", 422),
        ("data:image/png,abc", 422),
        ("data:image/png;base64,aGVsbG8=", 422),
        ("file:///etc/passwd", 422),
        ("http://127.0.0.1/x.png", 422),
        ("https://example.com/x.png", 422),
        ("http://[::1]/x.png", 422),
        ("gopher://example.com/", 422),
        ("", 422),
        ("http://", 422),
        ("http://exa mple", 422),
        (5, 400),
        (None, 400),
    ],
)
def test_urls_that_are_refused(seeing: Server, url: Any, status: int) -> None:
    """Guards that nothing is fetched by default and that every refusal is one clean sentence."""
    response = ask(seeing, url)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert "/" not in error["message"].replace("image/png", "") and "Error(" not in error["message"]
    assert not seeing.engine.submitted


def test_limits_of_count_and_model(make_server: MakeServer, seeing: Server) -> None:
    """Guards the number of images, and models that see none."""
    url = data_url(encoded(Image.new("RGB", (5, 5))))
    assert ask(seeing, *[url] * 33).status_code == 400
    blind = make_server()
    assert ask(blind, url).status_code == 400


class _Handler(BaseHTTPRequestHandler):
    seen: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/image")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(b"x" * (30 << 20) if self.path == "/large" else b"pixels")

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def web() -> Iterator[int]:
    """A web server on the loopback address; yields its port."""
    _Handler.seen = []
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def read(url: str, **config: Any) -> bytes:
    loader = MediaLoader(ImageProcessor(56, 4, 4, ImageTokens(0, 1, 2, 3, 4, 5)), ServerConfig(**config))
    return asyncio.run(loader._read(url))


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Make every name resolve to ``addresses``; returns the list of names that were asked for."""
    asked: list[str] = []

    async def getaddrinfo(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def test_fetching_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch, web: int) -> None:
    """Guards against DNS rebinding: one look-up, the connection goes to its answer, with the host's name."""
    asked = resolve_to(monkeypatch, "127.0.0.1")
    monkeypatch.setattr(media, "_PORTS", {"http": web})
    monkeypatch.setattr(media, "_is_public", lambda address: True)
    config = {"allowed_media_domains": ["Images.example"]}
    assert read(f"http://images.example:{web}/image", **config) == b"pixels"
    assert asked.count("images.example") == 1
    assert _Handler.seen == [("/image", "images.example")]
    for path in ("redirect", "large"):
        with pytest.raises(MediaError):
            read(f"http://images.example:{web}/{path}", **config)
    assert ("/image", "images.example") not in _Handler.seen[1:]
    for url in (f"http://other.example:{web}/image", f"http://u:p@images.example:{web}/image"):
        with pytest.raises(MediaError):
            read(url, **config)


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["10.1.2.3"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["fd00::1"],
        ["0.0.0.0"],
        ["100.64.0.1"],
        ["224.0.0.1"],
        ["2002:7f00:1::"],
        ["64:ff9b::a00:1"],
        ["93.184.215.14", "192.168.0.1"],
    ],
)
def test_private_addresses_are_never_contacted(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """Guards against an allowed name that points into the operator's own network."""
    resolve_to(monkeypatch, *addresses)
    with pytest.raises(MediaError, match="does not fetch"):
        read("http://images.example/x", allowed_media_domains=["images.example"])


def test_local_files_only_below_the_allowed_folder(tmp_path: Path) -> None:
    """Guards against path traversal and links out of --allowed-local-media-path."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (folder / "link").symlink_to(tmp_path / "secret")
    config = {"allowed_local_media_path": str(folder)}
    assert read(f"file://{folder}/a%20b.png", **config) == b"inside"
    for name in ("../secret", "link", "%2e%2e/secret", "missing", ""):
        with pytest.raises(MediaError):
            read(f"file://{folder}/{name}", **config)
