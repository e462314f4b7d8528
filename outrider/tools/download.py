"""``outrider download MODEL``: fetch a checkpoint from the hub, with GB, GB/s and time left; resumable.

Called by the command line. ``huggingface_hub`` does the work and the resuming; the files land in the hub cache,
where ``outrider serve MODEL`` (and any other program) finds them. Needs no torch and loads nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, cast

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from outrider.errors import ConfigError

# Weights in other formats and what only training needs: Scout's repositories hold the same weights once.
_NEVER = ("*.pth", "*.bin", "*.pt", "*.msgpack", "*.h5", "original/*")
_LINE_INTERVAL_S = 10.0
# The root of its HTTP library's errors, whichever library the installed huggingface_hub is built on.
_NETWORK_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the download."""
    parser.add_argument(
        "model", metavar="MODEL", help="hub id, e.g. nvidia/Llama-4-Scout-17B-16E-Instruct-FP8"
    )
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--cache-dir", "--download-dir", help="hub cache to use (default: HF_HOME's)")
    parser.add_argument("--local-dir", help="put plain files into this folder instead of the cache")
    parser.add_argument("--include", nargs="*", help="only files that match these patterns")
    parser.add_argument("--exclude", nargs="*", default=[], help="no files that match these patterns")
    parser.add_argument("--token", help="hub token (default: HF_TOKEN or the stored login)")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, fetch nothing")


def run(args: argparse.Namespace) -> int:
    """Fetch every wanted file and print the folder. Raises ConfigError when the hub refuses."""
    try:
        commit, files = _list_files(args)
        total = sum(files.values())
        print(f"{args.model} at {commit[:12]}: {len(files)} files, {total / 1e9:.2f} GB")
        if args.dry_run:
            for name, size in sorted(files.items()):
                print(f"{size / 1e9:9.3f} GB  {name}")
            return 0
        folder = _fetch(args, commit, files)
    except GatedRepoError as error:
        raise ConfigError(
            f"{args.model} is gated: accept its licence on the hub, then give --token."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"The hub has no model {args.model!r} (or it is private: give --token).") from error
    except HFValidationError as error:
        raise ConfigError(f"{args.model!r} is no hub id; it must look like OWNER/NAME.") from error
    except (_NETWORK_ERROR, HfHubHTTPError, OSError) as error:
        raise ConfigError(f"The download stopped ({error}); run the command again to go on.") from error
    print(folder)
    return 0


def _list_files(args: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """The commit and {file name: bytes} of what will be fetched."""
    info = HfApi(token=args.token).model_info(args.model, revision=args.revision, files_metadata=True)
    sizes = {entry.rfilename: int(entry.size or 0) for entry in info.siblings or []}
    refused = [*_NEVER, *args.exclude]
    files = {
        name: size
        for name, size in sizes.items()
        if (args.include is None or _matches(name, args.include)) and not _matches(name, refused)
    }
    if not files or info.sha is None:
        raise ConfigError(f"No file of {args.model} matches; change --include and --exclude.")
    return info.sha, files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _fetch(args: argparse.Namespace, commit: str, files: dict[str, int]) -> str:
    """Fetch small files first (they name what is missing early), then the shards; returns their folder."""
    folder = ""
    with _Meter(sum(files.values())) as meter:
        for name, size in sorted(files.items(), key=lambda item: (item[1], item[0])):
            before = meter.done
            path = hf_hub_download(
                args.model,
                name,
                revision=commit,
                cache_dir=args.cache_dir,
                local_dir=args.local_dir,
                token=args.token,
                tqdm_class=meter.tqdm_class(),
            )
            meter.set(before + size)  # a cached file reports no bytes
            folder = path.removesuffix(name).rstrip("/")
    return folder


class _Meter:
    """Bytes done of a known total: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, total: int) -> None:
        self.done = 0
        self._total = total
        self._start = self._last_line = time.monotonic()
        self._bar = _terminal_bar() if sys.stderr.isatty() else None
        self._task = self._bar.add_task("download", total=total) if self._bar is not None else None

    def __enter__(self) -> _Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def set(self, done: int) -> None:
        """Show ``done`` bytes."""
        self.done = done
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = now
            rate = done / (now - self._start)
            left = (self._total - done) / max(rate, 1.0)
            line = f"{done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.3f} GB/s, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def tqdm_class(self) -> type[Any]:
        """What ``hf_hub_download`` takes for a progress bar: its bytes are added to this meter."""
        meter = self

        class Forward:
            def __init__(self, *_: object, initial: float = 0, **__: object) -> None:
                self.n = int(initial)
                meter.set(meter.done + self.n)  # bytes of an earlier, interrupted try

            def update(self, count: float | None = 1) -> None:
                meter.set(meter.done + int(count or 0))

            def __enter__(self) -> Forward:
                return self

            def __exit__(self, *_: object) -> None: ...

            def __getattr__(self, name: str) -> Any:
                return lambda *_, **__: None  # descriptions and postfixes are the terminal bar's business

        return Forward


def _terminal_bar() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
