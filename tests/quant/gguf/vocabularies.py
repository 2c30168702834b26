"""llama.cpp's own test vocabularies: where they are, what they say, and a table of how ours compare.

    python -m tests.quant.gguf.vocabularies FOLDER_OR_SDIST

They are part of the source package of llama-cpp-python (vendor/llama.cpp/models), not of this repository:
`pip download --no-binary :all: --no-deps llama-cpp-python` fetches it. QUANTSERVE_VOCABULARIES names the
package or the folder.
"""

import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from quant.gguf.probe import open_vocabulary, rebuilt
from quant.gguf.rebuild import CannotRebuild, read_stored, rebuild

PLACE = "QUANTSERVE_VOCABULARIES"
NAMES = (
    "llama-bpe",
    "llama-spm",
    "qwen2",
    "gpt-2",
    "phi-3",
    "deepseek-llm",
    "deepseek-coder",
    "falcon",
    "starcoder",
)
ENGINE = frozenset({"bert-bge", "gemma-4"})  # whose kinds only llama.cpp reads: there the engine tokenizes
BETWEEN = "\n__ggml_vocab_test__\n"


@dataclass(frozen=True)
class Verdict:
    name: str
    how: str  # "rebuilt" or "engine"
    texts: int
    wrong: tuple[str, ...]  # texts that give other tokens than the file beside the vocabulary says


def find(target: Path) -> Path | None:
    """The folder of the vocabularies; members of a package are put into `target`. None: they are not here."""
    place = os.environ.get(PLACE)
    if place is None:
        return None
    path = Path(place)
    if path.is_dir():
        return next((file.parent for file in path.rglob("ggml-vocab-*.gguf")), None)
    with tarfile.open(path) as package:
        members = [member for member in package if "/models/ggml-vocab-" in member.name]
        for member in members:
            member.name = Path(member.name).name
        package.extractall(target, members, filter="data")
    return target


def judge(file: Path) -> Verdict:
    """Expected tokens are those of texts without special tokens."""
    with open_vocabulary(file) as tokenize:
        text = rebuilt(file, tokenize)
        tokenizer = None if text is None else Tokenizer.from_str(text)
        if tokenizer:
            tokenizer.encode_special_tokens = True
        wrong, wanted = [], samples(file)
        for sample, expected in wanted:
            if tokenizer:
                got = tokenizer.encode(sample, add_special_tokens=False).ids
            else:
                got = tokenize(sample, special=False)
            wrong += [] if got == expected else [sample]
    name = file.stem.removeprefix("ggml-vocab-")
    return Verdict(name, "rebuilt" if tokenizer else "engine", len(wanted), tuple(wrong))


def samples(file: Path) -> list[tuple[str, list[int]]]:
    texts = file.with_name(f"{file.name}.inp").read_bytes().decode().split(BETWEEN)
    lines = file.with_name(f"{file.name}.out").read_text().split("\n")[: len(texts)]
    tokens = ([int(word) for word in line.split()] for line in lines)
    return list(zip(texts, tokens, strict=True))


def why_not(file: Path) -> str:
    try:
        rebuild(read_stored(file))
    except CannotRebuild as error:
        return str(error)
    return "the probe finds a difference"


def main(place: str) -> None:
    os.environ[PLACE] = place
    import tempfile

    with tempfile.TemporaryDirectory() as target:
        folder = find(Path(target))
        assert folder is not None, f"{place} has no vocabularies"
        for file in sorted(folder.glob("ggml-vocab-*.gguf")):
            if file.with_name(f"{file.name}.out").exists():
                verdict = judge(file)
                right = verdict.texts - len(verdict.wrong)
                note = "" if verdict.how == "rebuilt" else f" ({why_not(file)})"
                sys.stdout.write(f"{verdict.name:16} {verdict.how:8} {right}/{verdict.texts}{note}\n")


if __name__ == "__main__":
    main(sys.argv[1])
