"""One of the processes that torchrun starts for tests/test_finetune.py: finetune_worker.py FILE

FILE holds command lines of training.py, a JSON list of lists. Their exit codes and what this process said
-> FILE.RANK
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import run_main  # noqa: E402

import finetune  # noqa: E402
import parallel  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    ended = [run_main(finetune.main, *command) for command in json.loads(file.read_text())]
    file.with_suffix(f".{parallel.rank()}").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
    parallel.leave(0)
