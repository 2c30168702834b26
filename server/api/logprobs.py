"""Scored tokens in OpenAI's two shapes, a list of tokens (chat) and parallel lists (completions); prompts in
vLLM's."""

from collections.abc import Sequence

from server.api.choice import Scored
from server.api.schema.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from server.text.vocabulary import Vocabulary

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


def chat_logprobs(scored: Sequence[Scored], vocabulary: Vocabulary) -> ChatLogprobs:
    return ChatLogprobs(content=[_token(one, vocabulary) for one in scored])


def completion_logprobs(
    scored: Sequence[Scored], vocabulary: Vocabulary, most: int | None = None, *, start: int = 0
) -> CompletionLogprobs:
    """`most`: likely tokens that are listed; `start`: characters of the text before the first token."""
    offsets = []
    for one in scored:
        offsets.append(start)
        start += len(one.text)
    return CompletionLogprobs(
        tokens=[one.text for one in scored],
        token_logprobs=[None if one.logprobs is None else _finite(one.logprobs.logprob) for one in scored],
        top_logprobs=[_alternatives(one, vocabulary, most) for one in scored],
        text_offset=offsets,
    )


def prompt_logprobs(prompt: Sequence[Scored], vocabulary: Vocabulary, most: int) -> PromptLogprobs:
    """Each position of the prompt; null for the first, which nothing comes before."""
    return [_ranked(one, vocabulary, most) for one in prompt]


def token_name(token: int, vocabulary: Vocabulary) -> str:
    """Its text; bytes that are no whole characters are spelled out, so that no two such tokens look alike."""
    raw = vocabulary.bytes_of(token)
    try:
        return raw.decode() or f"token_id:{token}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _token(one: Scored, vocabulary: Vocabulary) -> TokenLogprob:
    assert one.logprobs is not None, "every token of an answer is scored"
    return TokenLogprob(
        token=token_name(one.token, vocabulary),
        logprob=_finite(one.logprobs.logprob),
        bytes=list(vocabulary.bytes_of(one.token)),
        top_logprobs=[
            TopLogprob(
                token=token_name(token, vocabulary),
                logprob=_finite(logprob),
                bytes=list(vocabulary.bytes_of(token)),
            )
            for token, logprob in one.logprobs.top
        ],
    )


def _ranked(one: Scored, vocabulary: Vocabulary, most: int) -> dict[str, PromptLogprob] | None:
    if one.logprobs is None:
        return None
    own = (one.token, one.logprobs.logprob, one.logprobs.rank)
    likely = ((token, logprob, rank) for rank, (token, logprob) in enumerate(one.logprobs.top[:most], 1))
    return {
        str(token): PromptLogprob(
            logprob=_finite(logprob), rank=rank, decoded_token=token_name(token, vocabulary)
        )
        for token, logprob, rank in (own, *likely)
    }


def _alternatives(one: Scored, vocabulary: Vocabulary, most: int | None) -> dict[str, float] | None:
    """The most likely tokens, and the chosen one where it is not among them."""
    if one.logprobs is None:
        return None
    ranked = (*one.logprobs.top[:most], (one.token, one.logprobs.logprob))
    return {token_name(token, vocabulary): _finite(logprob) for token, logprob in ranked}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
