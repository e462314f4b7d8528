"""The configs refuse what cannot run, in sentences that name the flag."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import msgspec
import pytest

from outrider.cli.options import CONFIGS, all_options, human_int
from outrider.config import EngineConfig, ServerConfig
from outrider.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_seqs", -1),
        ("max_model_len", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.01),
        ("gpu_memory_utilization", float("nan")),
        ("tensor_parallel_size", 0),
        ("dtype", "fp4"),
        ("kv_cache_dtype", "int3"),
        ("max_logprobs", -2),
        ("block_size", 0),
        ("num_gpu_blocks_override", 1),
    ],
)
def test_engine_config_refuses_values_out_of_range(name: str, value: Any) -> None:
    """Guards against a bound that is only documented: zero, negative, NaN, unknown words."""
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        EngineConfig(**{name: value})


def test_a_bound_that_is_absent_is_not_named() -> None:
    """Guards against 'use None to 1' for a field that has an upper bound and must be above the lower one."""
    with pytest.raises(ConfigError, match=r"1\.5 is out of range; use at most 1\.$"):
        EngineConfig(gpu_memory_utilization=1.5)


@pytest.mark.parametrize("port", [-1, 65_536, 2**31])
def test_server_config_refuses_ports_that_do_not_exist(port: int) -> None:
    """Guards against an OverflowError from bind(), minutes later, instead of a sentence."""
    with pytest.raises(ConfigError, match="0 to 65535"):
        ServerConfig(port=port)


def test_token_budget_below_the_number_of_sequences() -> None:
    """Guards against a batch in which some running sequence can never get its one token."""
    EngineConfig(max_num_seqs=8, max_num_batched_tokens=8)
    with pytest.raises(ConfigError, match="max-num-batched-tokens 7 is below --max-num-seqs 8"):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)


def test_without_chunked_prefill_the_budget_holds_a_whole_prompt() -> None:
    """Guards against prompts that fit the context but no step."""
    EngineConfig(max_num_batched_tokens=512, max_model_len=1024)
    with pytest.raises(ConfigError, match="chunked-prefill"):
        EngineConfig(max_num_batched_tokens=512, max_model_len=1024, enable_chunked_prefill=False)


def test_half_a_tls_pair() -> None:
    """Guards against serving plain HTTP because the key was forgotten."""
    with pytest.raises(ConfigError, match="belong together"):
        ServerConfig(ssl_certfile="cert.pem")


def test_several_faults_are_all_named() -> None:
    """Guards against one-error-at-a-time: both faults must be in the message."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig(dtype="x", max_num_seqs=0)
    assert "--dtype" in str(caught.value) and "--max-num-seqs" in str(caught.value)


def test_engine_config_crosses_a_process_border() -> None:
    """Guards against a field that msgpack cannot carry to the engine process."""
    config = EngineConfig(model="m", max_model_len=77, gpu_memory_utilization=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


def test_defaults_are_not_shared() -> None:
    """Guards against two configs that hold the same default list."""
    first = ServerConfig()
    first.allowed_origins.append("x")
    assert ServerConfig().allowed_origins == ["*"]


def test_names_are_unique_across_the_configs() -> None:
    """Guards against a flag that belongs to two configs, of which only the later would be filled."""
    names = [field.name for config in CONFIGS for field in dataclasses.fields(config)]
    assert len(names) == len(set(names)) == len(all_options())
    shorts = [o.metadata["short"] for o in all_options().values() if "short" in o.metadata]
    assert len(shorts) == len(set(shorts))


def test_every_option_has_help_and_a_group() -> None:
    """Guards against a flag that appears in no group of the help."""
    for option in all_options().values():
        assert option.metadata["help"] and option.group != "Other", option.name
        json.dumps(option.default)
        assert option.fault(option.default) is None, option.name


@pytest.mark.parametrize(
    ("text", "value"),
    [("8192", 8192), ("8k", 8000), ("8K", 8192), ("25.6k", 25_600), ("1m", 10**6), ("2G", 2**31), ("-1", -1)],
)
def test_human_integers(text: str, value: int) -> None:
    """Guards against mixing up decimal (small letter) and binary (capital) units."""
    assert human_int(text, "--x") == value


@pytest.mark.parametrize("text", ["", "1.5", "25.6K", "8kk", "k", "0x10", "1e3", "१k "])
def test_what_is_no_integer(text: str) -> None:
    """Guards against fractions of a token and against Python's wider ideas of a number."""
    with pytest.raises(ConfigError, match="is not an integer"):
        human_int(text, "--x")
