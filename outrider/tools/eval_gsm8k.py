"""``outrider eval gsm8k``: lm_eval's GSM8K with the recipe's arguments, beside the recipe's table and a pass mark.

Called by the command line; talks to a running server through lm_eval (extra ``eval``), which does the prompting and
the scoring. It holds no data: lm_eval fetches GSM8K from the hub, or reads ``--data DIR``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError, OutriderError
from outrider.tools.http_api import base_url, bearer, first_model
from outrider.tools.output_files import check_writable
from outrider.tools.recipe_figures import GSM8K, Score

_METRIC = "exact_match"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the evaluation; the defaults are the recipe's."""
    parser.add_argument("--base-url", help="http(s)://HOST:PORT, instead of --host and --port")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--model", help="name to send (default: the first of /v1/models)")
    parser.add_argument("--num-concurrent", type=int, default=128, help="requests in flight")
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds a request may take, queueing included"
    )
    parser.add_argument("--max-retries", type=int, default=5)
    parser.add_argument("--limit", type=int, help="only the first N of 1,319 questions; no verdict then")
    parser.add_argument("--data", metavar="DIR", help="folder with train.jsonl and test.jsonl, for no hub")
    parser.add_argument(
        "--recipe", choices=("auto", "fp8", "fp4", "none"), default="auto", help="table beside"
    )
    parser.add_argument("--output", metavar="FILE", help="write lm_eval's results as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print both tables and the verdict. Returns 1 when a full run is below a pass mark."""
    _check(args)
    url = (args.base_url or base_url(args.host, args.port)).rstrip("/").removesuffix("/v1")
    model = args.model or first_model(url, bearer())
    results = _evaluate(args, url, model)
    print(_lm_eval_table(results))
    if args.output:
        kept = {key: results[key] for key in ("results", "configs", "versions", "n-shot") if key in results}
        Path(args.output).write_text(json.dumps(kept, indent=1, default=str), encoding="utf-8")
    recipe = _recipe_scores(args.recipe, model)
    if not recipe:
        return 0
    measured = results["results"]["gsm8k"]
    print(comparison(measured, recipe, full=args.limit is None))
    return int(args.limit is None and any(measured[f"{_METRIC},{s.filter}"] < s.pass_mark for s in recipe))


def model_args(url: str, model: str, num_concurrent: int, timeout: int, max_retries: int) -> str:
    """lm_eval's ``--model_args``, as the recipe writes them."""
    return (
        f"base_url={url}/v1/completions,model={model},tokenized_requests=False,tokenizer_backend=None,"
        f"num_concurrent={num_concurrent},timeout={timeout},max_retries={max_retries}"
    )


def write_local_task(data: Path, folder: Path) -> None:
    """Put a task file into ``folder`` that is lm_eval's own gsm8k but for reading ``data``'s two JSONL files.

    With ``--include_path FOLDER`` the plain ``lm_eval --tasks gsm8k`` uses it as well.
    """
    import lm_eval.tasks
    import yaml

    files = {split: str((data / f"{split}.jsonl").resolve()) for split in ("train", "test")}
    if missing := [file for file in files.values() if not Path(file).is_file()]:
        raise ConfigError(
            f"--data {data} lacks {missing[0]}; it must hold train.jsonl and test.jsonl of GSM8K."
        )
    for file in files.values():
        _check_questions(Path(file))
    assert lm_eval.tasks.__file__ is not None
    task = {
        "include": str(Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"),
        "task": "gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    (folder / "gsm8k.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def comparison(measured: Mapping[str, Any], recipe: Sequence[Score], *, full: bool) -> str:
    """Our score, the recipe's and the pass mark per filter, as the recipe's kind of table."""
    lines = ["|     Filter     |Value |Stderr|Recipe|Stderr|Pass mark|      |", "|-" * 7 + "|"]
    for score in recipe:
        value = float(measured[f"{_METRIC},{score.filter}"])
        stderr = measured.get(f"{_METRIC}_stderr,{score.filter}")
        shown = f"{stderr:.4f}" if isinstance(stderr, float) else " N/A  "
        verdict = ("pass" if value >= score.pass_mark else "FAIL") if full else "–"
        lines.append(
            f"|{score.filter:<16}|{value:.4f}|{shown}|{score.value:.4f}|{score.stderr:.4f}"
            f"|{score.pass_mark:9.4f}|{verdict:<6}|"
        )
    note = "Pass mark: the recipe's value less two of its standard errors"
    lines.append(f"{note}." if full else f"{note}; no verdict on a part of the questions.")
    return "\n".join(lines)


def _check(args: argparse.Namespace) -> None:
    for name in ("num_concurrent", "timeout", "max_retries", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is out of range; use 1 or more.")
    check_writable(args.output, "--output")


def _check_questions(file: Path) -> None:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            is_right = isinstance(entry["question"], str) and isinstance(entry["answer"], str)
        except (ValueError, LookupError, TypeError):
            is_right = False
        if not is_right:
            raise ConfigError(f"{file}:{number} is not a JSON object with the texts question and answer.")


def _reason(error: BaseException, args: argparse.Namespace) -> str:
    """One sentence for what ended lm_eval, and what to do about it."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not args.data and any(name.partition(".")[0] == "datasets" for name in modules):
        return f"GSM8K could not be fetched ({_first_line(error)}); name a folder that holds it: --data DIR."
    while error.__cause__ is not None:
        error = error.__cause__
    return f"lm_eval gave up ({_first_line(error)}); the lines above and the server's log say more."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _evaluate(args: argparse.Namespace, url: str, model: str) -> dict[str, Any]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("outrider eval needs lm_eval: pip install 'outrider[eval]'.") from error
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            write_local_task(Path(args.data), Path(folder))
        try:
            results = lm_eval.simple_evaluate(
                model="local-completions",
                model_args=model_args(url, model, args.num_concurrent, args.timeout, args.max_retries),
                tasks=["gsm8k"],
                limit=args.limit,
                task_manager=TaskManager(include_path=folder if args.data else None),
            )
        except Exception as error:  # lm_eval, its data sets and its HTTP client each raise kinds of their own
            raise OutriderError(_reason(error, args)) from error
    assert results is not None, "lm_eval returns None only on ranks other than 0"
    return dict(results)


def _lm_eval_table(results: dict[str, Any]) -> str:
    from lm_eval.utils import make_table

    return str(make_table(results))


def _recipe_scores(choice: str, model: str) -> Sequence[Score]:
    if choice == "auto":
        choice = "fp4" if "fp4" in model.lower() else "fp8"
    return GSM8K.get(choice, ())
