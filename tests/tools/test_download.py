"""``outrider download`` against a small hub of our own that cuts the connection once."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COMMIT = "a1b2c3d4" * 5
FILES = {
    "config.json": b'{"model_type": "llama4"}',
    "model-00001-of-00001.safetensors": os.urandom(1000) * 25_000,
    "original/consolidated.00.pth": b"x" * 1000,
}


class Hub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges, self.cut_done = [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args): ...

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if self.path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            info = {"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(info).encode(), {}, body)
        found = re.fullmatch(rf"/owner/tiny/resolve/{COMMIT}/(.*)", self.path)
        if not found:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        data = FILES[found.group(1)]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range") or "")
        if start and body:
            first = int(start.group(1))
            self.server.ranges.append((found.group(1), first))
            if first < len(data):
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                return self.send(206, data[first:], headers, body)
        if body and len(data) > 1_000_000 and not self.server.cut_done:
            self.server.cut_done = True
            return self.send(200, data, headers, body, stop_at=15_000_000)
        return self.send(200, data, headers, body)

    def send(self, status, data, headers, body, stop_at=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:stop_at])
        if stop_at:
            self.close_connection = True


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


def download(hub, tmp_path, *words):
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "outrider", "download", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_files_arrive_whole_after_a_cut_and_stay_cached(hub, tmp_path):
    """Guards: a broken transfer that starts anew or leaves half a file; files where ``serve`` does not look."""
    done = download(hub, tmp_path, "owner/tiny")
    assert done.returncode == 0, done.stderr
    assert "2 files, 0.03 GB" in done.stdout, "the original/ weights are not wanted"
    folder = Path(done.stdout.splitlines()[-1])
    assert folder == tmp_path / "hf" / "hub" / "models--owner--tiny" / "snapshots" / COMMIT
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        assert (folder / name).read_bytes() == FILES[name]
    assert any(name.startswith("model") and first > 0 for name, first in hub.ranges), "resumed, not restarted"
    hub.ranges.clear()
    again = download(hub, tmp_path, "owner/tiny")
    assert again.returncode == 0 and again.stdout.splitlines()[-1] == str(folder) and not hub.ranges


def test_dry_run_and_unknown_model(hub, tmp_path):
    """Guards: a dry run that fetches; a traceback for a mistyped name."""
    listed = download(hub, tmp_path, "owner/tiny", "--dry-run", "--include", "*.json")
    assert listed.returncode == 0 and "config.json" in listed.stdout and "safetensors" not in listed.stdout
    assert not list((tmp_path / "hf").rglob("config.json"))
    missing = download(hub, tmp_path, "owner/none")
    assert missing.returncode == 2 and "no model 'owner/none'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_no_network_is_one_sentence(hub, tmp_path):
    """Guards: a traceback of the HTTP library where the hub cannot be reached."""
    hub.shutdown()
    hub.server_close()
    done = download(hub, tmp_path, "owner/tiny")
    assert done.returncode == 2 and "The download stopped" in done.stderr
    assert "Traceback" not in done.stderr
