"""Bodies and bytes that somebody might send to hurt a server: made here, sent by ``test_hostile``."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

Body = tuple[str, str, bytes]
"""A name, a path and a body."""

COMPLETION = '"max_tokens":2,"prompt":[1,2,3]'
CHAT = '"max_tokens":2,"messages":[{"role":"user","content":"x"}]'
RESPONSE = '"max_output_tokens":2,"input":"x"'
TOOL = '"tools":[{"type":"function","function":{"name":"f","parameters":{"properties":{"q":@@}}}}]'
PATHS = {
    COMPLETION: "/v1/completions",
    CHAT: "/v1/chat/completions",
    RESPONSE: "/v1/responses",
}

VALUE_PLACES = (
    (RESPONSE, '"metadata":{"a":@@}'),
    (RESPONSE, '"text":{"format":{"type":"text"},"z":@@}'),
    (RESPONSE, '"tools":[{"type":"function","name":"f","parameters":{"a":@@}}]'),
    (CHAT, '"chat_template_kwargs":{"a":@@}'),
    (CHAT, TOOL),
    (CHAT, TOOL + ',"tool_choice":"required"'),
    (CHAT, '"documents":[{"a":@@}]'),
    (CHAT, '"response_format":{"type":"json_schema","json_schema":{"name":"s","schema":{"properties":{"q":@@}}}}'),
    (COMPLETION, '"guided_json":{"properties":{"q":@@}}'),
    (COMPLETION, '"structured_outputs":{"json":{"q":@@},"disable_additional_properties":true}'),
    (COMPLETION, '"prompt_embeds":@@'),
    (COMPLETION, '"unknown":@@'),
)  # fmt: skip
NUMBER_PLACES = (
    *(f'"{name}":@@' for name in ("temperature", "seed", "top_k", "logprobs", "n", "min_tokens", "priority")),
    '"stop_token_ids":[@@]', '"logit_bias":{"5":@@}', '"guided_json":{"type":"integer","minimum":@@}',
    '"guided_json":{"type":"string","maxLength":@@}', '"truncate_prompt_tokens":@@', '"presence_penalty":@@',
)  # fmt: skip
NUMBERS = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "9" * 6000, str(2**63), str(2**64), str(-(2**63) - 1),
    "1e308", "-0", "-0.0", "1.0", "01", "0x1", "0." + "1" * 5000, "1e" + "9" * 400, "1e-" + "9" * 400,
)  # fmt: skip
TEXT_PLACES = (
    *((COMPLETION, place) for place in (
        '"stop":@@', '"cache_salt":@@', '"request_id":@@', '"model":@@', '"user":@@', '"guided_regex":@@',
        '"guided_choice":[@@,"b"]', '"guided_grammar":@@', '"guided_json":@@', '"guided_json":{"enum":[@@]}',
        '"guided_json":{"type":"object","properties":{@@:{"type":"integer"}},"required":[@@]}',
        '"guided_json":{"type":"string","pattern":@@}', '@@:1', '"logit_bias":{@@:1}',
    )),
    *((CHAT, place) for place in (
        '"chat_template_kwargs":{@@:1}', '"chat_template_kwargs":{"date_string":@@}', '"tool_choice":@@',
        '"tools":[{"type":"function","function":{"name":@@}}]', '"documents":[{"title":@@}]',
        '"tools":[{"type":"function","function":{"name":"f","description":@@}}]',
    )),
    *((RESPONSE, place) for place in ('"metadata":{@@:@@}', '"instructions":@@,"user":@@')),
    (RESPONSE, '"previous_response_id":@@'),
)  # fmt: skip
TEXTS = {
    "surrogate": rb'"\ud800"',
    "second surrogate": rb'"a\udfffb"',
    "surrogates reversed": rb'"\udc00\ud800"',
    "zero": rb'"\u0000"',
    "encoded surrogate": b'"\xed\xa0\x80"',
    "no UTF-8": b'"\xff\xfe"',
    "overlong": b'"\xc0\x80"',
    "no character": rb'"\uffff"',
    "long": b'"' + b"a" * 30_000 + b'"',
}
WHOLE = {
    "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"1", "rest": b'{"prompt":[1]}x',
    "spaces": b" " * 1000, "UTF-16": '{"prompt":"x"}'.encode("utf-16"), "BOM": b'\xef\xbb\xbf{"prompt":"x"}',
    "zeros": b"\0" * 100, "deep": b"[" * 100_000, "deep objects": b'{"a":' * 50_000,
}  # fmt: skip


def bodies() -> Iterator[Body]:
    """JSON that is nested, numeric or textual beyond all reason, in every field that takes it."""
    for depth in (100, 450, 480, 600, 950, 5000):
        for value in ("[" * depth + "1" + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            for base, place in VALUE_PLACES:
                yield (
                    f"depth {depth}: {place}",
                    PATHS[base],
                    f"{{{base},{place.replace('@@', value)}}}".encode(),
                )
    for number in NUMBERS:
        for place in NUMBER_PLACES:
            body = f"{{{COMPLETION},{place.replace('@@', number)}}}"
            yield f"{number[:12]}: {place}", PATHS[COMPLETION], body.encode()
        for base, place in VALUE_PLACES:
            yield f"{number[:12]}: {place}", PATHS[base], f"{{{base},{place.replace('@@', number)}}}".encode()
    for name, text in TEXTS.items():
        for base, place in TEXT_PLACES:
            yield f"{name}: {place}", PATHS[base], f"{{{base},{place}}}".encode().replace(b"@@", text)
        for path, body in (
            ("/v1/completions", b'{"prompt":@@}'),
            ("/v1/completions", b'{"prompt":[@@,"x"]}'),
            ("/v1/chat/completions", b'{"max_tokens":1,"messages":[{"role":"user","content":@@,"name":@@}]}'),
            ("/v1/chat/completions", b'{"messages":[{"role":@@,"content":"x"}]}'),
            ("/v1/responses", b'{"input":@@,"max_output_tokens":1}'),
            ("/tokenize", b'{"prompt":@@,"return_token_strs":true}'),
        ):
            yield f"{name}: {body.decode()}", path, body.replace(b"@@", text)
    for name, whole in WHOLE.items():
        for path in (*PATHS.values(), "/tokenize", "/detokenize"):
            yield name, path, whole


def heavy_bodies() -> Iterator[Body]:
    """Bodies within the size limit whose decoding or whose work would take seconds or gigabytes."""
    lists = b"[]," * 2_000_000 + b"[]"
    yield "lists", "/v1/responses", b'{"input":"x","metadata":{"a":[' + lists + b"]}}"
    yield (
        "lists of a tool",
        "/v1/chat/completions",
        ("{" + CHAT + "," + TOOL + "}").encode().replace(b"@@", lists),
    )
    yield "parts", "/v1/chat/completions", (
        b'{"messages":[{"role":"user","content":[' + b'{"type":"text","text":""},' * 500_000 + b"{}]}]}"
    )  # fmt: skip
    yield "texts", "/v1/completions", b'{"prompt":[1],"guided_choice":[' + b'"a",' * 1_000_000 + b'"a"]}'
    yield "ids", "/detokenize", b'{"tokens":[' + b"5," * 5_000_000 + b"5]}"
    yield "more ids", "/detokenize", b'{"tokens":[' + b"5," * 1_500_000 + b"5]}"
    escaped = rb'"\\\"[[[{{{\"",' * 300_000
    yield "escapes", "/v1/completions", b'{"prompt":[1],"guided_choice":[' + escaped + b'"a"]}'


def _request(line: bytes, headers: bytes = b"", body: bytes = b"") -> bytes:
    return line + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n" + body


_POST, _GET, _JSON = b"POST /v1/completions", b"GET /livez", b"Content-Type: application/json\r\n"
RAW = {
    "bytes in the path": _request(b"GET /\xff\xfe"),
    "escapes in the path": _request(b"GET /v1/responses/%ff%00%0d%0a"),
    "web socket": _request(_GET, b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"),
    "h2c": _request(_GET, b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\n"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "CONNECT": _request(b"CONNECT a:1"),
    "TRACE": _request(b"TRACE /livez"),
    "negative length": _request(_POST, b"Content-Length: -1\r\n"),
    "two lengths": _request(_POST, b"Content-Length: 2\r\nContent-Length: 3\r\n", b"{}"),
    "length and chunks": _request(_POST, b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    "no chunk": _request(_POST, b"Transfer-Encoding: chunked\r\n", b"zz\r\n"),
    "huge chunk": _request(_POST, b"Transfer-Encoding: chunked\r\n", b"f" * 18 + b"\r\n"),
    "huge length": _request(_POST, b"Content-Length: " + b"9" * 5000 + b"\r\n"),
    "zero in a header": _request(_GET, b"A: \0\r\n"),
    "folded header": _request(_GET, b"A: b\r\n c\r\n"),
    "request id": _request(_POST, _JSON + b"X-Request-Id: \xff\r\nContent-Length: 14\r\n", b'{"prompt":"x"}'),
    "content type": _request(_POST, b"Content-Type: \xff\r\nContent-Length: 2\r\n", b"{}"),
    "multipart": _request(_POST, b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 2\r\n", b"{}"),
    "trailers": _request(
        _POST, _JSON + b"Transfer-Encoding: chunked\r\n", b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * 500 + b"\r\n"
    ),
    "long method": b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "pipeline": _request(_GET) * 200,
}  # fmt: skip


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, extra: bytes = b"", real_rows: int | None = None) -> bytes:
    """A black picture; ``real_rows`` fewer than its header says, ``extra`` chunks before the pixels."""
    compressor = zlib.compressobj(9)
    rows = height if real_rows is None else real_rows
    data = b"".join(compressor.compress(bytes(1 + 3 * width)) for _ in range(rows)) + compressor.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + extra + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def images() -> dict[str, bytes]:
    """Files that lie about their size, unfold to gigabytes, or are none."""
    bomb = zlib.compress(bytes(100_000_000), 9)
    bmp = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54 + 1024, 40, 7000, 7000, 1, 8, 1, 0, 0, 0, 0, 0)
    return {
        "60,000 x 60,000": png(60_000, 60_000, real_rows=1),
        "a line of 49 million": png(49_000_000, 1, real_rows=0),
        "a column of 66,000": png(1, 66_000),
        "text of 100 MB": png(8, 8, _chunk(b"zTXt", b"k\0\0" + bomb)),
        "profile of 100 MB": png(8, 8, _chunk(b"iCCP", b"k\0\0" + bomb)),
        "cut short": png(1000, 1000)[:200],
        "BMP with runs": b"BM" + bmp + bytes(1024) + b"\xff\x01" * 10 + b"\0\1",
        "garbage": b"\x89PNG\r\n\x1a\n" + bytes(1000),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "TIFF": b"II*\0" + bytes(100),
        "nothing": b"",
    }
