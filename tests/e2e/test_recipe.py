"""``docs/recipe.md`` and the recipe it follows, run as they are printed.

The hub's two repositories are a local cache of tiny checkpoints, so every command keeps its model names; ports are
replaced by free ones, and questions and prompts are cut in number.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outrider.tools.eval_gsm8k import write_local_task
from tests.e2e.server_process import REPO, ServerProcess, free_port

PAGE = REPO / "docs" / "recipe.md"
SECTIONS = ("FP8", "FP4")
FOLDERS = {"FP8": "fp8", "FP4": "nvfp4"}
BIN = str(Path(sys.executable).parent)


def blocks(text: str, section: str) -> list[str]:
    """The shell blocks of a ``##`` section."""
    part = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)\n```", part, re.S)


def block(section: str, start: str) -> str:
    """The block of the page that begins with ``start``."""
    (found,) = [b for b in blocks(PAGE.read_text(), section) if b.startswith(start)]
    return found


def put_in_cache(cache: Path, model: str, source: Path) -> None:
    """Make the hub cache hold ``model``: a copy of ``source`` whose config allows the recipe's context length."""
    repository = cache / "hub" / f"models--{model.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, snapshot / file.name)
    config = snapshot / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 4096', '"max_position_embeddings": 16384')
    )
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


@dataclass
class Recipe:
    """A server started by a section's own launch block, and the environment of its other blocks."""

    section: str
    server: ServerProcess
    env: dict[str, str]

    def run(self, start: str, *extra: str, cwd: Path) -> str:
        """Run a block (with words appended) and return what it prints."""
        command = block(self.section, start).replace("--port 8080", f"--port {self.server.port}")
        words = " ".join(extra)
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {words}"],
            cwd=cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def shell_env(home: Path) -> dict[str, str]:
    """A shell's environment without a hub and with the cache in ``home``."""
    return {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HOST": "127.0.0.1",
    }


@pytest.fixture(scope="module", params=SECTIONS)
def recipe(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recipe]:
    """The section's launch block, running."""
    section = request.param
    home = tmp_path_factory.mktemp("hub")
    model = f"nvidia/Llama-4-Scout-17B-16E-Instruct-{section}"
    put_in_cache(home, model, shared / "fixtures" / "llama4-tiny-a" / FOLDERS[section])
    port = free_port()
    env = shell_env(home) | {"PORT": str(port)}
    command = block(section, "outrider serve").replace("--port 8080", f"--port {port}")
    with ServerProcess(program=["bash", "-c", f"exec {command}"], port=port, env=env) as server:
        yield Recipe(section, server, env)


def keys(value: Any) -> Any:
    """Keys in order, without values."""
    if isinstance(value, dict):
        return [(key, keys(item)) for key, item in value.items()]
    return [keys(item) for item in value] if isinstance(value, list) else None


def original(shared: Path) -> str:
    """The recipe for vLLM."""
    return (shared / "recipe" / "llama4-scout-on-vllm.md").read_text()


@pytest.mark.parametrize("section", SECTIONS)
def test_page_keeps_the_recipes_blocks(shared: Path, section: str) -> None:
    """Guards against a flag lost in the rewriting: only the program, its results file and the client's path differ."""
    changes = (
        ("vllm serve", "outrider serve"),
        ("hf download", "outrider download"),
        ("python3 /vllm-workspace/benchmarks/benchmark_serving.py", "outrider bench serve"),
        ("vllm_benchmark", "outrider_benchmark"),
    )
    theirs = blocks(original(shared), section)
    for old, new in changes:
        theirs = [b.replace(old, new) for b in theirs]
    assert [b.rstrip() for b in blocks(PAGE.read_text(), section)] == [b.rstrip() for b in theirs]


def test_image_blocks_name_scripts_that_run() -> None:
    """Guards against a renamed or unrunnable script (what they do is tested with the image's files)."""
    for command in blocks(PAGE.read_text(), "Image"):
        assert os.access(REPO / command, os.X_OK), command


@pytest.mark.parametrize("section", SECTIONS)
def test_download_block_is_understood(section: str, tmp_path: Path) -> None:
    """Guards the download's name and argument: without a network it says so, instead of refusing the command."""
    env = shell_env(tmp_path)
    command = block(section, "outrider download")
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "offline" in done.stderr.lower(), done.stderr


def test_flags_without_effect_say_so(recipe: Recipe) -> None:
    """Guards against silence: the recipe's old spellings are understood and named in the log."""
    log = "".join(recipe.server.log)
    for flag in ("--compilation-config", "--trust-remote-code"):
        assert flag in log, flag
    assert "quantization " + {"FP8": "FP8", "FP4": "NVFP4"}[recipe.section] in log
    assert "float8_e4m3fn" in log and "requests of 9,216" in log


def test_curl_prints_the_recipes_keys(recipe: Recipe, shared: Path, tmp_path: Path) -> None:
    """Guards the answer's form: same keys in the same order as the recipe prints, through curl and jq."""
    printed = recipe.run("curl", cwd=tmp_path)
    text = original(shared)
    start = text.index('{\n  "id": "cmpl-')
    theirs = json.JSONDecoder().raw_decode(text[start:])[0]
    ours = json.loads(printed)
    assert keys(ours) == keys(theirs)
    assert ours["model"] == f"nvidia/Llama-4-Scout-17B-16E-Instruct-{recipe.section}"
    assert ours["usage"]["completion_tokens"] == 20 and ours["choices"][0]["finish_reason"] == "length"


def test_lm_eval_block(recipe: Recipe, shared: Path, tmp_path: Path) -> None:
    """Guards the evaluation at 128 in flight: it ends, and prints the recipe's two rows."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra: eval)")
    write_local_task(shared / "data" / "gsm8k", tmp_path)
    printed = recipe.run("lm_eval", "--limit 3", f"--include_path {tmp_path}", cwd=tmp_path)
    assert re.search(r"\|gsm8k\|\s+3\|flexible-extract\|\s+5\|exact_match\|↑", printed), printed
    assert re.search(r"\|strict-match\s+\|\s+5\|exact_match\|↑", printed)


def test_benchmark_block(recipe: Recipe, shared: Path, tmp_path: Path) -> None:
    """Guards the report: the recipe's lines in the recipe's order, and a result file."""
    fewer = ("--num-prompts 12", "--random-input-len 40", "--random-output-len 12")
    printed = recipe.run("outrider bench serve", *fewer, cwd=tmp_path)
    labels = re.compile(r"^([A-Z][^\n:]*:|[-=]{5,}.*)", re.M)
    theirs = re.search(r"^=+ Serving Benchmark Result.*?^=+$", original(shared), re.S | re.M)
    ours = re.search(r"^=+ Serving Benchmark Result.*?^=+$", printed, re.S | re.M)
    assert theirs and ours, printed
    assert labels.findall(ours[0]) == labels.findall(theirs[0])
    result = json.loads((tmp_path / "outrider_benchmark_serving_results.json").read_text())
    assert result["completed"] == 12 and result["total_output_tokens"] == 144


@pytest.fixture(scope="module")
def narrow_scout(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scout's config and real tokenizer, narrow enough for a laptop; weights are dummies."""
    pytest.importorskip("llama_models", reason="pip install llama-models tiktoken brings the real vocabulary")
    folder = tmp_path_factory.mktemp("scout")
    tools = shared / "tools"
    run: Callable[..., Any] = lambda *words: subprocess.run(  # noqa: E731
        [sys.executable, *map(str, words)], check=True, capture_output=True, timeout=240
    )
    run(tools / "build_llama4_tokenizer.py", folder / "tokenizer")
    run(tools / "make_dummy_scout.py", folder / "model", "FP8", folder / "tokenizer")
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= dict(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    config |= dict(intermediate_size=64, intermediate_size_mlp=64, num_local_experts=4)
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder / "model"


def test_real_tokenizer_counts(narrow_scout: Path) -> None:
    """Guards the recipe's token counts: 5 for the prompt with its begin token, 20 generated."""
    argv = [
        str(narrow_scout),
        "--load-format",
        "dummy",
        "--max-model-len",
        "9216",
        "--quantization",
        "modelopt",
    ]
    with ServerProcess([*argv, "--served-model-name", "scout"]) as server:
        body = {"model": "scout", "prompt": "San Francisco is a", "max_tokens": 20, "temperature": 0}
        answer = server.post("/v1/completions", **body, ignore_eos=True).json()
        assert answer["usage"]["prompt_tokens"] == 5
        assert answer["usage"]["completion_tokens"] == 20
