"""``outrider complete``: continue a text with a running server, streamed, without a chat template.

Called by the command line; each line is a prompt of its own. The stream reader is ``chat``'s.
"""

from __future__ import annotations

import argparse
import sys

from outrider.errors import OutriderError
from outrider.tools import chat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of ``complete``."""
    chat.add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Complete prompts until end of input."""
    server = chat.Server(args)
    print(f"Using model: {server.model}", file=sys.stderr)
    for prompt in chat.prompts(args.quick):
        try:
            answer = server.stream("/completions", {"prompt": prompt, **chat.sampling(args)})
        except OutriderError as error:
            if args.quick is not None:
                raise
            print(error, file=sys.stderr)
            continue
        if args.stats:
            print(answer.stats, file=sys.stderr)
    return 0
