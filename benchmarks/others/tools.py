"""What each of the other quantizers makes of a model, kept in a folder: made once."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A model, and the text that it is quantized with."""

    model: Path
    rows: Sequence[Sequence[int]]
    folder: Path  # where results are kept

    def kept(self, name: str, make: Callable[[Path], None]) -> Path:
        """A result by name; one that was not finished is made again."""
        target = self.folder / name
        if not target.exists():
            fresh = self.folder / f".{name}"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            make(fresh)
            fresh.rename(target)
        return target

    def rows_file(self) -> Path:
        return self.kept("rows.json", lambda path: _write(path, json.dumps(self.rows)))

    def text_file(self) -> Path:
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        text = "".join(tokenizer.decode(row, skip_special_tokens=False) for row in self.rows)
        return self.kept("rows.txt", lambda path: _write(path, text))


def autoawq(job: Job, python: Path) -> Path:
    """W4 asymmetric, groups of 128, AWQ's own file."""
    return job.kept("autoawq", lambda out: _script("autoawq_script.py", job, python, out))


def llmcompressor(job: Job, python: Path) -> Path:
    """AWQ's algorithm by llm-compressor: W4 asymmetric, groups of 128, compressed-tensors' file."""
    return job.kept("llmcompressor", lambda out: _script("llmcompressor_script.py", job, python, out))


def gptqmodel(job: Job, python: Path) -> Path:
    """W4 symmetric, groups of 128, desc_act off."""
    return job.kept("gptqmodel", lambda out: _script("gptqmodel_script.py", job, python, out))


def llama_quantize(job: Job, tools: Path, base: Path, kind: str) -> Path:
    """A GGUF file of the type, by llama-imatrix and llama-quantize from the float GGUF file `base`."""
    length = str(len(job.rows[0]))

    def collect(out: Path) -> None:
        text = ("-f", job.text_file(), "-c", length, "--parse-special", "--no-ppl")
        _run(tools / "llama-imatrix", "-m", base, *text, "-o", out, "-t", "1")

    def quantize(out: Path) -> None:
        imatrix = job.kept("imatrix.gguf", collect)
        _run(tools / "llama-quantize", "--imatrix", imatrix, base, out, kind, "1")

    return job.kept(f"{kind}.gguf", quantize)


def _script(name: str, job: Job, python: Path, out: Path) -> None:
    _run(python, SCRIPTS / name, job.model, job.rows_file(), out)


def _run(*command: str | Path) -> None:
    """Its output goes to ours; raises CalledProcessError."""
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([str(part) for part in command], env=environment, check=True, stdout=2)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
