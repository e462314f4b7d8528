"""The recipe's ``python3 /vllm-workspace/benchmarks/benchmark_serving.py ...``: the same as ``outrider bench serve``.

Installed at that path in the image; it hands its arguments on unchanged.
"""

import sys

from outrider.cli.commands import main

if __name__ == "__main__":
    sys.exit(main(["bench", "serve", *sys.argv[1:]]))
