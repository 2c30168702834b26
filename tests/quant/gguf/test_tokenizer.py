"""Tokenizers: recognised by structure, read alike by llama.cpp and `tokenizers`, or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from quant.errors import BadSource, TokenizerMismatch
from quant.gguf.probe import compare
from quant.gguf.tokenizer import Vocabulary, read_vocabulary, write_vocabulary
from tests.quant.gguf.support import SPECIALS, byte_tokenizer, save_tokenizer, sentence_tokenizer

# Copied from the tokenizer.json of the models named, so that a slip in the table shows.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
QWEN2 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
NEMO = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*"
    "|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
HAN, KANA = "[一-龥ࠀ-一가-퟿]+", "[一-龥぀-ゟ゠-ヿ]+"  # noqa: RUF001
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGIT = pre_tokenizers.Digits(individual_digits=True)


def cut(*steps: Any) -> Any:
    """A sequence; a text is a regex to split at."""
    parts = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in steps]
    return pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


KNOWN: dict[str, tuple[Any, bool, str]] = {
    "GPT-2": (cut(GPT2), False, "gpt-2"),
    "SmolLM": (cut(DIGIT, GPT2), False, "smollm"),
    "Llama-3": (cut(LLAMA3, BYTES), True, "llama-bpe"),
    "Llama-3 merging": (cut(LLAMA3, BYTES), False, "smaug-bpe"),
    "Qwen2": (cut(QWEN2, BYTES), False, "qwen2"),
    "Mistral-Nemo": (cut(NEMO, BYTES), True, "tekken"),
    "DeepSeek-Coder": (
        cut("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", HAN, DIGIT, BYTES),
        False,
        "deepseek-coder",
    ),
    "DeepSeek-V3": (cut("\\p{N}{1,3}", KANA, DEEPSEEK3, BYTES), False, "deepseek-v3"),
}


def vocabulary_file(folder: Path, tokens: int, **config: Any) -> tuple[Vocabulary, Path]:
    """A GGUF file of the tokenizer alone."""
    vocabulary = read_vocabulary(folder, config, tokens)
    path = folder / "vocabulary.gguf"
    write(vocabulary, path)
    return vocabulary, path


def write(vocabulary: Vocabulary, path: Path) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    write_vocabulary(vocabulary, writer)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.close()


def edited(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    return Tokenizer.from_str(json.dumps({**json.loads(tokenizer.to_str()), **changes}))


@pytest.mark.parametrize("name", KNOWN)
def test_known_pre_tokenizers_are_recognised_and_read_alike(name: str, tmp_path: Path) -> None:
    pre_tokenizer, ignore_merges, expected = KNOWN[name]
    tokenizer = byte_tokenizer(3000, pre_tokenizer, ignore_merges=ignore_merges)
    save_tokenizer(tmp_path, tokenizer)
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())

    assert (vocabulary.model, vocabulary.pre) == ("gpt2", expected)
    compare(path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["GPT-2", "Llama-3", "Qwen2"])
def test_the_probe_tells_pre_tokenizers_apart(name: str, tmp_path: Path) -> None:
    """But not where the wrong rule only cuts less often than the one under which the merges were learned."""
    pre_tokenizer, ignore_merges, right = KNOWN[name]
    tokenizer = byte_tokenizer(3000, pre_tokenizer, ignore_merges=ignore_merges)
    save_tokenizer(tmp_path, tokenizer)
    vocabulary = read_vocabulary(tmp_path, {}, tokenizer.get_vocab_size())
    for wrong in (
        {"gpt-2", "llama-bpe", "qwen2", "deepseek-v3", "deepseek-coder"}
        - {right}
        - ({"llama-bpe"} if name == "Qwen2" else set())
    ):
        write(dataclasses.replace(vocabulary, pre=wrong), tmp_path / "wrong.gguf")
        with pytest.raises(TokenizerMismatch, match=r"llama\.cpp \[\d.*tokenizers \[\d"):
            compare(tmp_path / "wrong.gguf", tmp_path / "tokenizer.json")


def test_ignore_merges_without_a_name_needs_complete_merges(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(600, cut(QWEN2, BYTES), ignore_merges=True)
    save_tokenizer(tmp_path, tokenizer)
    assert read_vocabulary(tmp_path, {}, 600).pre == "qwen2"

    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"]["zz"] = 600  # z is read whole, though no merge makes it
    data["model"]["merges"] = [["zz", "z"], *data["model"]["merges"]]
    data["model"]["vocab"]["zzz"] = 601
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadSource, match="ignore_merges"):
        read_vocabulary(tmp_path, {}, 602)


SPACES: dict[str, tuple[Any, Any, bool]] = {
    "Llama-2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
    "Mistral": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
    "always": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
    "words": (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=True), True),
    "Gemma": (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    "never": (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
}


@pytest.mark.parametrize("name", SPACES)
def test_sentencepiece_tokenizers_are_read_alike(name: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer, prefix = SPACES[name]
    tokenizer = sentence_tokenizer(900)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    save_tokenizer(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>", unk_token={"content": "<unk>"})
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())

    assert (vocabulary.model, vocabulary.prefix_space) == ("llama", prefix)
    assert (vocabulary.specials.bos, vocabulary.specials.eos, vocabulary.specials.unk) == (1, 2, 0)
    assert vocabulary.specials.add_bos
    assert not vocabulary.specials.add_eos
    compare(path, tmp_path / "tokenizer.json")


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_what_transformers_saves_today_is_read(family: str, tmp_path: Path) -> None:
    import transformers

    if family == "Llama":
        model = json.loads(sentence_tokenizer(900).to_str())["model"]
        made = transformers.LlamaTokenizer(
            vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
        )
    else:
        model = json.loads(byte_tokenizer(600, cut(QWEN2, BYTES)).to_str())["model"]
        made = transformers.Qwen2Tokenizer(
            vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]
        )
    made.save_pretrained(tmp_path)
    vocabulary, path = vocabulary_file(tmp_path, len(made) + 5)

    assert vocabulary.model == {"Llama": "llama", "Qwen2": "gpt2"}[family]
    assert vocabulary.specials.eos == made.eos_token_id
    compare(path, tmp_path / "tokenizer.json")


def test_real_tokenizers_pass(tiny_chat: Path, shared: Any, tmp_path: Path) -> None:
    for folder, rows in ((tiny_chat, 16384), (shared("models/stories260K"), 512)):
        write(read_vocabulary(folder, {}, rows), tmp_path / "v.gguf")
        compare(tmp_path / "v.gguf", folder / "tokenizer.json")


def test_added_tokens_and_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(400)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<｜fim｜>", special=True)])  # noqa: RUF001
    save_tokenizer(tmp_path, tokenizer)
    vocabulary, path = vocabulary_file(tmp_path, 410)

    kind = gguf.TokenType
    assert vocabulary.tokens[400:404] == ("<tool>", "  ", "<｜fim｜>", "[PAD403]")  # noqa: RUF001
    assert vocabulary.kinds[400:404] == (kind.USER_DEFINED, kind.USER_DEFINED, kind.CONTROL, kind.UNUSED)
    assert len(set(vocabulary.tokens)) == 410
    compare(path, tmp_path / "tokenizer.json")


def test_jobs_of_tokens_and_template(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_tokenizer(400), add_bos_token=True, chat_template="in the config")
    specials = read_vocabulary(tmp_path, {}, 400).specials
    assert (specials.bos, specials.eos, specials.add_bos, specials.template) == (0, 2, True, "in the config")

    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}
        )
    )
    specials = read_vocabulary(
        tmp_path, {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 999}, 400
    ).specials
    assert (specials.bos, specials.eos, specials.pad, specials.add_bos) == (1, 2, None, False)
    assert specials.template == "d"

    (tmp_path / "chat_template.jinja").write_text("beside it")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": SPECIALS[2]}))
    specials = read_vocabulary(tmp_path, {}, 400).specials
    assert (specials.bos, specials.eos, specials.template) == (None, 2, "beside it")


def model_with(**changes: Any) -> dict[str, Any]:
    return {**json.loads(byte_tokenizer(400).to_str())["model"], **changes}


def steps(*parts: Any) -> Any:
    return json.loads(byte_tokenizer(300, cut(*parts)).to_str())["pre_tokenizer"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown regex": ({"pre_tokenizer": steps("\\w+", BYTES)}, "pre-tokenizer"),
    "space before": ({"pre_tokenizer": steps(pre_tokenizers.ByteLevel())}, "pre-tokenizer"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "spaces"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
    "word pieces": ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece"),
    "unigram": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
    "dropout": ({"model": model_with(dropout=0.1)}, "dropout"),
    "suffix": ({"model": model_with(end_of_word_suffix="</w>")}, "end_of_word_suffix"),
    "bad merge": ({"model": model_with(merges=["a b c"])}, "merge"),
    "bad id": ({"model": model_with(vocab={"a": 0, "b": 0})}, "id"),
    "shared id": ({"added_tokens": [{"id": 5, "content": "x<", "special": True}]}, "token 5"),
    "shared text": ({"added_tokens": [{"id": 400, "content": "a", "special": True}]}, "same text"),
    "NUL": ({"added_tokens": [{"id": 400, "content": "a\0", "special": True}]}, "NUL"),
    "beyond the embedding": ({"added_tokens": [{"id": 450, "content": "far", "special": True}]}, "401 rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_read_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    changes, words = REFUSED[name]
    data = {**json.loads(byte_tokenizer(400).to_str()), **changes}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadSource, match=words) as caught:
        read_vocabulary(tmp_path, {}, 401)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, {}, 10)


def test_sentencepiece_needs_its_bytes_and_whole_words(tmp_path: Path) -> None:
    tokenizer = sentence_tokenizer(600)
    data = json.loads(tokenizer.to_str())
    del data["model"]["vocab"]["<0x41>"]
    data["model"]["vocab"]["A" * 9] = 3 + 0x41
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadSource, match="256"):
        read_vocabulary(tmp_path, {}, 600)

    data = json.loads(tokenizer.to_str())
    data["model"]["vocab"]["a▁b"] = 600
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(BadSource, match="crosses a space"):
        read_vocabulary(tmp_path, {}, 601)


def test_plain_bpe_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadSource, match="neither byte-level"):
        read_vocabulary(tmp_path, {}, 2)


def test_a_lost_merge_is_told_with_both_token_lists(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(600)
    save_tokenizer(tmp_path, tokenizer)
    vocabulary = read_vocabulary(tmp_path, {}, 600)
    write(dataclasses.replace(vocabulary, merges=vocabulary.merges[1:]), tmp_path / "less.gguf")
    with pytest.raises(TokenizerMismatch, match=r"llama\.cpp \[.*\], tokenizers \[.*\]") as caught:
        compare(tmp_path / "less.gguf", tmp_path / "tokenizer.json")
    assert str(tmp_path) not in str(caught.value)


def test_a_broken_file_is_no_mismatch(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_tokenizer(400))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BadSource) as caught:
        compare(tmp_path / "broken.gguf", tmp_path / "tokenizer.json")
    assert str(tmp_path) not in str(caught.value)
