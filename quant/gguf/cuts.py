"""The regular expressions by which llama.cpp's pre-tokenizers cut text, for `tokenizers`, by their names.

Source: llama-vocab.cpp (llm_tokenizer_bpe, llama_vocab::impl::load), without those that it computes by code
of its own. Each expression cuts the pieces that the one before it left; what none matches stays a piece.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quant.gguf.pretokenizers import (
    DEEPSEEK3,
    GPT4O,
    HAN,
    KANA,
    LLAMA3,
    LONG_NUMBERS,
    QWEN2,
    SEED,
    TEKKEN,
    WIDE_SIGNS,
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
SIGNS = r"[\p{P}\$\+<=>\^~\|`]+"
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
THREE = "[0-9][0-9][0-9]"
# Letters with case that DeepSeek's list of ranges holds: those of Unicode but for some scripts and symbols.
CASED = (
    r"\s?[\x{0295}[\p{Lu}\p{Ll}\p{Lt}&&[^\x{0560}-\x{0588}\x{10c7}\x{10cd}\x{10d0}-\x{10ff}\x{1c80}-\x{1c8a}"
    r"\x{2d00}-\x{2d2d}\x{a790}-\x{a7fa}\x{ab30}-\x{ab6d}\x{10570}-\x{105bc}\x{10d50}-\x{10d85}"
    r"\x{16e40}-\x{16ed3}\x{1d400}-\x{1d7cb}\x{1df00}-\x{1df96}]]]+"
)


@dataclass(frozen=True)
class Cuts:
    regexes: tuple[str, ...]
    ignores_merges: bool = False  # a whole piece that is in the vocabulary is one token


def _all(names: str, cuts: Cuts) -> dict[str, Cuts]:
    return dict.fromkeys(names.split(), cuts)


CUTS: Mapping[str, Cuts] = MappingProxyType(
    {
        **_all("default", Cuts((SIGNS.replace("`", ""), GPT2, r"\p{N}+", THREE))),
        **_all("gpt-2 phi-2 jina-es jina-de gigachat a.x-4.0 mellum exaone4 mpt olmo jais", Cuts((GPT2,))),
        **_all("trillion granite-docling roberta-bpe", Cuts((GPT2,))),
        **_all("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2", Cuts((LLAMA3,), True)),
        **_all("glm4 glm5", Cuts((LLAMA3,), True)),
        **_all("dbrx smaug-bpe chatglm-bpe", Cuts((LLAMA3,))),
        **_all("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan grok-2", Cuts((QWEN2,))),
        **_all("solar-open", Cuts((QWEN2,))),
        **_all("qwen35", Cuts((QWEN35,))),
        **_all(
            "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", Cuts((r"\p{N}", GPT2))
        ),
        **_all("falcon", Cuts((SIGNS, GPT2, THREE))),
        **_all("deepseek-llm", Cuts((r"[\r\n]", CASED, WIDE_SIGNS, r"\s+$", HAN, r"\p{N}+"))),
        **_all("deepseek-coder", Cuts((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"))),
        **_all("deepseek-v3 hunyuan-dense joyai-llm hy_v4", Cuts((r"\p{N}{1,3}", KANA, DEEPSEEK3))),
        **_all("tekken", Cuts((TEKKEN,), True)),
        **_all("gpt-4o llama4 kanana2 minimax-m2", Cuts((GPT4O,))),
        **_all("seed-coder", Cuts((SEED,))),
        **_all("minicpm5", Cuts((r"\p{N}{1,3}", LONG_NUMBERS), True)),
    }
)
