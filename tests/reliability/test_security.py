"""What an attacker would try first. Each test names the mistake, most of them made by servers of this kind before."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from outrider.cli.parser import parse_serve
from outrider.cli.serve import api_keys
from outrider.config import ServerConfig
from outrider.engine.kv_manager import KVManager
from outrider.engine.sequence import Sequence
from outrider.errors import ConfigError, OutriderError
from outrider.kv_layout import KVLayout
from outrider.models.config_hf import load_model_config
from outrider.models.gguf import embedded_model_path, read_gguf_header
from outrider.models.registry import open_weights
from outrider.text.images import ImageProcessor
from outrider.text.tokenizer import Tokenizer
from outrider.types import Request, SamplingParams
from tests.reliability.server import ROOT, SMALL, TINY, Server, scaled

PACKAGE = ROOT / "outrider"
KEYS = ("first-key-7f3a", "second-key-91bc")
OPEN_PATHS = {"/livez", "/readyz", "/health", "/ping"}


def listeners(pids: list[int]) -> list[tuple[int, str]]:
    """``(pid, local address)`` of every TCP or UDP socket on which one of the processes waits for strangers."""
    inodes: dict[str, int] = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes[target[8:-1]] = pid
    found = []
    for table, states in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == states and columns[9] in inodes:
                found.append((inodes[columns[9]], columns[1]))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_exactly_one_listening_socket(ranks: int) -> None:
    """Guards against a door that nobody watches: collectives, rendezvous and debug ports included."""
    parallel = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
    with Server(*SMALL, *parallel) as server:
        server.complete()
        pids = server.family()
        assert len(pids) == (2 if ranks == 1 else 2 + ranks)
        assert [pid for pid, _ in listeners(pids)] == [server.process.pid]


# -- keys --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two keys in a file, logging requests."""
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("\n".join(KEYS) + "\n")
    flags = ("--api-key-file", str(file), "--enable-log-requests", "--uvicorn-log-level", "trace")
    with Server(*SMALL, *flags, env={"OUTRIDER_LOGGING_LEVEL": "info"}) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"}


def test_every_route_but_the_probes_needs_the_key(keyed: Server) -> None:
    """Guards against routes that somebody forgot, by walking the application's own route table."""
    routes = keyed.get("/openapi.json", headers=bearer(KEYS[0])).json()["paths"]
    assert {"/v1/completions", "/metrics", "/server_info", "/tokenize"} <= set(routes)
    hidden = [
        "/docs",
        "/redoc",
        "/openapi.json",
        "/v1/responses",
        "/nowhere",
        "/V1/models",
        "//v1/models",
        "/v1/models/",
    ]
    for path in [*routes, *hidden]:
        for method in ("GET", "POST", "HEAD", "DELETE", "PUT", "PATCH"):
            for headers in (
                {},
                bearer("wrong"),
                bearer(KEYS[0][:-1]),
                {"Authorization": KEYS[0]},
            ):
                answer = httpx.request(method, keyed.url + path, headers=headers)
                if path in OPEN_PATHS:
                    assert answer.status_code != 401
                    break
                assert answer.status_code == 401, (method, path, headers)
                if method != "HEAD":
                    assert answer.json() == {"error": "Unauthorized"}
    for key in KEYS:
        assert keyed.get("/v1/models", headers=bearer(key)).status_code == 200


def test_keys_and_prompts_are_not_logged(keyed: Server) -> None:
    """Guards against secrets in logs: keys, right or wrong, and what people write."""
    secret = "my-own-secret-prompt"
    for key in (*KEYS, "wrong-key-5521"):
        keyed.post("/v1/completions", {"prompt": secret, "max_tokens": 2}, headers=bearer(key))
        messages = [{"role": "user", "content": secret}]
        keyed.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2}, headers=bearer(key))
        keyed.post("/v1/completions", {"prompt": secret, "max_tokens": "x"}, headers=bearer(key))
    time.sleep(0.5)
    for word in (secret, "wrong-key", *KEYS):
        assert word not in keyed.log


def test_keys_come_from_flag_file_or_environment(tmp_path: Path) -> None:
    """Guards against a key that is given and then not asked for, above all through an empty file."""
    file = tmp_path / "keys"
    file.write_text("  b \n\nc\n")
    assert api_keys(ServerConfig(api_key=["a"], api_key_file=str(file)), {"OUTRIDER_API_KEY": "d"}) == [
        "a",
        "b",
        "c",
    ]
    assert api_keys(ServerConfig(), {"OUTRIDER_API_KEY": "d"}) == ["d"]
    assert api_keys(ServerConfig(), {"VLLM_API_KEY": "e"}) == ["e"]
    for text in ("", " \n\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match="holds no key"):
            api_keys(ServerConfig(api_key_file=str(file)), {})
    with pytest.raises(ConfigError, match="cannot be read"):
        api_keys(ServerConfig(api_key_file=str(tmp_path / "none")), {})


def test_keys_of_the_command_line_are_hidden() -> None:
    """Guards against the start-up line that repeats the flags, key included."""
    settings = parse_serve(["--api-key", "abc-secret", "--hf-token", "def-secret"])
    assert settings.server.api_key == ["abc-secret"]
    assert "secret" not in repr(settings.given) + repr(settings.notes)


def test_keys_are_compared_in_constant_time() -> None:
    """Guards against ``==`` on secrets: the gate compares digests with ``hmac.compare_digest`` and nothing else."""
    source = (PACKAGE / "server" / "middleware.py").read_text()
    function = next(n for n in ast.walk(ast.parse(source)) if getattr(n, "name", "") == "_tenant")
    text = ast.unparse(function)
    assert "compare_digest" in text and "sha256" in text
    compared = [ast.unparse(n) for n in ast.walk(function) if isinstance(n, ast.Compare)]
    assert sorted(compared) == ["len(self._digests) > 1", "scheme.lower() != b'bearer'"]


# -- the prefix cache --------------------------------------------------------------------------------


def test_prefix_cache_is_salted_per_key(keyed: Server) -> None:
    """Guards against reading another customer's prompts by timing: equal prompts share blocks under one key only."""
    prompt = [random.Random(1).randrange(900) for _ in range(200)]

    def cached(key: str, **fields: Any) -> int:
        before = keyed.get("/server_info", headers=bearer(key)).json()["stats"]["cached_prompt_tokens"]
        body = {"prompt": prompt, "max_tokens": 1, **fields}
        assert keyed.post("/v1/completions", body, headers=bearer(key)).status_code == 200
        time.sleep(0.3)
        return (
            int(keyed.get("/server_info", headers=bearer(key)).json()["stats"]["cached_prompt_tokens"])
            - before
        )

    assert cached(KEYS[0]) == 0 and cached(KEYS[0]) > 150
    assert cached(KEYS[1]) == 0 and cached(KEYS[1]) > 150
    assert cached(KEYS[0], cache_salt="mine") == 0 and cached(KEYS[0], cache_salt="mine") > 150
    assert cached(KEYS[1], cache_salt="mine") == 0


def test_cache_keys_are_secret_to_the_process() -> None:
    """Guards against digests that somebody outside can compute and collide: two processes never agree."""
    request = Request(request_id="r", prompt_token_ids=list(range(64)), sampling=SamplingParams(max_tokens=1))
    layout = KVLayout(((0,),), (False,), None, 16)
    digests = [KVManager(layout, 20, True)._keys(Sequence(request, 0, 1), 4) for _ in range(2)]
    assert not set(digests[0]) & set(digests[1])


# -- files of a checkpoint ---------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tiny checkpoint, writable."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def test_code_of_a_checkpoint_is_never_opened(copy: Path) -> None:
    """Guards against ``auto_map`` and friends, also with --trust-remote-code: the file is not even looked at."""
    witness = copy.parent / "witness"
    evil = f"open({str(witness)!r}, 'w').write('ran')\n"
    for name in (
        "modeling_evil.py",
        "configuration_evil.py",
        "tokenization_evil.py",
        "__init__.py",
        "setup.py",
    ):
        (copy / name).write_text(evil)
    for name in ("config.json", "tokenizer_config.json"):
        data = json.loads((copy / name).read_text())
        data["auto_map"] = {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", None],
        }
        (copy / name).write_text(json.dumps(data))
    past = time.time() - 10**6
    for file in copy.glob("*.py"):
        os.utime(file, (past, past))
    command = [sys.executable, "-X", "importtime", "-c", AUDITED_SERVE, str(copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "opened" not in done.stdout and not witness.exists(), done.stdout
    assert "loaded" in done.stdout, done.stderr[-2000:]


AUDITED_SERVE = """
import sys
folder = sys.argv[1]
def watch(event, args):
    if event == "open" and str(args[0]).startswith(folder) and str(args[0]).endswith(".py"):
        print("opened", args[0])
sys.addaudithook(watch)
from outrider.config import EngineConfig
from outrider.runner.setup import build_engine
from outrider.text.tokenizer import Tokenizer
from outrider.cli.parser import parse_serve
settings = parse_serve([folder, "--trust-remote-code", "--max-model-len", "64", "--device", "cpu",
                        "--num-gpu-blocks-override", "64"])
build_engine(settings.engine, lambda *p: None)
Tokenizer.load(folder)
print("loaded")
"""

JSON_JUNK: list[Any] = [None, True, -1, 0, 2**63, 1e308, "", "x" * 100, [], {}, [[[]]], {"a": {}}]


def mutated_json(rng: random.Random, value: Any) -> Any:
    """``value`` with one or two places replaced by junk, removed, or nested."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        out = dict(value)
        name = rng.choice(list(out))
        if rng.random() < 0.2:
            del out[name]
        else:
            out[name] = mutated_json(rng, out[name])
        return out
    return rng.choice(JSON_JUNK)


def test_configs_are_fuzzed(copy: Path) -> None:
    """Guards against a config that ends in a traceback, an endless loop or a huge allocation instead of a sentence."""
    rng = random.Random(2)
    original = json.loads((copy / "config.json").read_text())
    for _ in range(scaled(400, 10_000)):
        (copy / "config.json").write_text(json.dumps(mutated_json(rng, original)))
        try:
            load_model_config(copy)
        except OutriderError as error:
            assert len(str(error)) < 1000
    for text in (b"", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000):
        (copy / "config.json").write_bytes(text)
        with pytest.raises(OutriderError):
            load_model_config(copy)


COMPANIONS: dict[str, tuple[str, ...]] = {
    "generation_config.json": (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "eos_token_id",
    ),
    "hf_quant_config.json": ("quantization", "producer"),
    "tokenizer_config.json": ("chat_template", "bos_token", "eos_token"),
    "chat_template.json": ("chat_template",),
    "preprocessor_config.json": ("max_patches", "size"),
}


@pytest.mark.parametrize("name", COMPANIONS)
def test_companions_of_a_config_are_checked(copy: Path, name: str) -> None:
    """Guards against a small file that ends the start, or every request, in a traceback instead of a sentence."""
    special = Tokenizer.load(copy).special_tokens
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    original = json.loads((copy / name).read_text()) if (copy / name).exists() else {}

    def load() -> None:
        try:
            config = load_model_config(copy)
            Tokenizer.load(copy)
            ImageProcessor.load(copy, config, special)
        except OutriderError as error:
            assert len(str(error)) < 1000
        else:
            assert all(isinstance(value, int | float) for value in config.generation.values())

    for key in COMPANIONS[name]:
        for junk in (*JSON_JUNK, 10**400, float("nan"), "\ud800", [None], [{"name": 1}]):
            (copy / name).write_text(json.dumps({**original, key: junk}))
            load()
    for raw in (b"", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000):
        (copy / name).write_bytes(raw)
        load()


def test_numbers_of_layers_are_bounded(copy: Path) -> None:
    """Guards against a config whose per-layer lists fill the memory before anything else is checked."""
    config = json.loads((copy / "config.json").read_text())
    for part in (config["text_config"], config["vision_config"]):
        kept, part["num_hidden_layers"] = part["num_hidden_layers"], 2**40
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(OutriderError, match="num_hidden_layers"):
            load_model_config(copy)
        part["num_hidden_layers"] = kept


def test_safetensors_headers_are_bounded_and_fuzzed(tmp_path: Path) -> None:
    """Guards against offsets outside the file, overlaps, lying sizes and endless headers."""
    rng = random.Random(4)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    source = next(TINY.glob("*.safetensors")).read_bytes()
    (size,) = struct.unpack("<Q", source[:8])
    header, body = source[8 : 8 + size], source[8 + size : 8 + size + 50_000]
    heads: list[bytes] = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**63, 2**64 - 1)]
    for head in heads:
        file.write_bytes(head + header + body)
        with pytest.raises(OutriderError):
            open_weights(tmp_path)
    parsed = json.loads(header)
    names = [name for name in parsed if name != "__metadata__"]
    for _ in range(scaled(200, 5000)):
        changed = json.loads(header)
        entry = changed[rng.choice(names)]
        kind = rng.randrange(4)
        if kind == 0:
            entry["data_offsets"] = rng.choice(([0, 2**63], [-1, 5], [10, 5], [0, 8], ["a", 1], []))
        elif kind == 1:
            entry["shape"] = rng.choice(([2**62, 2**62], [-1], [0], "x", None))
        elif kind == 2:
            entry["dtype"] = rng.choice(("F7", "", 3, None, "OBJECT"))
        else:
            changed = mutated_json(rng, changed)
        text = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
        try:
            open_weights(tmp_path)
        except OutriderError as error:
            assert "Traceback" not in str(error)


def test_gguf_headers_are_bounded_and_fuzzed(tmp_path: Path) -> None:
    """Guards against counts and lengths that a GGUF file makes up: an error in bounded time, never an allocation."""
    rng = random.Random(6)
    with embedded_model_path().open("rb") as stream:
        source = stream.read(3_000_000)
    file = tmp_path / "model.gguf"
    for index in range(scaled(60, 2000)):
        data = bytearray(source)
        for _ in range(rng.randrange(1, 4)):
            where = rng.randrange(4, 4000 if index % 2 else len(data) - 8)
            data[where : where + 8] = rng.choice(
                (b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**62), rng.randbytes(8))
            )
        file.write_bytes(bytes(data[: rng.choice((len(data), 100, 5000, 1_000_000))]))
        start = time.monotonic()
        try:
            read_gguf_header(file)
        except OutriderError as error:
            assert len(str(error)) < 1000
        assert time.monotonic() - start < 10


def test_tokenizer_files_are_fuzzed(copy: Path) -> None:
    """Guards against a tokenizer that crashes the process or hangs it instead of being refused."""
    rng = random.Random(7)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = json.loads((copy / name).read_text())
        for _ in range(scaled(25, 1000)):
            (copy / name).write_text(json.dumps(mutated_json(rng, original)))
            try:
                Tokenizer.load(str(copy))
            except OutriderError as error:
                assert len(str(error)) < 1000
        (copy / name).write_text(json.dumps(original))


# -- user text ---------------------------------------------------------------------------------------


def test_user_text_never_becomes_control_tokens(server: Server) -> None:
    """Guards against prompts that write headers, images or turns: every special token, in every field."""
    tokenizer = Tokenizer.load(str(TINY))
    special = sorted(tokenizer.special_ids)
    names = [tokenizer.token_name(i) for i in special]
    assert len(names) >= 30
    text = " ".join(names)
    ids = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert not set(ids) & set(special)

    def specials(messages: list[Any], **fields: Any) -> list[int]:
        answer = server.post("/tokenize", {"messages": messages, **fields})
        assert answer.status_code == 200, answer.text
        return [i for i in answer.json()["tokens"] if i in set(special)]

    def calls(arguments: str) -> list[Any]:
        return [
            {
                "id": arguments[:40],
                "type": "function",
                "function": {"name": "f", "arguments": json.dumps({"a": arguments})},
            }
        ]

    def tool(words: str) -> list[Any]:
        parameters = {"type": "object", "properties": {"p": {"type": "string", "description": words}}}
        return [
            {"type": "function", "function": {"name": "f", "description": words, "parameters": parameters}}
        ]

    def conversation(words: str) -> list[Any]:
        return [
            {"role": "system", "content": words},
            {"role": "user", "content": words},
            {"role": "assistant", "content": words, "tool_calls": calls(words)},
            {"role": "tool", "content": words, "tool_call_id": "x"},
            {"role": "user", "content": [{"type": "text", "text": words}], "name": words},
        ]

    for tools in ({}, {"with": True}):
        plain, hostile = ({"tools": tool(w)} if tools else {} for w in ("hello", text))
        assert specials(conversation("hello"), **plain) == specials(conversation(text), **hostile)


def test_remote_images_are_off(server: Server) -> None:
    """Guards against a server that fetches what clients name: nothing leaves it unless the operator allowed a host."""
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.5)
        port = trap.getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/a.png",
            f"http://localhost:{port}/a.png",
            f"//127.0.0.1:{port}/a.png",
        ):
            content = [{"type": "image_url", "image_url": {"url": url}}]
            answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
            assert answer.status_code in (400, 422), answer.text
        with pytest.raises(TimeoutError):
            trap.accept()


# -- regular expressions -----------------------------------------------------------------------------


def patterns() -> Iterator[tuple[str, str]]:
    """``(place, pattern)`` of every regular expression in the sources."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re.") and node.args):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield f"{path.name}:{node.lineno}", first.value


def test_no_nested_quantifiers() -> None:
    """Guards against patterns whose time explodes on chosen text: no repetition of something that itself repeats."""
    import re._parser as parser
    from re._constants import MAX_REPEAT, MAXREPEAT, MIN_REPEAT

    def nested(tree: Any, inside: bool) -> bool:
        for operator, argument in tree:
            if operator in (MAX_REPEAT, MIN_REPEAT):
                low, high, inner = argument
                unbounded = high is MAXREPEAT and low != high
                if unbounded and inside:
                    return True
                if nested(inner, inside or unbounded):
                    return True
            elif isinstance(argument, tuple | list):
                for part in argument:
                    parts = part if isinstance(part, list) else [part]
                    if any(isinstance(p, parser.SubPattern) and nested(p, inside) for p in parts):
                        return True
        return False

    found = list(patterns())
    assert len(found) > 5
    assert nested(parser.parse("(a+)+$"), False) and not nested(parser.parse("a+b+"), False)
    for place, pattern in found:
        assert not nested(parser.parse(pattern), False), (place, pattern)


def test_nothing_unpickles() -> None:
    """Guards against the oldest hole of these servers: bytes from elsewhere that become objects with code."""
    words = re.compile(
        r"\b(pickle|dill|cloudpickle|marshal|shelve|recv_pyobj|jsonpickle|torch\.load|weights_only)\b"
    )
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#")[0]
            if words.search(code):
                assert '"""' in code or "never" in code.lower(), f"{path.name}:{number}: {line}"
