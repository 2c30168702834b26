"""The words that all floors share: what is asked of an engine and what it answers.

Every class is an immutable msgspec struct, so the same object is the Python value and, tagged by its
class name, the wire message.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length", "abort"]


class Candidates(Struct, frozen=True, array_like=True):
    """Tokens whose log-probabilities are wanted at the prompt's positions from `first` on, so many at each.

    Only measuring asks for them: whoever compares two models wants to know of the same tokens.
    """

    first: int  # at least 1: nothing predicts the prompt's first token
    count: int
    ids: bytes  # int32, little-endian, [positions, count]

    def at(self, position: int) -> bytes:
        """Those of one position, b"" before the first."""
        start = 4 * self.count * (position - self.first)
        return self.ids[start : start + 4 * self.count] if position >= self.first else b""


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Ranges are checked at the API; here they are trusted."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0  # always set by the API (random where the client gave none)
    reproducible: bool = True  # computed as if alone: the same bits whatever else runs
    presence_penalty: float = 0.0  # over generated tokens
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none; k: the sampled token's and those of the k most likely
    prompt_logprobs: int | None = None  # the same for every prompt position but the first
    prompt_candidates: Candidates | None = None  # besides; only with prompt_logprobs
    stop_ids: tuple[int, ...] = ()  # end the answer; the stopping token is part of the event, not of the text


class Grammar(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an answer must be, to its end. The API has checked size, depth and whether it may be asked.

    `text` is a JSON schema, a regular expression, a JSON list of texts, or a grammar in llguidance's Lark.
    """

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str
    param: str = "response_format"  # the request's field that asked for it: errors name it


class Reasoning(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How this model marks its thoughts. A grammar begins to hold where they end."""

    open: str  # "<think>"
    close: str  # "</think>"
    close_ids: tuple[int, ...]  # `close` in tokens
    begun: bool = False  # the prompt ends within the thoughts
    budget: int | None = None  # tokens of thought, after which `close` is forced; None: no bound


class Generate(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    id: str
    prompt: tuple[int, ...]  # at least one token
    params: SamplingParams
    salt: str = ""  # prefixes are shared only among requests of equal salt
    priority: int = 0  # smaller runs first
    place: int = 0  # among the sequences of one request: later ones let some of other requests go first
    adapter: str | None = None  # LoRA adapter; no backend takes one yet
    grammar: Grammar | None = None
    reasoning: Reasoning | None = None  # only where there is a budget or a grammar


class Abort(Struct, frozen=True, kw_only=True, tag=True):
    id: str


class Hold(Struct, frozen=True, kw_only=True, tag=True):
    """Nobody takes what was sent: compute no more of this request until another Hold says so."""

    id: str
    on: bool


class Tokenize(Struct, frozen=True, kw_only=True, tag=True):
    """Asked only of engines whose model has no tokenizer.json (GGUF sources)."""

    id: str
    text: str
    add_special: bool  # add BOS/EOS as the model's tokenizer would
    parse_special: bool  # read "<|im_end|>" in the text as the control token


class Embed(Struct, frozen=True, kw_only=True, tag=True):
    """Asked only of engines whose Ready names a width."""

    id: str
    tokens: tuple[int, ...]  # at least one


class Shutdown(Struct, frozen=True, kw_only=True, tag=True):
    pass


class Limits(Struct, frozen=True, kw_only=True):
    """What an executor can hold."""

    running: int  # sequences decoded at once (`parallel`)
    slots: int  # sequences held at once, running and cached; at least `running`
    context: int  # tokens that one sequence may grow to
    kv_tokens: int  # tokens that all slots together may hold
    step_tokens: int  # tokens in one forward pass
    page: int = 16  # KV memory is counted, and shared, in pages of so many tokens
    deterministic: bool = False  # every sequence is reproducible, asked for or not

    def __post_init__(self) -> None:
        if not 0 < self.running <= self.slots:
            raise ValueError("0 < running <= slots is required")
        if self.step_tokens <= self.running:
            raise ValueError("step_tokens must exceed running, or prefill can starve")
        if self.kv_tokens < self.context:
            raise ValueError("kv_tokens must hold one full context")


class Open(Struct, frozen=True, kw_only=True, tag=True):
    """The first command an engine gets: what to serve and how."""

    backend: str  # a name of the registry
    variant: str  # folder of a published variant, or a GGUF file
    context: int | None  # None: the model's own
    parallel: int
    kv_tokens: int | None = None  # None: context x parallel
    threads: int | None = None  # None: what the machine allows
    options: dict[str, str] = {}


Command = Open | Generate | Abort | Hold | Tokenize | Embed | Shutdown


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """Natural logarithms over the whole vocabulary, before temperature, penalties and cuts."""

    logprob: float  # of the token itself
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), most likely first
    rank: int = 1  # of the token itself: 1 and the number of tokens that are more likely
    candidates: bytes = b""  # float32, little-endian: of each candidate, and log of all others' probability


class Tokens(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """New tokens of one request. The event with `finish` set is its last."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one for each token
    finish: FinishReason | None = None
    complete: bool = False  # `finish` is "stop" because the grammar ended: the last token belongs to the text
    cached_tokens: int | None = None  # in the first event: prompt tokens found in the prefix cache
    waited_s: float = 0.0  # in the first event: for a slot, and for its grammar to be ready
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # in the first event, one a position from 1 on


class Failed(Struct, frozen=True, kw_only=True, omit_defaults=True, tag=True):
    """The last event of a request that went wrong; `code` names a class of server.errors."""

    id: str
    code: str
    message: str
    param: str | None = None  # the parameter of the client's request that is to blame


class Tokenized(Struct, frozen=True, kw_only=True, tag=True):
    id: str
    tokens: tuple[int, ...]


class Embedded(Struct, frozen=True, kw_only=True, tag=True):
    id: str
    vector: bytes  # float32, little-endian, of length 1


Event = Tokens | Failed | Tokenized | Embedded  # about one request


class Loading(Struct, frozen=True, kw_only=True, tag=True):
    done: float  # 0 to 1


class ModelText(Struct, frozen=True, kw_only=True):
    """What the engine knows of a model's text, for models without a tokenizer.json."""

    pieces: tuple[bytes, ...]  # bytes of each token; a control token's name, by which templates write it
    control: tuple[int, ...]  # tokens that are never shown
    chat_template: str | None
    bos: int | None
    eos: int | None
    end_ids: tuple[int, ...]  # every token that ends an answer
    add_bos: bool
    space_first: bool = False  # the tokenizer puts a space before every text, which is not part of it
    tokenizer: str | None = None  # a tokenizer.json that gives the engine's tokens; None: the engine is asked


class Ready(Struct, frozen=True, kw_only=True, tag=True):
    limits: Limits
    backend: str
    text: ModelText | None = None  # set where the variant has no tokenizer.json
    embedding: int | None = None  # numbers in an embedding; None: this engine makes none


class OpenFailed(Struct, frozen=True, kw_only=True, tag=True):
    code: str
    message: str


class Status(Struct, frozen=True, kw_only=True, tag=True):
    """Gauges and counters since the start, sent when they changed (at most 20 a second) and when idle."""

    running: int = 0
    waiting: int = 0
    held: int = 0  # of both, whose readers do not read
    kv_used_tokens: int = 0
    kv_total_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0


class Events(Struct, frozen=True, kw_only=True, tag=True):
    """All events of one step in one frame: one system call a step, not one a token."""

    items: tuple[Event, ...]


Reply = Loading | Ready | OpenFailed | Status | Events
