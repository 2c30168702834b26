"""`python -m benchmarks.gpu.check`: every kernel against float64, tiny-chat on CUDA against the CPU.

Exit status 1 if anything is off.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.gpu import kernel_checks, model_checks
from benchmarks.gpu.kernel_checks import Checked


def report(title: str, results: Iterable[Checked]) -> list[Checked]:
    began = time.monotonic()
    checked = list(results)
    wrong = [item for item in checked if not item.fine]
    worst = max(checked, key=lambda item: item.error / item.limit, default=None)
    seconds = time.monotonic() - began
    print(f"{title}: {len(checked)} checks, {len(wrong)} wrong, {seconds:.0f} s; worst: {worst}", flush=True)
    for item in wrong[:12]:
        print(f"  WRONG {item.name}: {item.error:.3g}, limit {item.limit:g}", flush=True)
    return checked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=120, help="random shapes of each kind")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels-only", action="store_true", help="leave out the model")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {arguments.seed}")
    kernel_checks.seed(arguments.seed)
    checked = [
        *report("linear layers", kernel_checks.linears(arguments.count)),
        *report("attention", kernel_checks.attentions(arguments.count)),
        *report("norms, gates, positions", kernel_checks.others(arguments.count // 8)),
        *report("graphs", kernel_checks.graphs()),
        *report("Triton", kernel_checks.triton_linears(arguments.count // 4)),
    ]
    if not arguments.kernels_only:
        checked += report("tiny-chat, formats", model_checks.formats())
        checked += report("tiny-chat, graphs", model_checks.graphs_and_eager())
        checked += report("tiny-chat, 64 requests", model_checks.stress())
    if arguments.json:
        arguments.json.write_text(json.dumps([(item.name, item.error, item.limit) for item in checked]))
    return int(not all(item.fine for item in checked))


if __name__ == "__main__":
    sys.exit(main())
