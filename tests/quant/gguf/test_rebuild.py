"""The way back: a tokenizer.json out of a GGUF file's vocabulary, or the engine tokenizes."""

import dataclasses
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from quant.gguf.probe import PROBE, open_vocabulary, rebuilt
from quant.gguf.rebuild import CannotRebuild, read_stored, rebuild
from quant.gguf.tokenizer import read_vocabulary
from tests.quant.gguf.support import byte_tokenizer, save_tokenizer, sentence_tokenizer
from tests.quant.gguf.test_tokenizer import KNOWN, edited, vocabulary_file, write
from tests.quant.gguf.vocabularies import ENGINE, NAMES, PLACE, find, judge

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
TEXTS = (*PROBE, "a\u0301 x\r\n\r\n\t 0001 \u00df\u01c6", "<|im_start|>user\n  hi<|im_end|> there", " ", "")


@pytest.mark.parametrize("name", KNOWN)
def test_a_byte_level_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    pre_tokenizer, ignore_merges, _ = KNOWN[name]
    original = byte_tokenizer(2000, pre_tokenizer, ignore_merges=ignore_merges)
    save_tokenizer(tmp_path, original)
    _, path = vocabulary_file(tmp_path, original.get_vocab_size() + 3)  # some rows are unused
    assert_comes_back(original, path)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentencepiece_tokenizer_comes_back(prefixed: bool, tmp_path: Path) -> None:
    steps = [PREPEND, REPLACE] if prefixed else [REPLACE]
    normalizer = {"type": "Sequence", "normalizers": steps}
    original = edited(sentence_tokenizer(), normalizer=normalizer, pre_tokenizer=None)
    save_tokenizer(tmp_path, original, bos_token="<s>", eos_token="</s>")
    _, path = vocabulary_file(tmp_path, original.get_vocab_size())
    assert_comes_back(original, path)


def assert_comes_back(original: Tokenizer, path: Path) -> None:
    with open_vocabulary(path) as tokenize:
        text = rebuilt(path, tokenize)
        assert text is not None
        back = Tokenizer.from_str(text)
        for sample in TEXTS:
            ids = original.encode(sample, add_special_tokens=False).ids
            assert back.encode(sample, add_special_tokens=False).ids == ids
            if sample:
                assert tokenize(sample) == ids
                assert not original.decoder or back.decode(ids) == original.decode(ids)


def test_a_vocabulary_that_llama_cpp_reads_otherwise_is_not_believed(tmp_path: Path) -> None:
    original = byte_tokenizer(2000)
    save_tokenizer(tmp_path, original)
    _, path = vocabulary_file(tmp_path, 2000)
    with open_vocabulary(path) as tokenize:
        assert rebuilt(path, tokenize)
        assert rebuilt(path, lambda text: tokenize(text)[:-1]) is None


@pytest.mark.parametrize(("pre", "why"), [("kimi-k2", "'kimi-k2'"), ("superbpe", "'superbpe'")])
def test_what_only_llama_cpp_reads_is_named(pre: str, why: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_tokenizer(600))
    vocabulary = read_vocabulary(tmp_path, {}, 600)
    write(dataclasses.replace(vocabulary, pre=pre), tmp_path / "other.gguf")
    with pytest.raises(CannotRebuild, match=why):
        rebuild(read_stored(tmp_path / "other.gguf"))


def test_control_tokens_are_read_only_where_that_is_asked_for(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_tokenizer(600))
    _, path = vocabulary_file(tmp_path, 600)
    text = rebuild(read_stored(path))
    literal = Tokenizer.from_str(text)
    literal.encode_special_tokens = True
    assert len(Tokenizer.from_str(text).encode("<|im_end|>").ids) == 1
    assert len(literal.encode("<|im_end|>").ids) > 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = find(tmp_path_factory.mktemp("vocabularies"))
    if found is None:
        pytest.skip(f"{PLACE} names no folder or source package with llama.cpp's vocabularies")
    return found


@pytest.mark.parametrize("name", [*NAMES, *sorted(ENGINE)])
def test_llama_cpps_own_vocabularies(name: str, folder: Path) -> None:
    verdict = judge(folder / f"ggml-vocab-{name}.gguf")
    assert verdict.texts > 40
    assert not verdict.wrong
    assert verdict.how == ("engine" if name in ENGINE else "rebuilt")
