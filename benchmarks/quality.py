"""`python -m benchmarks.quality`: how far 4-bit variants are from their source, method by method.

Builds each variant of each model (the cache keeps them), scores the written files on a held-out text and on
answers that the source writes itself, and prints mean KL divergences with standard errors paired over chunks,
differences, and whether the relations hold that ought to.

--autoawq PYTHON, --llmcompressor PYTHON, --gptqmodel PYTHON (interpreters of environments that have them)
and --llamacpp FOLDER (with llama-imatrix and llama-quantize) let other tools quantize the same model with
the same calibration text; ours are then compared with theirs. Files that others have made already:
--peer OURS=FOLDER or OURS=FILE.gguf.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.keeping import kept_chunks, kept_comparison, weights_digest
from benchmarks.others.tools import Job, autoawq, gptqmodel, llama_quantize, llmcompressor
from quant.calibrate import calibration_tokens, speech_for
from quant.measure.decoded import torch_scorer
from quant.measure.llama import gguf_scorer
from quant.measure.score import Comparison, Reference, Scorer, compare, reference
from quant.measure.stored import load_reference, save_reference
from quant.measure.text import Chunk, Text, chunked, read_corpus
from quant.pipeline import build_variant
from quant.progress import ignore
from quant.recipe import TORCH_PRESETS, parse_recipe
from quant.sampling import write_answers
from quant.source import Source, open_source
from quant.store import VariantStore
from quant.text_choice import Text as Wanted
from quant.torch_recipe import CALIBRATED

SCHEME = {"bits": 4, "group": 128, "symmetric": True}
METHODS = ("rtn", "gptq", "awq", "awq+gptq", "best")
CHUNK = 512
IMATRIX = re.compile(r"(\w+)\+imatrix")
PEER_FACTOR = 1.02
# (closer one, further one, whether the difference has to be certain)
RELATIONS = (
    ("gptq", "rtn", True),
    ("gptq", "awq", True),
    ("awq", "rtn", False),
    ("awq+gptq", "gptq", False),
    ("best", "awq+gptq", False),
)


@dataclass(frozen=True)
class Bench:
    source: Source
    store: VariantStore
    threads: int
    texts: Mapping[str, Text]
    calibration: Wanted

    def references(self) -> dict[str, Reference]:
        return {name: self._reference(text) for name, text in self.texts.items()}

    def _reference(self, text: Text) -> Reference:
        """Computed once for a source and a text."""
        folder = self.store.cache / "references"
        path = folder / f"{self.source.digest[:16]}-{text.digest[:16]}.safetensors"
        if path.exists():
            return load_reference(path, text)
        with torch_scorer(self.source.path, threads=self.threads) as scorer:
            found = reference(scorer, text)
        folder.mkdir(parents=True, exist_ok=True)
        save_reference(found, path)
        return found

    def scored(self, files: Path, references: Mapping[str, Reference]) -> dict[str, Comparison]:
        """Computed once for files, a source and a text."""
        folder, weights = self.store.cache / "comparisons", weights_digest(files)
        with ExitStack() as stack:
            open_scorer = cache(lambda: stack.enter_context(self._scorer(files)))
            return {
                name: kept_comparison(
                    folder,
                    (self.source.digest, text.text.digest, weights),
                    partial(_compare, open_scorer, text),
                )
                for name, text in references.items()
            }

    def _scorer(self, files: Path) -> AbstractContextManager[Scorer]:
        model = files / "model.gguf" if files.is_dir() else files
        if model.is_file():
            longest = max(text.longest for text in self.texts.values())
            return gguf_scorer(model, context=longest, threads=self.threads)
        return torch_scorer(files, threads=self.threads)

    def build(self, name: str) -> Path:
        recipe = parse_recipe(recipe_of(name, self.calibration))
        return build_variant(
            self.source, recipe, self.store, progress=ignore, threads=self.threads, device="cpu"
        ).variant.path

    def rows(self) -> list[list[int]]:
        """The text that ours is calibrated on, for the others."""
        size, cache = int(self.source.config["vocab_size"]), self.store.cache
        where = torch.device("cpu")
        tokens = calibration_tokens(
            self.source, self.calibration, size, cache=cache, device=where, report=ignore
        )
        found: list[list[int]] = tokens.tolist()
        return found

    def others(self, arguments: argparse.Namespace) -> Iterator[tuple[str, str, Path]]:
        """(name, the variant of ours to compare it with, files)."""
        peers = (arguments.autoawq, arguments.llmcompressor, arguments.gptqmodel, arguments.llamacpp)
        if not any(peers):
            return
        rows = self.rows()
        place = f"{self.source.digest[:16]}-{len(rows)}x{len(rows[0])}"
        job = Job(self.source.path, rows, self.store.cache / "others" / place)
        if arguments.autoawq:
            yield "AutoAWQ", "awq-w4g128", autoawq(job, arguments.autoawq)
        if arguments.llmcompressor:
            yield "llm-compressor's AWQ", "awq-w4g128", llmcompressor(job, arguments.llmcompressor)
        if arguments.gptqmodel:
            yield "GPTQModel", "gptq-w4g128", gptqmodel(job, arguments.gptqmodel)
        for name in arguments.variants if arguments.llamacpp else ():
            if kind := IMATRIX.fullmatch(name):
                base = self.build("bf16") / "model.gguf"
                made = llama_quantize(job, arguments.llamacpp, base, kind[1])
                yield f"llama-quantize {kind[1]}", name, made


def _compare(open_scorer: Callable[[], Scorer], source: Reference) -> Comparison:
    return compare(open_scorer(), source)


def recipe_of(name: str, calibration: Wanted) -> str | dict[str, Any]:
    """A method at 4 bits, a preset's name, or a type of llama.cpp's with our imatrix ("q4_0+imatrix")."""
    if name in METHODS:
        spec: dict[str, Any] = {"method": name, "format": "compressed-tensors", "scheme": SCHEME}
    elif kind := IMATRIX.fullmatch(name):
        return {"type": kind[1], "imatrix": "self"}
    elif name in TORCH_PRESETS:
        spec = TORCH_PRESETS[name].spec
    else:
        return name
    if spec["method"] not in CALIBRATED:
        return spec
    return {**spec, "calibration": {"samples": calibration.samples, "length": calibration.length}}


def prose(source: Source, path: Path, chunks: int) -> Text:
    """Chunks spread over the whole file, so that each kind of text in it counts."""
    text = chunked(read_corpus(path, source.path / "tokenizer.json"), CHUNK)
    step = max(1, len(text.chunks) // chunks)
    return Text(
        chunks=text.chunks[::step][:chunks],
        corpus=text.corpus,
        tokenizer=text.tokenizer,
        cut=f"every {step}th chunk of {text.cut}",
    )


def answers(source: Source, place: Path, count: int) -> Text:
    """What the source says to questions that calibration does not use; only its own tokens count."""

    def write() -> list[Chunk]:
        speech = speech_for(source, "evaluation", int(source.config["vocab_size"]))
        wanted = Wanted(kind="self", samples=count, length=256, seed=1)
        written = write_answers(source.path, speech, wanted, device=torch.device("cpu"), report=ignore)
        return [Chunk(answer.tokens, answer.prompt) for answer in written]

    chunks = kept_chunks(place / "answers" / f"{source.digest[:16]}-{count}.json", write)
    return Text(chunks=chunks, corpus="self-generated", tokenizer=source.digest, cut="answers")


def lines(title: str, found: Mapping[str, Comparison], peers: Mapping[str, str]) -> Iterator[str]:
    yield f"\n### {title}\n"
    yield "| variant | mean KL | median | 99 % | top-1 | ln PPL change |"
    yield "|---|---|---|---|---|---|"
    for name, comparison in found.items():
        score = comparison.score()
        yield (
            f"| {name} | {score.mean} | {score.median.value:.4f} | {score.p99.value:.3f} "
            f"| {score.top1.value:.1%} | {score.log_perplexity_change} |"
        )
    yield "\n| relation | difference | in errors | holds |"
    yield "|---|---|---|---|"
    for closer, further, certain in RELATIONS:
        if closer in found and further in found:
            yield relation(f"{closer} {'<' if certain else '<='} {further}", found, closer, further, certain)
    for peer, ours in peers.items():
        if peer in found and ours in found:
            ratio = found[ours].score().mean.value / found[peer].score().mean.value
            label = f"{ours} <= {PEER_FACTOR} x {peer} (ratio {ratio:.3f})"
            yield relation(label, found, ours, peer, certain=False, factor=PEER_FACTOR)


def relation(
    label: str,
    found: Mapping[str, Comparison],
    closer: str,
    further: str,
    certain: bool,
    factor: float = 1.0,
) -> str:
    """`certain`: below by more than two errors; else not above by more than two."""
    difference = found[closer].further_than(found[further], factor)
    errors = difference.value / difference.error if difference.error else 0.0
    holds = errors < -2 if certain else errors <= 2
    verdict = "yes" if holds else "NO"
    return f"| {label} | {difference.value:+.5f} ± {difference.error:.5f} | {errors:+.1f} | {verdict} |"


def run(arguments: argparse.Namespace, model: Path) -> bool:
    store = VariantStore(arguments.cache)
    source = open_source(str(model), cache=arguments.cache)
    texts = {}
    if arguments.corpus:
        texts[arguments.corpus.name] = prose(source, arguments.corpus, arguments.chunks)
    if arguments.answers:
        texts["self-generated"] = answers(source, arguments.cache, arguments.answers)
    wanted = Wanted(kind="self", samples=arguments.samples, length=CHUNK)
    bench = Bench(source, store, arguments.threads, texts, wanted)
    references = bench.references()
    found: dict[str, dict[str, Comparison]] = {name: {} for name in texts}
    places = {name: bench.build(name) for name in arguments.variants}
    peers = {f"peer of {ours}": (ours, Path(files)) for ours, _, files in arguments.peer}
    peers |= {name: (ours, files) for name, ours, files in bench.others(arguments)}
    for name, files in {**places, **{peer: files for peer, (_, files) in peers.items()}}.items():
        for text, comparison in bench.scored(files, references).items():
            found[text][name] = comparison
            print(f"{model.name} {text} {name}: {comparison.score().mean}", file=sys.stderr, flush=True)
    told = [
        line
        for text, comparisons in found.items()
        for line in lines(
            f"{model.name}, {text}: {len(texts[text].chunks)} chunks, {texts[text].scored:,} tokens",
            comparisons,
            {peer: ours for peer, (ours, _) in peers.items()},
        )
    ]
    print("\n".join(told), flush=True)
    if arguments.json:
        note(arguments.json, model.name, places, found)
    return not any(line.endswith("| NO |") for line in told)


def note(
    file: Path, model: str, places: Mapping[str, Path], found: Mapping[str, Mapping[str, Comparison]]
) -> None:
    """Puts the figures of our variants among those that the file has."""
    every: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, folder in places.items():
        manifest = json.loads((folder / "manifest.json").read_text())
        about = every.setdefault(model, {}).setdefault(name, {})
        about["bits_per_weight"] = round(manifest["bits_per_weight"], 3)
        about["gguf"] = manifest["format"] == "gguf"
        if (report := folder / "quantization.json").exists():
            about["layers"] = by_kind(json.loads(report.read_text())["modules"])
        for text, comparisons in found.items():
            score = comparisons[name].score()
            kl = [round(score.mean.value, 5), round(score.mean.error, 5)]
            about[text] = {"kl": kl, "top1": round(score.top1.value, 4)}
    file.write_text(json.dumps(every, indent=1, sort_keys=True) + "\n")


def by_kind(modules: list[dict[str, Any]]) -> dict[str, float]:
    """Error of the output relative to that of round-to-nearest: the mean over the blocks."""
    found: dict[str, list[float]] = {}
    for one in modules:
        if one["rtn_loss"]:
            found.setdefault(".".join(one["module"].split(".")[-2:]), []).append(
                one["loss"] / one["rtn_loss"]
            )
    return {name: round(sum(ratios) / len(ratios), 4) for name, ratios in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[Path("models/tiny-chat")])
    parser.add_argument("--variants", nargs="+", default=list(METHODS), help="methods, presets, TYPE+imatrix")
    parser.add_argument("--corpus", type=Path, help="held-out text")
    parser.add_argument("--chunks", type=int, default=60, help="of the corpus")
    parser.add_argument("--answers", type=int, default=0, help="that the source writes itself")
    parser.add_argument("--samples", type=int, default=128, help=f"of {CHUNK} tokens, to calibrate on")
    parser.add_argument("--peer", action="append", default=[], type=lambda text: text.partition("="))
    parser.add_argument("--autoawq", type=Path, metavar="PYTHON", help="compared with awq-w4g128")
    parser.add_argument("--llmcompressor", type=Path, metavar="PYTHON", help="compared with awq-w4g128")
    parser.add_argument("--gptqmodel", type=Path, metavar="PYTHON", help="compared with gptq-w4g128")
    parser.add_argument("--llamacpp", type=Path, metavar="FOLDER", help="compared with TYPE+imatrix")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are to be kept, too")
    parser.add_argument("--cache", type=Path, default=Path("/tmp/quantserve-quality"))
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    return 0 if all([run(arguments, model) for model in arguments.models]) else 1


if __name__ == "__main__":
    sys.exit(main())
