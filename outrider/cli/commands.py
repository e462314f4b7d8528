"""The commands of ``outrider``: a table of names, and the dispatch that imports only the one that was typed.

Called by ``__main__``. A command is a module with ``run(argv) -> int`` (here in ``cli``) or, for tools, with
``add_arguments(parser)`` and ``run(args) -> int``. Exit codes: 0 done, 1 failed, 2 the command line or a
setting cannot be used, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

from outrider import __version__
from outrider.cli.argv import with_dashes
from outrider.cli.options import nearest
from outrider.cli.parser import Parser
from outrider.errors import ConfigError, OutriderError


@dataclass(frozen=True)
class Command:
    """One row of the table: what is typed, the module that does it, a line of help."""

    name: str
    module: str
    help: str

    @property
    def is_tool(self) -> bool:
        """Whether the module takes parsed arguments instead of the raw command line."""
        return self.module.startswith("outrider.tools.")


COMMANDS = (
    Command("serve", "outrider.cli.serve", "Serve a model over the OpenAI API"),
    Command("check", "outrider.cli.check", "Check a YAML file of settings and report every error"),
    Command("env", "outrider.cli.env", "Print versions, devices and the kernel table"),
    Command("download", "outrider.tools.download", "Fetch a model from the hub"),
    Command("chat", "outrider.tools.chat", "Chat with a running server"),
    Command("complete", "outrider.tools.complete", "Complete text with a running server"),
    Command("bench serve", "outrider.tools.bench_serve", "Measure an OpenAI server under load"),
    Command("bench throughput", "outrider.tools.bench_throughput", "Measure offline throughput"),
    Command("bench latency", "outrider.tools.bench_latency", "Measure the latency of one batch"),
    Command("bench sweep", "outrider.tools.bench_sweep", "Measure a server at several concurrencies"),
    Command("bench kernels", "outrider.tools.bench_kernels", "Measure every kernel against its floor"),
    Command("eval gsm8k", "outrider.tools.eval_gsm8k", "Measure accuracy on GSM8K with lm_eval"),
)

_EPILOG = """\
Without MODEL, the embedded SmolLM2-135M-Instruct is served. 'outrider COMMAND --help' explains a command,
'outrider serve --help' its flags. 'outrider MODEL ...' and 'outrider --flag ...' mean 'outrider serve ...'.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code; errors are one sentence on stderr."""
    try:
        return dispatch(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"outrider: error: {error}", file=sys.stderr)
        return 2
    except OutriderError as error:
        print(f"outrider: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as in ``outrider env | head -1``; then it is closed quietly."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def dispatch(argv: list[str]) -> int:
    """Find the command that ``argv`` begins with, import it and run it."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if argv[0] in ("-v", "--version"):
        print(__version__)
        return 0
    for command in COMMANDS:
        words = command.name.split()
        if argv[: len(words)] == words:
            return _run(command, argv[len(words) :])
    if argv[0].startswith("-") or _names_a_model(argv[0]):
        return _run(COMMANDS[0], argv)
    return _incomplete(argv)


def overview() -> str:
    """The text of ``outrider --help``."""
    width = max(len(command.name) for command in COMMANDS)
    rows = "".join(f"  {command.name:<{width}}  {command.help}\n" for command in COMMANDS)
    return f"usage: outrider [-h] [-v] COMMAND ...\n\ncommands:\n{rows}\n{_EPILOG}"


def _run(command: Command, argv: list[str]) -> int:
    module = importlib.import_module(command.module)
    if not command.is_tool:
        return int(module.run(argv))
    parser = Parser(prog=f"outrider {command.name}", description=command.help + ".")
    module.add_arguments(parser)
    return int(module.run(parser.parse_all([with_dashes(token) for token in argv])))


def _names_a_model(word: str) -> bool:
    return "/" in word or word.endswith(".gguf") or os.path.isfile(os.path.join(word, "config.json"))


def _incomplete(argv: list[str]) -> int:
    """A group without its second word prints the group; anything else is an unknown command."""
    group = [command for command in COMMANDS if command.name.split()[0] == argv[0]]
    rest = argv[1:]
    if group and (not rest or rest[0] in ("-h", "--help")):
        print("".join(f"outrider {command.name}: {command.help}\n" for command in group), end="")
        return 0 if rest else 2
    words = " ".join(argv[:2]) if group else argv[0]
    names = [command.name if group else command.name.split()[0] for command in (group or COMMANDS)]
    raise ConfigError(f"{words!r} is not a command of outrider{nearest(words, names)}")
