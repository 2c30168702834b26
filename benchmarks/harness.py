"""lm-evaluation-harness through /v1/completions, against the same weights run by transformers in fp32.

`python -m benchmarks.harness --harness PYTHON --data FILE` serves the bundled model as f32 and lets the
harness of another environment (`pip install 'lm-eval[api]' transformers`) score LAMBADA: prompts as token
ids, log-likelihoods by `echo`. FILE has lines with `context` and `continuation`. Ends with 1 where accuracy
differs by more than 2 rows of 500, or a log-likelihood by more than 0.01.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # so that the file can also be run by its path

from benchmarks.load import Target  # noqa: E402
from benchmarks.machine import describe  # noqa: E402
from benchmarks.serving import own_server  # noqa: E402

ROWS_APART = 2
NATS_APART = 0.01
COMPARED = 20  # log-likelihoods
TASK = """task: lambada_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@dataclass(frozen=True, slots=True)
class Score:
    logprob: float  # of the continuation, in nats
    greedy: bool  # each of its tokens is the likeliest


def by_harness(python: str, target: Target, model: Path, rows: Sequence[dict[str, str]]) -> list[Score]:
    """Raises SystemExit where the harness fails."""
    with tempfile.TemporaryDirectory(prefix="quantserve-harness-") as folder:
        data, out = Path(folder) / "rows.jsonl", Path(folder) / "out"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (Path(folder) / "lambada_local.yaml").write_text(TASK.format(data=data))
        options = {
            "model": target.model,
            "base_url": f"{target.url}/v1/completions",
            "tokenizer": str(model),
            "tokenized_requests": "True",
            "num_concurrent": "2",
        }
        command = [python, "-m", "lm_eval", "--model", "local-completions", "--tasks", "lambada_local"]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in options.items())]
        command += ["--include_path", folder, "--output_path", str(out), "--log_samples", "--batch_size", "1"]
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder, "PYTHONPATH": ""}
        if subprocess.run(command, check=False, env=environ, cwd=folder).returncode:
            raise SystemExit("the harness failed")
        (found,) = out.rglob("samples_lambada_local_*.jsonl")
        return read_samples(found.read_text().splitlines())


def read_samples(lines: Sequence[str]) -> list[Score]:
    samples: list[dict[str, Any]] = sorted(map(json.loads, lines), key=lambda sample: int(sample["doc_id"]))
    pairs = [sample["filtered_resps"][0] for sample in samples]
    return [Score(float(logprob), str(greedy) == "True") for logprob, greedy in pairs]


def by_transformers(model: Path, rows: Sequence[dict[str, str]]) -> list[Score]:
    """One forward pass a row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()
    scores = []
    for row in rows:
        context = tokenizer.encode(row["context"])
        whole = tokenizer.encode(row["context"] + row["continuation"])
        with torch.inference_mode():
            logits = network(torch.tensor([whole])).logits[0, len(context) - 1 : -1]
        target = torch.tensor(whole[len(context) :])
        logprobs = torch.log_softmax(logits, -1).gather(1, target[:, None])
        scores.append(Score(float(logprobs.sum()), bool((logits.argmax(-1) == target).all())))
    return scores


def compare(served: Sequence[Score], direct: Sequence[Score]) -> bool:
    """Prints how far they are apart; whether that is near enough."""
    assert len(served) == len(direct)
    ours, theirs = (sum(score.greedy for score in scores) for scores in (served, direct))
    pairs = list(zip(served, direct, strict=True))
    apart = [abs(one.logprob - other.logprob) for one, other in pairs]
    print(f"accuracy: {ours} of {len(served)} served, {theirs} by transformers in fp32")
    few = max(apart[:COMPARED])
    print(f"log-likelihoods: {few:.4f} nats apart at most in {COMPARED}, {max(apart):.4f} in all")
    return abs(ours - theirs) <= ROWS_APART and few <= NATS_APART


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=__doc__)
    parser.add_argument("--harness", required=True, help="a Python that has lm_eval")
    parser.add_argument("--data", type=Path, required=True, help="lines with context and continuation")
    parser.add_argument("--source", type=Path, default=ROOT / "models" / "tiny-chat")
    parser.add_argument("--rows", type=int, default=500)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also then the server must be stopped
    print("\n".join(describe()))
    with args.data.open() as lines:
        rows = [json.loads(line) for line in islice(lines, args.rows)]
    for row in rows:  # the harness joins the two as they are
        row["continuation"] = " " + row["continuation"].lstrip()
    with own_server(str(args.source), "f32", 1024, 2) as own:
        served = by_harness(args.harness, own, args.source, rows)
    return int(not compare(served, by_transformers(args.source, rows)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
