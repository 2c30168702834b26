"""What was measured of one variant: `measurement.json`, beside its manifest and bound to its files.

Light: whoever serves reads it without numpy.
"""

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from quant.files import replace_synced
from quant.manifest import Manifest

MEASUREMENT = "measurement.json"
SCHEMA_VERSION = 1


class Figure(Struct, frozen=True, array_like=True):
    value: float
    error: float  # one standard error, over texts

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"

    @property
    def percent(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


class Histogram(Struct, frozen=True, kw_only=True):
    """Tokens by their KL divergence: `counts[i]` lie between 10 ** edges[i] and 10 ** edges[i + 1] nats."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]  # what lies outside counts as the outermost


class Divergence(Struct, frozen=True, kw_only=True):
    """KL(source || variant) in nats per token, over the source's `kept` most probable tokens and the rest."""

    mean: Figure
    median: Figure
    p90: Figure
    p99: Figure
    p999: Figure
    max: float
    tail: Figure  # what the rest, as one event, leaves out of the mean: an estimate
    rest: float  # mean probability of the rest
    histogram: Histogram


class Reference(Struct, frozen=True, kw_only=True):
    """What the variant was held against."""

    source: str  # digest
    engine: str  # "plain float32"
    text: str  # digest of the tokens that were scored
    kind: Literal["self", "corpus"]
    about: str  # "answers of the source to bundled prompts, temperature 1"
    texts: int
    tokens: int
    kept: int


class Perplexity(Struct, frozen=True, kw_only=True):
    name: str
    value: float
    error: float  # of this value alone: mostly how texts differ, which the source's value shares
    source: float  # the source's own, on the same text
    ln_change: Figure | None = None  # of ln perplexity, paired chunk by chunk
    tokens: int
    cut: str
    corpus: str
    tokenizer: str


class Greedy(Struct, frozen=True, kw_only=True):
    """Answers without chance, variant against source."""

    answers: int
    same: int  # to the last token
    median_first_difference: float | None  # tokens before it, in those that differ
    length: int  # most tokens of an answer


class Health(Struct, frozen=True, kw_only=True):
    loops: float  # share of greedy answers that end in a loop
    source_loops: float


class Structured(Struct, frozen=True, kw_only=True):
    """Shares of greedy answers that have the form they were asked for, with no grammar that forces it."""

    answers: int  # of each kind
    json: float
    source_json: float
    calls: float
    source_calls: float


class Speed(Struct, frozen=True, kw_only=True):
    """Of the engine on the machine that measured it, beside whatever else ran there."""

    load_s: float
    memory_bytes: int  # resident, of the engine's process
    prefill_1: float  # prompt tokens a second, one request
    decode_1: float  # answer tokens a second, one request
    prefill_8: float  # eight requests at once, together
    decode_8: float


class Block(Struct, frozen=True, kw_only=True):
    """One decoder block: how far the stream behind it is from the source's, relative to its length."""

    block: int
    error: float  # |variant - source| / |source|
    added: float  # more than behind the block before
    fallbacks: tuple[str, ...] = ()  # linears that are not what the recipe asks for, with the reason


class Matrix(Struct, frozen=True, kw_only=True):
    """One quantized matrix beside the source's. Lengths are relative to the source's own."""

    name: str
    error: float  # |variant - source|
    expected: float  # what the type rounds off
    times: float  # the square of their ratio
    row_times: float  # the same of the worst row


class Rounding(Struct, frozen=True, kw_only=True):
    """Whether the matrices are the source's, rounded."""

    matrices: int  # that were compared
    worst: tuple[Matrix, ...]


class Worst(Struct, frozen=True, kw_only=True):
    kl: float  # mean over the source's answer, nats per token
    prompt: str
    source: str  # greedy answers
    variant: str


class Measurement(Struct, frozen=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    key: str
    files: str  # digest of the manifest's list of files: of other files this says nothing
    variant: str  # the recipe's name
    bits: int | None  # that the recipe is named for
    bits_per_weight: float
    bytes: int
    reference: Reference
    backend: str
    context: int
    complete: bool  # the error is small enough, or the text is used up; else time was
    finite: bool = True  # neither NaN nor infinity was seen
    kl: Divergence
    top1: Figure
    top5: Figure
    ln_ppl: Figure  # of the text that was scored
    ln_ppl_change: Figure
    ppl_ratio: Figure
    texts: tuple[tuple[float, int], ...]  # (mean KL, tokens) of each text, in order
    perplexities: tuple[Perplexity, ...] = ()
    greedy: Greedy | None = None
    health: Health | None = None
    structured: Structured | None = None
    speed: Speed | None = None
    blocks: tuple[Block, ...] = ()
    rounding: Rounding | None = None
    strange: tuple[str, ...] = ()  # what lies beside the weights and is not the source's
    worst: tuple[Worst, ...] = ()
    machine: str = ""
    versions: dict[str, str] = {}
    taken: str = ""  # when
    seconds: float = 0.0


def files_digest(manifest: Manifest) -> str:
    pairs = [[file.path, file.sha256] for file in manifest.files]
    return hashlib.sha256(msgspec.json.encode(pairs)).hexdigest()


def read_measurement(folder: Path, manifest: Manifest) -> Measurement | None:
    """None where there is none, or one of other files: then nothing is known."""
    try:
        found = msgspec.json.decode((folder / MEASUREMENT).read_bytes(), type=Measurement)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    same = found.schema_version == SCHEMA_VERSION and found.files == files_digest(manifest)
    return found if same else None


def write_measurement(folder: Path, measurement: Measurement) -> None:
    """At once, synced. Raises OSError."""
    data = msgspec.json.format(msgspec.json.encode(measurement), indent=1)
    replace_synced(folder / MEASUREMENT, data + b"\n")
