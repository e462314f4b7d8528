"""Command lines written for vLLM, and mistakes in them."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from outrider.cli.parser import parse_serve
from outrider.errors import ConfigError

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
RECIPE = SHARED / "recipe/llama4-scout-on-vllm.md"

# The command of the recipe, kept here too so that the test has an oracle where the shared folder is absent.
SCOUT = (
    "nvidia/Llama-4-Scout-17B-16E-Instruct-FP8 --host 0.0.0.0 --port 8080 "
    "--tokenizer nvidia/Llama-4-Scout-17B-16E-Instruct-FP8 --quantization modelopt --kv-cache-dtype fp8 "
    "--trust-remote-code --gpu-memory-utilization 0.9 "
    """--compilation-config '{"pass_config": {"enable_fi_allreduce_fusion": true}, """
    """"custom_ops": ["+rms_norm"], "level": 3}' """
    "--enable-chunked-prefill --async-scheduling --no-enable-prefix-caching --disable-log-requests "
    "--pipeline-parallel-size 1 --tensor-parallel-size 1 --max-num-seqs 512 --max-num-batched-tokens 8192 "
    "--max-model-len 9216"
)

# The common flags of vLLM 0.26, one line each, as people write them.
COMMON = """\
--uds /tmp/x.sock
--uvicorn-log-level warning
--disable-uvicorn-access-log
--disable-access-log-for-endpoints /health,/metrics
--allow-credentials
--allowed-origins '["https://a.example"]'
--allowed-methods '["GET", "POST"]'
--allowed-headers '["*"]'
--api-key one two
--ssl-keyfile k --ssl-certfile c --ssl-ca-certs a --ssl-cert-reqs 2 --ssl-ciphers TLSv1
--root-path /v
--middleware a.b --middleware c.d
--enable-request-id-headers
--disable-fastapi-docs
--h11-max-incomplete-event-size 4194304 --h11-max-header-count 256
--log-config-file f --max-log-len 100
-dpl 1 -dpa localhost -dpp 1 -dpb mp -dph -dpe -dpm --data-parallel-rank 0 --data-parallel-start-rank 0
--enable-server-load-tracking --enable-force-include-usage --enable-prompt-tokens-details
--enable-tokenizer-info-endpoint --log-error-stack --enable-per-request-metrics
--fingerprint-mode full --fingerprint-value x
--api-server-count 1
--headless
--shutdown-timeout 5
--enable-log-requests --enable-log-outputs --no-enable-log-deltas --disable-log-stats
--chat-template '{{ messages }}' --chat-template-content-format openai
--default-chat-template-kwargs '{"a": 1}'
--response-role assistant
--enable-auto-tool-choice --tool-call-parser llama4_pythonic --tool-parser-plugin p.py
--exclude-tools-when-tool-choice-none --reasoning-parser r --return-tokens-as-token-ids
--served-model-name a b
--dtype bfloat16 --seed 7 --revision main --code-revision main --tokenizer-revision main
--tokenizer-mode auto --skip-tokenizer-init --max-logprobs -1 --logprobs-mode raw_logprobs
--enforce-eager --hf-overrides '{}' --hf-token t
--generation-config vllm --override-generation-config '{"temperature": 0.5}'
--enable-sleep-mode --model-impl auto --allowed-local-media-path / --allowed-media-domains a.example
--load-format dummy --download-dir /d --model-loader-extra-config '{}' --ignore-patterns 'original/*'
--safetensors-load-strategy lazy --no-use-tqdm-on-load
--block-size 16 --kv-cache-memory-bytes 4G --num-gpu-blocks-override 100
--prefix-caching-hash-algo sha256 --calculate-kv-scales --cpu-offload-gb 0 --swap-space 4
-tp 2 -pp 1 -dp 1 -ep -q modelopt
--distributed-executor-backend mp --nnodes 1 --node-rank 0 --master-addr h --master-port 29501
--disable-custom-all-reduce --moe-backend auto --attention-backend auto --all2all-backend x
--scheduling-policy priority --stream-interval 1 --max-num-partial-prefills 1
--long-prefill-token-threshold 0 --disable-hybrid-kv-cache-manager --disable-chunked-mm-input
--limit-mm-per-prompt '{"image": 5}' --language-model-only --mm-processor-kwargs '{}'
--mm-processor-cache-gb 4 --media-io-kwargs '{}' --skip-mm-profiling
--enable-lora --max-loras 1 --max-lora-rank 16 --lora-modules a=b
--speculative-config '{"method": "ngram"}' -O2 --performance-mode balanced
--cudagraph-capture-sizes 1 2 4 --max-cudagraph-capture-size 512
--structured-outputs-config '{"backend": "auto"}' --kv-transfer-config '{}' --additional-config '{}'
--task generate --use-v2-block-manager --disable-frontend-multiprocessing --max-seq-len-to-capture 8k
--otlp-traces-endpoint u --collect-detailed-traces all --kv-cache-metrics --cudagraph-metrics
"""


def serve_lines() -> list[str]:
    """The serve commands of the recipe as it is, else the copy above."""
    if not RECIPE.exists():
        return [SCOUT]
    text = RECIPE.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^vllm serve (.*)$", text, re.M)


@pytest.mark.parametrize("line", [SCOUT, *serve_lines()])
def test_recipe_serve_line_as_typed(line: str) -> None:
    """Guards against any flag of the recipe being refused, dropped or read as something else."""
    settings = parse_serve(shlex.split(line))
    engine, server = settings.engine, settings.server
    assert engine.model == engine.tokenizer and engine.model.startswith("nvidia/Llama-4-Scout")
    assert engine.quantization == ("modelopt_fp4" if engine.model.endswith("FP4") else "modelopt")
    assert (server.host, server.port) == ("0.0.0.0", 8080)
    assert (engine.max_num_seqs, engine.max_num_batched_tokens, engine.max_model_len) == (512, 8192, 9216)
    assert (engine.enable_prefix_caching, engine.async_scheduling, engine.kv_cache_dtype) == (
        False,
        True,
        "fp8",
    )
    assert not server.enable_log_requests
    assert len(settings.notes) == 2 and all("no effect" in note for note in settings.notes)


@pytest.mark.parametrize("line", COMMON.splitlines())
def test_common_flags_are_understood(line: str) -> None:
    """Guards against a start script that dies on a flag which vLLM takes."""
    given = parse_serve(shlex.split(line)).given
    flags = re.findall(r"(?:^| )(--?[a-zA-Z][\w-]*)", re.sub(r"'[^']*'", "", line))
    assert len(given) == len(set(flags))


@pytest.mark.parametrize(
    "typed",
    [
        "--max_model_len 8192",
        "--max-model-len=8192",
        "--max_model_len=8K",
        "--max-model 8192",
        "--max-model-len 8.192k",
    ],
)
def test_spellings_of_one_flag(typed: str) -> None:
    """Guards against a spelling of the same flag that means something else."""
    assert parse_serve(typed.split()).engine.max_model_len == 8192


@pytest.mark.parametrize("word", ["auto", "-1", "None"])
def test_max_model_len_auto(word: str) -> None:
    """Guards against -1 being refused as out of range, or taken for a flag."""
    assert parse_serve(["--max-model-len", "8", "--max-model-len", word]).engine.max_model_len is None


def test_dotted_keys_join_the_json() -> None:
    """Guards against dotted keys that replace what the JSON said, or lose their type."""
    argv = [
        "--override_generation_config",
        '{"a": {"b": 1}, "c": 2}',
        "--override_generation_config.a.d",
        "8k",
    ]
    argv += ["--override-generation-config.e_f=x", "--override-generation-config.l+=p,q"]
    argv += ["--override-generation-config.l+", "+r", "--override-generation-config.flag", "--port", "1"]
    expected = {"a": {"b": 1, "d": 8000}, "c": 2, "e_f": "x", "l": ["p", "q", "+r"], "flag": True}
    settings = parse_serve(argv)
    assert settings.server.override_generation_config == expected
    assert settings.server.port == 1


@pytest.mark.parametrize("typed", ["-O3", "-O 3", "-O=3", "--optimization-level 3"])
def test_optimization_levels(typed: str) -> None:
    """Guards against -O3 being read as a short flag with another name."""
    assert parse_serve(typed.split()).given == {"optimization_level": 3}


def test_secrets_are_not_shown() -> None:
    """Guards against keys in the start-up line of the log."""
    settings = parse_serve(["--api-key", "sesame", "--hf-token", "hf_1"])
    assert settings.server.api_key == ["sesame"]
    assert "sesame" not in str(settings.given) and "hf_1" not in str(settings.given)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--max-numseqs 3", "did you mean --max-num-seqs?"),
        ("--no-async-sheduling", "did you mean --no-async-scheduling?"),
        ("--zzzz", "--zzzz is not a flag"),
        ("--port 70000", "--port 70000 is out of range; use 0 to 65535."),
        ("--port eight", "is not an integer"),
        ("--gpu-memory-utilization nan", "is not a number"),
        ("--enable-prefix-caching=false", "write --enable-prefix-caching or --no-enable-prefix-caching"),
        ("--dtype int8", "use one of auto"),
        ("one two", "'two' is one argument too many"),
        ("--max-num 3", "could match"),
        ("--tensor-parallel-size", "expected one argument"),
        ("--override-generation-config {", "is not JSON"),
        ("--override-generation-config [1]", "is not a map"),
        ("--port.x 3", "takes no dotted keys"),
        ("--config settings.json", "must be a .yaml or .yml file"),
        ("--config absent.yaml", "cannot be read"),
        ("--config a.yaml --config b.yaml", "given 2 times"),
        ("--model ''", ""),
    ],
)
def test_mistakes_are_answered_in_one_sentence(line: str, sentence: str) -> None:
    """Guards against tracebacks, usage dumps and silence."""
    if not sentence:
        assert parse_serve(shlex.split(line)).engine.model == ""
        return
    with pytest.raises(ConfigError) as caught:
        parse_serve(shlex.split(line))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).count("absent.yaml") <= 1


def write(path: Path, text: str) -> Path:
    """``path`` with ``text`` in it."""
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("joined", [True, False])
def test_config_file(tmp_path: Path, joined: bool) -> None:
    """Guards against --config=FILE that is parsed and never read, and against false that is dropped."""
    text = "model: there\nport: 9000\nenable-prefix-caching: false\nmax_model_len: 8k\napi-key: [a, b]\n"
    file = write(tmp_path / "c.yaml", text)
    settings = parse_serve([f"--config={file}"] if joined else ["--config", str(file)])
    assert (settings.engine.model, settings.engine.max_model_len) == ("there", 8000)
    assert settings.engine.enable_prefix_caching is False
    assert (settings.server.port, settings.server.api_key) == (9000, ["a", "b"])


def test_command_line_wins_over_file(tmp_path: Path) -> None:
    """Guards against a file that overrides what was typed, wherever the flag stands."""
    text = "model: there\nport: 9000\nno-async-scheduling: true\ncompilation-config: {level: 3}\n"
    file = write(tmp_path / "c.yml", text)
    argv = ["here", "--port", "1", "--config", str(file), "--async-scheduling", "-cc.mode", "0"]
    settings = parse_serve(argv)
    assert (settings.engine.model, settings.server.port) == ("here", 1)
    assert settings.engine.async_scheduling is True
    assert settings.given["compilation_config"] == {"level": 3, "mode": 0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max-num-seq: 3", "did you mean max-num-seqs?"),
        ("enable-prefix-caching: 'false'", "is not true or false"),
        ("port: [1]", "is not an integer"),
        ("port: true", "is not an integer"),
        ("port:", "needs a value"),
        ("- a\n- b", "must hold 'key: value' lines"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_mistakes_in_a_config_file(tmp_path: Path, text: str, sentence: str) -> None:
    """Guards against a misspelt key or a quoted boolean that quietly changes nothing."""
    file = write(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        parse_serve(["--config", str(file)])


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    """Guards against a loader that runs code named in the file."""
    file = write(tmp_path / "c.yaml", "model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="is not YAML"):
        parse_serve(["--config", str(file)])
