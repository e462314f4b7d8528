"""GSM8K for machines without a hub: lets the recipe's own ``lm_eval`` command run word for word.

``datasets.load_dataset("openai/gsm8k", "main")`` takes a folder of that name below the working directory before it
asks the hub. From a shell: ``python tests/tools/local_gsm8k.py FOLDER [DATA]``, then run lm_eval inside FOLDER.
"""

import os
import sys
from pathlib import Path

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
---
"""


def place(data: Path, folder: Path) -> None:
    """Make ``folder/openai/gsm8k`` a dataset repository of links to ``data``'s two files."""
    main = folder / "openai" / "gsm8k" / "main"
    main.mkdir(parents=True)
    (main.parent / "README.md").write_text(CARD)
    for name in ("train.jsonl", "test.jsonl"):
        (main / name).symlink_to((data / name).resolve())


if __name__ == "__main__":
    shared = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    place(Path(sys.argv[2]) if len(sys.argv) > 2 else shared / "data" / "gsm8k", Path(sys.argv[1]))
