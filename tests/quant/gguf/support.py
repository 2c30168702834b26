"""What the tests of this folder share: tiny checkpoints, and llama.cpp as an oracle."""

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quant.gguf.convert import FloatType, convert
from quant.gguf.native import captured, library
from quant.gguf.probe import PROBE
from quant.source import Source

Logits = npt.NDArray[np.float32]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def source_of(folder: Path) -> Source:
    """As quant.source makes it, without digests."""
    config = json.loads((folder / "config.json").read_text())
    return Source(
        kind="hf",
        id=folder.name,
        path=folder,
        revision=None,
        digest="0" * 64,
        architecture=config["architectures"][0],
        config=config,
        bytes=0,
    )


def converted(folder: Path, target: Path, float_type: FloatType = "f32") -> Path:
    convert(source_of(folder), target, float_type=float_type, progress=lambda _done, _total: None)
    return target


def byte_tokenizer(
    vocabulary: int = 400, pre_tokenizer: Any = None, *, ignore_merges: bool = False
) -> Tokenizer:
    """Byte-level BPE trained on the probe text, so that wrong cuts show as wrong tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROBE * 2, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_tokenizer(vocabulary: int = 500) -> Tokenizer:
    """SentencePiece-style BPE with byte fallback; the caller adds how spaces are treated."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROBE * 2, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, **config: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def checkpoint(
    folder: Path, model_class: Any, *, dtype: str = "float32", shard: str = "1GB", **config: Any
) -> Path:
    """A random checkpoint with lively weights (norms, biases and attention all matter)."""
    import torch

    torch.manual_seed(len(json.dumps(config, default=str)))
    small = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    model = model_class(model_class.config_class(**{**small, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * spread if "norm" in name else 0.2 * spread)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder, byte_tokenizer(small["vocab_size"]))
    return folder


def rewrite(path: Path, **changes: Any) -> None:
    """Change a JSON file's keys; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def reference(folder: Path, tokens: Sequence[int]) -> Logits:
    """transformers' logits in float32, one row a token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits: Logits = model(torch.tensor([list(tokens)])).logits[0].numpy()
    return logits


@contextmanager
def _opened(gguf: Path, context: int) -> Iterator[tuple[Any, Any]]:
    native = library()
    params = native.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.type_k = params.type_v = native.GGML_TYPE_F32
    params.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_threads = params.n_threads_batch = 1
    with captured() as log:
        model = native.llama_model_load_from_file(os.fsencode(gguf), native.llama_model_default_params())
        assert model, log.errors
        opened = native.llama_init_from_model(model, params)
        assert opened, log.errors
        try:
            yield model, opened
        finally:
            native.llama_free(opened)
            native.llama_model_free(model)


def _decode(opened: Any, tokens: Sequence[int], start: int) -> None:
    native = library()
    batch = native.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for row, token in enumerate(tokens):
        batch.token[row], batch.pos[row], batch.logits[row] = token, start + row, 1
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
    assert native.llama_decode(opened, batch) == 0
    native.llama_batch_free(batch)


def _rows(model: Any, opened: Any, count: int) -> Logits:
    native = library()
    width = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
    data = native.llama_get_logits(opened)
    return np.ctypeslib.as_array(ctypes.cast(data, ctypes.POINTER(ctypes.c_float)), (count, width)).copy()


def llama_logits(gguf: Path, tokens: Sequence[int]) -> Logits:
    """llama.cpp's logits with an F32 cache, one row a token."""
    with _opened(gguf, max(256, len(tokens))) as (model, opened):
        _decode(opened, tokens, 0)
        return _rows(model, opened, len(tokens))


def llama_greedy(gguf: Path, prompt: Sequence[int], count: int) -> list[int]:
    with _opened(gguf, 256) as (model, opened):
        _decode(opened, prompt, 0)
        answer = [int(_rows(model, opened, len(prompt))[-1].argmax())]
        while len(answer) < count:
            _decode(opened, answer[-1:], len(prompt) + len(answer) - 1)
            answer.append(int(_rows(model, opened, 1)[0].argmax()))
        return answer


def worst(ours: Logits, theirs: Logits) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
