"""The image's files: hadolint's main rules, shell syntax, what the scripts run, and the wheel by the same command."""

import http.server
import os
import re
import shlex
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "docker"


def instructions():
    """(keyword, arguments) of each Dockerfile instruction, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_dockerfile_rules():
    """Guards: a root container, unpinned base, caches left in layers, a shell around the entry point."""
    steps = instructions()
    of = {word: [rest for keyword, rest in steps if keyword == word] for word, _ in steps}
    assert all(re.search(r":\S", rest) or rest.split()[0] in ("base",) for rest in of["FROM"]), (
        "tag every base"
    )
    assert not any("latest" in rest for rest in of["FROM"])
    assert "ADD" not in of and "MAINTAINER" not in of and "SHELL" not in of
    final = steps[[i for i, (word, _) in enumerate(steps) if word == "FROM"][-1] :]
    users = [rest for word, rest in final if word == "USER"]
    assert users and users[-1] not in ("root", "0"), "the container must not run as root"
    last_user = max(i for i, (word, _) in enumerate(final) if word == "USER")
    assert all(word != "RUN" for word, _ in final[last_user:])
    for rest in of["RUN"]:
        assert "sudo" not in rest and " cd " not in rest
        assert "apt-get upgrade" not in rest and "|" not in rest.replace("||", ""), "a pipe needs pipefail"
        if "apt-get install" in rest:
            assert (
                "--no-install-recommends" in rest and "-y" in rest and "rm -rf /var/lib/apt/lists/*" in rest
            )
            assert "apt-get update" in rest, "update and install belong in one layer"
        if re.search(r"\bpip (install|wheel)", rest):
            assert "--no-cache-dir" in rest
    assert all(rest.startswith("/") for rest in of["WORKDIR"])
    assert of["ENTRYPOINT"] == ['["outrider"]'] and len(of["HEALTHCHECK"]) == 1 and "CMD" not in of


def test_copied_files_exist_and_are_sent():
    """Guards: a COPY of something renamed, or shut out by the ignore file."""
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (REPO / source).exists(), source
                assert any(line.startswith("!") and source.startswith(line[1:]) for line in ignore), source


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_fail_fast(script):
    """Guards: a syntax error, a script that goes on after a failed step, a lost executable bit."""
    shell = "sh" if script.read_text().startswith("#!/bin/sh") else "bash"
    subprocess.run([shell, "-n", str(script)], check=True)
    assert re.search(r"^set -eu", script.read_text(), re.M) and os.access(script, os.X_OK)


@pytest.fixture
def fake_docker(tmp_path):
    """A ``docker`` that writes down its arguments; returns a function running a script with it."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >"$DOCKER_LOG"\n')
    program.chmod(0o755)
    log = tmp_path / "log"

    def run(script, *words, **env):
        path = f"{program.parent}:{os.environ['PATH']}"
        full = {"PATH": path, "HOME": str(tmp_path), "DOCKER_LOG": str(log), **env}
        subprocess.run([str(DOCKER / script), *words], env=full, check=True, stdin=subprocess.DEVNULL)
        return log.read_text().splitlines()

    return run


def test_build_and_run_commands(fake_docker, tmp_path):
    """Guards: a target or file that does not exist, no GPU, no port, no hub cache, arguments lost."""
    built = fake_docker("build_image.sh", CUDA_VERSION="13.1.0")
    assert built[:3] == ["build", "--file", str(DOCKER / "Dockerfile")] and built[-1] == str(REPO)
    target = built[built.index("--target") + 1]
    assert any(rest.endswith(f"AS {target}") for word, rest in instructions() if word == "FROM")
    assert "CUDA_VERSION=13.1.0" in built and built[built.index("--tag") + 1] == "outrider:deploy"
    shell = fake_docker("run_container.sh", HF_HOME=str(tmp_path / "hub cache"))
    assert shell[shell.index("--entrypoint") + 1] == "/bin/bash" and shell[-1] == "outrider:deploy"
    assert f"{tmp_path / 'hub cache'}:/cache/huggingface" in shell and "8080:8080" in shell
    assert shell[shell.index("--gpus") + 1] == "all" and "--ipc=host" in shell and "HF_TOKEN" in shell
    served = fake_docker("run_container.sh", "serve", "a/b", "--port", "9000", PORT="9000", IMAGE="x:1")
    assert served[-5:] == ["x:1", "serve", "a/b", "--port", "9000"] and "9000:9000" in served
    assert "--entrypoint" not in served


@pytest.mark.parametrize("words", [["--port", "{}"], ["--port=1", "--port={}"]])
def test_healthcheck_finds_the_port(tmp_path, words):
    """Guards: a container that is 'unhealthy' on every port but 8000, or healthy while /health answers 503."""

    class Handler(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args): ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = [word.format(server.server_port) for word in words]
    (tmp_path / "cmdline").write_bytes("\0".join(["outrider", "serve", "m", *words, ""]).encode())
    command = {
        "args": [str(DOCKER / "healthcheck.sh")],
        "env": {**os.environ, "CMDLINE": str(tmp_path / "cmdline")},
    }
    assert subprocess.run(**command).returncode == 0
    Handler.status = 503
    assert subprocess.run(**command, stderr=subprocess.DEVNULL).returncode != 0
    server.shutdown()


def test_the_recipes_benchmark_command(fake, shared, tmp_path):
    """Guards: the shim or a flag of the recipe's ``benchmark_serving.py`` line refused. Sizes are cut for the test."""
    recipe = (shared / "recipe" / "llama4-scout-on-vllm.md").read_text()
    command = re.search(r"^python3 (/vllm-workspace/benchmarks/\S+) \\\n(.*?)\n```", recipe, re.S | re.M)
    installed = dict(zip(("source", "target"), next(
        rest.split() for word, rest in instructions() if word == "COPY" and "benchmark_serving" in rest
    ), strict=True))  # fmt: skip
    assert command.group(1) == f"/vllm-workspace/{installed['target']}"
    server = fake(ttft_s=0.002, itl_s=0.0)
    words = shlex.split(command.group(2).replace("\\\n", " "))
    smaller = [
        "--port",
        str(server.port),
        "--num-prompts",
        "6",
        "--random-input-len",
        "9",
        "--random-output-len",
        "5",
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, str(REPO / installed["source"]), *words, *smaller]
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no effect") == 1 and "--trust-remote-code has no effect" in done.stderr
    assert "Successful requests:                     6\n" in done.stdout
    assert "Maximum request concurrency:             512\n" in done.stdout
    assert (tmp_path / "vllm_benchmark_serving_results.json").is_file()


@pytest.mark.slow
def test_the_wheel_builds_by_the_images_command(tmp_path):
    """Guards: a wheel that misses a module, holds the tests, or is no longer pure Python."""
    step = next(rest for word, rest in instructions() if word == "RUN" and "pip wheel" in rest)
    words = step.replace("/dist", str(tmp_path)).split()
    done = subprocess.run([sys.executable, "-m", *words], cwd=REPO, capture_output=True, text=True)
    if "No matching distribution found for hatchling" in done.stderr + done.stdout:
        pytest.skip("no package index to fetch hatchling from")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("outrider-*-py3-none-any.whl")
    assert wheel.stat().st_size < 5_000_000
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(REPO)) for path in (REPO / "outrider").rglob("*.py")}
    assert sources <= names and not [name for name in names if name.startswith("tests/")]
    assert any(name.endswith("entry_points.txt") for name in names)
