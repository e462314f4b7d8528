"""The program as typed in a shell: help, check, exit codes, what a server does before it loads a model."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import outrider
from outrider.cli import commands, sockets
from outrider.cli.check import check_file
from outrider.cli.help import serve_help
from outrider.cli.model_files import EMBEDDED_NAME, resolve_model
from outrider.cli.options import all_options
from outrider.cli.parser import read_yaml
from outrider.cli.schema import config_schema
from outrider.cli.serve import resolve_files
from outrider.cli.stats_line import stats_line
from outrider.config import EngineConfig, ServerConfig
from outrider.errors import ConfigError
from outrider.types import EngineStats


def outrider_program(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m outrider ARGV``."""
    return subprocess.run(
        [sys.executable, "-m", "outrider", *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_version_and_help() -> None:
    """Guards against a program that needs a model to say its name."""
    assert outrider_program("--version").stdout.strip() == outrider.__version__
    page = outrider_program("--help")
    assert page.returncode == 0 and "outrider serve --help" in page.stdout


@pytest.mark.parametrize("command", [c.name for c in commands.COMMANDS])
def test_every_command_in_the_table_explains_itself(command: str) -> None:
    """Guards against a row whose module is missing, or whose help loads torch first."""
    code = f"""
import sys
from outrider.cli.commands import main
try:
    code = main({command.split()} + ["--help"])
except SystemExit as end:
    code = end.code
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"outrider {command}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serv"], "did you mean serve?"),
        (["bench", "serv"], "did you mean bench serve?"),
        (["serve", "--port", "99999"], "out of range"),
        (["--port", "99999"], "out of range"),
        (["check", "--shema"], "--shema is not a flag of outrider check; did you mean --schema?"),
        (["bench", "serve", "--max_concurency", "3"], "did you mean --max-concurrency?"),
        (["check"], "FILE.yaml"),
        (["tests"], "'tests' is not a command"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a traceback, and against code 1 where scripts expect 2."""
    assert commands.main(argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_help_topics() -> None:
    """Guards against a topic that shows nothing or everything."""
    assert "--max-num-seqs" in serve_help("all") and "--max-num-seqs" in serve_help("Scheduler")
    assert "--port" not in serve_help("Scheduler")
    found = serve_help("max_num_batched")
    assert "--max-num-batched-tokens" in found and "--port" not in found
    assert all(option.flag in serve_help("all") for option in all_options().values())
    assert len(serve_help(None).splitlines()) < 40
    with pytest.raises(ConfigError, match="--help=all"):
        serve_help("xyzzy")


FAULTY = """\
model: somewhere
max-num-seqs: 0
enable-prefix-caching: "no"
max-numseq: 3
port: 99999
port: 8000
dtype: int3
override-generation-config: "{"
"""


def test_check_reports_every_error_with_its_line(tmp_path: Path) -> None:
    """Guards against one error per run: six faults, six lines, in the order of the file."""
    file = tmp_path / "faulty.yaml"
    file.write_text(FAULTY, encoding="utf-8")
    faults, built = check_file(file)
    assert [line for line, _ in faults] == [2, 3, 4, 6, 7, 8]
    assert built is None
    done = outrider_program("check", str(file))
    assert done.returncode == 2
    assert done.stderr.count(f"{file}:") == 7 and "6 errors" in done.stderr
    assert "did you mean max-num-seqs?" in done.stderr


def test_check_finds_settings_that_contradict_each_other(tmp_path: Path) -> None:
    """Guards against a file that passes the check and cannot start."""
    file = tmp_path / "c.yaml"
    file.write_text("max-num-seqs: 16\nmax-num-batched-tokens: 8\n", encoding="utf-8")
    faults, _ = check_file(file)
    assert len(faults) == 1 and "is below --max-num-seqs 16" in faults[0][1]


def test_check_of_a_good_file(tmp_path: Path) -> None:
    """Guards against refusing what serve takes: every kind of value, both spellings, units."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\nmax_model_len: auto\nmax-num-batched-tokens: 8k\ngpu-memory-utilization: 1\n"
        "served-model-name: [a, b]\napi_key: secret\nno-async-scheduling: true\ntokenizer: null\n"
        "compilation-config: {level: 3}\noverride-generation-config: '{\"top_p\": 1}'\ntrust-remote-code: true\n",
        encoding="utf-8",
    )
    done = outrider_program("check", str(file))
    assert done.returncode == 0, done.stderr
    assert "11 settings, no errors" in done.stdout and done.stdout.count("no effect") == 2
    assert read_yaml(file)["override_generation_config"] == {"top_p": 1}


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-2, 70_000),
    st.floats(-1, 2, allow_nan=False),
    st.sampled_from(["auto", "fp8", "8k", "8K", "x y", "0.5", "{}", "[]"]),
    st.lists(st.text("ab", min_size=1), max_size=2),
    st.dictionaries(st.text("ab", min_size=1), st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(all_options())), value=SCALARS)
def test_what_the_schema_refuses_serve_refuses(
    name: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Guards against a schema that is stricter than the program: an editor would mark good files."""
    file = tmp_path_factory.mktemp("schema") / "c.yaml"
    file.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    try:
        accepted = all_options()[name].fault(read_yaml(file)[name]) is None
    except ConfigError:
        accepted = False
    if accepted:
        assert Draft202012Validator(config_schema()).is_valid({name: value})


def test_schema_is_a_schema_and_knows_wrong_from_right() -> None:
    """Guards against a schema that accepts anything."""
    Draft202012Validator.check_schema(config_schema())
    validator = Draft202012Validator(config_schema())
    assert validator.is_valid({"port": 8000, "max_num_seqs": "1k", "no-enforce-eager": True})
    for wrong in ({"port": 70_000}, {"prt": 1}, {"dtype": "int3"}, {"enforce-eager": "yes"}, {"seed": 1.5}):
        assert not validator.is_valid(wrong), wrong


def test_a_port_in_use_fails_before_anything_is_loaded() -> None:
    """Guards against minutes of loading before 'address in use'."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = outrider_program("serve", "/absent-model", "--host", "127.0.0.1", "--port", port)
    assert done.returncode == 2
    assert f"127.0.0.1:{port} cannot be bound" in done.stderr and "use another --port" in done.stderr


def test_clients_are_refused_until_the_socket_listens() -> None:
    """Guards against clients that hang while the model loads: a bound port must refuse, not queue."""
    with sockets.bind(ServerConfig(host="127.0.0.1", port=0)) as sock, socket.socket() as client:
        assert client.connect_ex(sock.getsockname()) != 0
        assert sockets.url_of(sock, ServerConfig(host="127.0.0.1")).startswith("http://127.0.0.1:")


def test_open_file_limit_is_raised_as_far_as_allowed() -> None:
    """Guards against the 257th stream failing under a shell's soft limit, and against asking beyond the hard one."""
    code = """
import resource
from outrider.cli.sockets import raise_open_file_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
hard = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
raise_open_file_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_env_reports_versions_and_kernels() -> None:
    """Guards against a bug report without the facts: the installed torch, and a kernel for each operation."""
    done = outrider_program("env")
    assert done.returncode == 0, done.stderr
    assert f"torch: {importlib.metadata.version('torch')}\n" in done.stdout
    assert "kernel attention: " in done.stdout and "memory: " in done.stdout


def test_unix_socket_replaces_a_dead_one_and_nothing_else(tmp_path: Path) -> None:
    """Guards against deleting a user's file, or the socket of a server that is alive."""
    path = tmp_path / "s.sock"
    sockets.bind(ServerConfig(uds=str(path))).close()
    with sockets.bind(ServerConfig(uds=str(path))) as alive:
        alive.listen()
        with pytest.raises(ConfigError, match="cannot be bound"):
            sockets.bind(ServerConfig(uds=str(path)))
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(ConfigError, match="cannot be bound"):
        sockets.bind(ServerConfig(uds=str(file)))
    assert file.read_text() == "mine"


def test_model_may_be_a_folder_or_a_file(tmp_path: Path) -> None:
    """Guards against a local folder being looked up on the hub."""
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(file)) == file.resolve()
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model(str(tmp_path / "typo"))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be served"):
        resolve_model(str(tmp_path / "weights.bin"))


def test_hub_id_without_a_network(tmp_path: Path) -> None:
    """Guards against a stack of retries and tracebacks where one sentence helps."""
    done = outrider_program(
        "serve", "someone/some-model", "--port", "0", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)
    )
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr and "Traceback" not in done.stderr


def test_hub_id_in_the_cache_is_served_offline(tmp_path: Path) -> None:
    """Guards against a download that 'serve' cannot find again: the layout is the hub client's own."""
    repo = tmp_path / "hub/models--someone--some-model"
    snapshot = repo / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0123")
    code = "from outrider.cli.model_files import resolve_model; print(resolve_model('someone/some-model'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_names_and_keys_that_the_server_gets(tmp_path: Path) -> None:
    """Guards against answering to a path instead of the name that was typed, and against a lost key."""
    engine, server = resolve_files(
        EngineConfig(model=str(tmp_path)), ServerConfig(), {"VLLM_API_KEY": "old", "OUTRIDER_API_KEY": "new"}
    )
    assert engine.model == engine.tokenizer == str(tmp_path.resolve())
    assert (server.served_model_name, server.api_key) == ([str(tmp_path)], ["new"])
    _, server = resolve_files(EngineConfig(), ServerConfig(api_key=["typed"]), {"VLLM_API_KEY": "old"})
    assert (server.served_model_name, server.api_key) == ([EMBEDDED_NAME], ["typed"])
    _, server = resolve_files(EngineConfig(), ServerConfig(served_model_name=["a", "b"]), {})
    assert (server.served_model_name, server.api_key) == (["a", "b"], [])


def test_a_reader_that_leaves_is_no_error() -> None:
    """Guards against a BrokenPipeError's traceback after 'outrider env | head -1'."""
    command = f"{sys.executable} -m outrider env | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("outrider: ") and done.stderr == ""


def test_stats_line_is_about_the_interval() -> None:
    """Guards against totals where rates belong: two snapshots 10 s apart, figures worked out by hand."""
    before = EngineStats(
        prompt_tokens=100, generation_tokens=50, prefix_query_tokens=80, cached_prompt_tokens=80
    )
    now = EngineStats(
        num_running=3,
        num_waiting=2,
        kv_blocks_total=200,
        kv_blocks_used=25,
        prompt_tokens=1100,
        generation_tokens=300,
        prefix_query_tokens=1080,
        cached_prompt_tokens=330,
    )
    assert stats_line(before, now, 10.0) == (
        "Engine 000: Avg prompt throughput: 100.0 tokens/s, Avg generation throughput: 25.0 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )


def test_log_lines_have_the_usual_form() -> None:
    """Guards against a log format that existing collectors cannot parse."""
    code = (
        "import logging; from outrider.logs import setup_logging; setup_logging('APIServer');"
        "logging.getLogger('x').info('hello')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pattern = r"\(APIServer pid=\d+\) INFO \d\d-\d\d \d\d:\d\d:\d\d \[<?\w+(\.py|>)?:\d+\] hello\n"
    assert re.fullmatch(pattern, done.stderr), done.stderr
    assert logging.getLogger("x").level == logging.NOTSET
