"""llguidance: grammars in its terms, its limits, and its complaints in words for a client.

llguidance (github.com/guidance-ai/llguidance, docs/json_schema.md and docs/syntax.md) follows JSON schemas,
regular expressions and Lark grammars byte by byte, with an Earley parser over a lazy lexer. It is imported
when the first grammar comes.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from server.engine.constrain import Words
from server.types import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# At most one space where JSON has room for blanks: small models would fill it without end. No \uXXXX in
# strings: by them a property that has a schema of its own could be written under the name of any other.
JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": " ",
    "item_separator": ",",
    "key_separator": ":",
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}
LEXER_FUEL = 1_000_000  # of the initial automaton, some 20 ms
STEP_ITEMS = 50_000  # of one mask, some 20 ms


class Spelling:
    """What llguidance asks of a tokenizer. Forced texts are spelt by the longest tokens."""

    def __init__(self, words: Words) -> None:
        self.tokens = list(words.pieces)
        self.special_token_ids = sorted(words.control)
        self.eos_token_id = min(words.ends, default=0)
        self.bos_token_id = None
        self.trie: LLTokenizer | None = None

    def __call__(self, text: str) -> Sequence[int]:
        if isinstance(text, bytes) or self.trie is None:
            raise TypeError("only text, and only once the trie is there")
        return self.trie.greedy_tokenize(text)


def tokenizer_of(words: Words) -> "LLTokenizer":
    """Takes 5 us a token. Without an end token, one that no model can sample stands for it."""
    from llguidance import LLTokenizer, TokenizerWrapper

    spelling = Spelling(words)
    ends = sorted(words.ends)
    if not ends:
        ends = [len(spelling.tokens)]
        spelling.tokens.append(b"<end>")
        spelling.special_token_ids.append(ends[0])
        spelling.eos_token_id = ends[0]
    spelling.trie = LLTokenizer(TokenizerWrapper(spelling), eos_token=ends)
    return spelling.trie


def matcher_of(source: str, tokenizer: "LLTokenizer") -> "LLMatcher":
    """Compiles; the matcher itself says whether that went wrong. Lets go of the interpreter meanwhile."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=LEXER_FUEL, step_max_items=STEP_ITEMS, verbose_errors=False, max_items_in_row=2000
    )
    return LLMatcher(tokenizer, source, log_level=0, limits=limits)


def source_of(grammar: Grammar) -> str:
    """The grammar in llguidance's JSON. `text` is known to be of its kind."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(with_options(grammar.text))
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            texts = msgspec.json.decode(grammar.text, type=list[str])
            choices = " | ".join(map(_quoted, texts))
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _quoted(text: str) -> str:
    """As Lark has it, which takes no raw control characters."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def with_options(schema: str) -> str:
    return json.dumps({**json.loads(schema), "x-guidance": JSON_OPTIONS}, ensure_ascii=False)


UNKNOWN = "it is not a grammar that can be used"
KEYWORDS = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
REGEX_ERROR = re.compile(r"error: ([A-Za-z][\w ,:'<=-]*)")
REVERSED = re.compile(r"(\w+) \([^()]*\) is greater than (\w+) \(")
COMPLAINTS = (
    ("Unknown format", "the keyword format can only be enforced for date-time, time, date, duration, email, "
     "hostname, ipv4, ipv6, uuid and uri"),
    ("oneOf", "the keyword oneOf can only be enforced where no two of its cases overlap"),
    ("min/maxProperties", "the keywords minProperties and maxProperties can only be enforced where every one "
     "of properties is required"),
    ("patternPropert", "the keyword patternProperties can only be enforced for expressions that exclude each "
     "other"),
    ("Invalid type", "the keyword type names no type of JSON"),
    ("Pointer", "the keyword $ref must point to a part of the schema"),
    ("Anchor", "the keyword $ref must point to a part of the schema"),
    ("Resource", "the keyword $ref, or $schema, must name nothing outside of the schema"),
    ("lookarounds", "an expression (pattern) cannot be used: ^ and $ can only stand where it, or an "
     "alternative of it, begins and ends, and \\b nowhere"),
    ("float range", "the keywords minimum and maximum are too far apart to be enforced"),
    ("required property", "no value can satisfy this schema: a property in required has none"),
    ("contain a multiple", "no value can satisfy this schema: no multipleOf is between minimum and maximum"),
    ("no integer values", "no value can satisfy this schema: no integer is between minimum and maximum"),
    ("incompatible types", "no value can satisfy this schema: type, enum, const and the like exclude each "
     "other"),
    ("Unsatisfiable", "no value can satisfy this schema"),
    ("regex is empty", "the keyword pattern cannot be enforced together with others of its kind"),
    ("too large", "it is too large"),
    ("nested", "it is nested too deeply"),
    ("limit", "it is too complex"),
    ("too complex", "it is too complex"),
)  # fmt: skip


def complaint(error: str) -> str:
    """Why a grammar is refused, in one line that repeats nothing of it but keywords of JSON schema."""
    if found := KEYWORDS.search(error):
        names = ", ".join(msgspec.json.decode(found[1], type=list[str]))
        return f"cannot be enforced: the keyword {names}"
    if "regex" in error and (found := REGEX_ERROR.search(error)):
        return f"an expression (pattern) cannot be used: {found[1].strip()}"
    if found := REVERSED.search(error):
        return f"no value can satisfy this schema: {found[1]} is greater than {found[2]}"
    return next((ours for theirs, ours in COMPLAINTS if theirs in error), UNKNOWN)
