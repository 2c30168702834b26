"""All that the server knows of one model's text."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from quant.errors import BadSource
from quant.texts import folder_texts
from server.errors import OpenError
from server.text import formats, reasoning
from server.text.defaults import default_template
from server.text.detokenize import Detokenizer
from server.text.template import MAX_SOURCE, ChatTemplate, Message
from server.text.tokenizer import Encode, LocalTokenizer
from server.text.vocabulary import MAX_FILE_BYTES, Start, Vocabulary, parse_vocabulary, read_capped
from server.types import ModelText

Origin = Literal["model", "default-chatml", "default-plain"]


class Sampling(Struct, frozen=True):
    """What the model's authors recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class TextFile(Struct, frozen=True):
    """text.json of a published variant."""

    bos: int | None = None
    eos: int | None = None
    end_ids: tuple[int, ...] = ()
    add_bos: bool = False
    context: int | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True, kw_only=True)
class TextModel:
    vocabulary: Vocabulary
    template: ChatTemplate
    template_origin: Origin
    encoder: Encode
    end_ids: frozenset[int]  # tokens that end an answer
    bos: int | None
    eos: int | None
    add_bos: bool
    context: int | None
    sampling: Sampling
    default_stops: tuple[str, ...]  # end a chat answer besides the client's own
    marks: reasoning.Marks | None  # around the thoughts of a model that has some
    tool_format: formats.ToolFormat  # how this model writes calls

    @classmethod
    def from_folder(cls, path: Path) -> "TextModel":
        """The text of a published variant, or of a checkpoint that is served as it is. Raises OpenError.

        Reads a few MB: call it in a thread.
        """
        if not (path / "text.json").exists() and (path / "config.json").exists():
            return cls._from_checkpoint(path)
        data = read_capped(path / "tokenizer.json", MAX_FILE_BYTES)
        facts = read_facts(path / "text.json")
        encoder = LocalTokenizer(data.decode("utf-8", "replace"), facts.bos if facts.add_bos else None)
        return assemble(facts, parse_vocabulary(data), encoder, read_template(path / "chat_template.jinja"))

    @classmethod
    def _from_checkpoint(cls, path: Path) -> "TextModel":
        try:
            files = folder_texts(path)
        except BadSource as error:
            raise OpenError(str(error)) from None
        data, template = files["tokenizer.json"], files.get("chat_template.jinja")
        facts = msgspec.json.decode(files["text.json"], type=TextFile)
        encoder = LocalTokenizer(data.decode("utf-8", "replace"), facts.bos if facts.add_bos else None)
        source = None if template is None else template.decode("utf-8", "replace")
        return assemble(facts, parse_vocabulary(data), encoder, source)

    @classmethod
    def from_engine(cls, text: ModelText, tokenize: Encode) -> "TextModel":
        """A model without tokenizer.json. Raises OpenError for a broken template.

        Its engine made one of the vocabulary, or is asked by `tokenize`.
        """
        facts = TextFile(text.bos, text.eos, text.end_ids, text.add_bos)
        start: Start = "one" if text.space_first else "keep"
        vocabulary = Vocabulary(text.pieces, frozenset(text.control), start)
        encoder = (
            LocalTokenizer(text.tokenizer, text.bos if text.add_bos else None) if text.tokenizer else tokenize
        )
        return assemble(facts, vocabulary, encoder, text.chat_template)

    @property
    def pieces(self) -> tuple[bytes, ...]:
        return self.vocabulary.pieces

    @property
    def control(self) -> frozenset[int]:
        return self.vocabulary.control

    @property
    def vocab_size(self) -> int:
        return len(self.vocabulary.pieces)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Message] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """As ChatTemplate.render. At most 2 s of CPU time: call it in a thread, or use `encode_chat`."""
        return self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            extra=extra,
        )

    async def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens; `add_special` puts BOS in front where this model wants it. Raises RequestError."""
        return await self.encoder(text, add_special=add_special, parse_special=parse_special)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Message] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The tokens of a chat prompt: `render`, in a thread, and `encode_rendered`."""
        rendered = await asyncio.to_thread(
            self.render,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            extra=extra,
        )
        return await self.encode_rendered(rendered)

    async def encode_rendered(self, rendered: str) -> list[int]:
        """Tokens of a rendered prompt, with exactly one BOS where the model wants one.

        Control tokens are read wherever they stand, also in what a user wrote: a template is text
        and does not say where a message ends. transformers and llama.cpp do the same.
        """
        bos = "" if self.bos is None else self.vocabulary.text_of(self.bos)
        has_bos = bos != "" and rendered.startswith(bos)
        return await self.encode(rendered, add_special=not has_bos, parse_special=True)

    def detokenizer(
        self, *, show_control: bool = False, begins: bool = True, shown: frozenset[int] = frozenset()
    ) -> Detokenizer:
        """For one text. `begins`: it is a text of its own (a chat answer), not the rest of a prompt."""
        return Detokenizer(self.vocabulary, show_control=show_control, begins=begins, shown=shown)


def assemble(facts: TextFile, vocabulary: Vocabulary, encoder: Encode, source: str | None) -> TextModel:
    ends = {*facts.end_ids, *(() if facts.eos is None else (facts.eos,))}
    origin: Origin = "model"
    stops: tuple[str, ...] = ()
    if source is None:
        default = default_template(vocabulary)
        origin, source, stops = default.origin, default.source, default.stops
        ends |= {token for text in default.ends if (token := vocabulary.find(text)) is not None}
    template = ChatTemplate(source, special_tokens(facts, vocabulary))
    return TextModel(
        vocabulary=vocabulary,
        template=template,
        template_origin=origin,
        encoder=encoder,
        end_ids=frozenset(ends),
        bos=facts.bos,
        eos=facts.eos,
        add_bos=facts.add_bos,
        context=facts.context,
        sampling=facts.sampling,
        default_stops=stops,
        marks=reasoning.marks_of(source, vocabulary),
        tool_format=formats.format_of(source),
    )


def special_tokens(facts: TextFile, vocabulary: Vocabulary) -> dict[str, str]:
    """The variables by which templates write them; one that the model lacks stays undefined."""
    texts = {
        "bos_token": "" if facts.bos is None else vocabulary.text_of(facts.bos),
        "eos_token": "" if facts.eos is None else vocabulary.text_of(facts.eos),
        "unk_token": vocabulary.unk or "",
    }
    return {name: text for name, text in texts.items() if text}


def read_facts(path: Path) -> TextFile:
    try:
        return msgspec.json.decode(read_capped(path, 1 << 20), type=TextFile)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise OpenError(f"text.json is not usable: {str(error)[:200]}") from None


def read_template(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return read_capped(path, 4 * MAX_SOURCE).decode("utf-8")
    except UnicodeDecodeError:
        raise OpenError("chat_template.jinja is not UTF-8") from None
