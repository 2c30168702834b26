"""Small random checkpoints, written byte by byte so that a test can also write broken ones."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Entry = Mapping[str, Any]
Weights = dict[str, tuple[str, tuple[int, ...], bytes]]  # dtype, shape, data
VOCABULARY = 320
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def write_checkpoint(
    folder: Path, *, hidden: int = 64, layers: int = 2, dtype: str = "BF16", shards: int = 1, seed: int = 0
) -> Path:
    """A Llama that babbles, with everything a build needs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config_of(hidden, layers))
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0], "temperature": 0.7, "top_k": 40})
    words = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", words)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    write_weights(folder, weights_of(hidden, layers, dtype, seed), shards)
    return folder


def config_of(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def weights_of(hidden: int, layers: int, dtype: str, seed: int) -> Weights:
    half, ffn = hidden // 2, 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        block = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (half, hidden),
            "self_attn.v_proj": (half, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()})
    shapes["model.norm.weight"] = (hidden,)
    rng = np.random.default_rng(seed)
    return {name: (dtype, shape, _random(rng, shape, dtype)) for name, shape in shapes.items()}


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> bytes:
    values = (rng.standard_normal(shape) * 0.05).astype(np.float32)
    match dtype:
        case "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case "F16":
            return values.astype(np.float16).tobytes()
        case _:
            return values.tobytes()


def write_weights(folder: Path, weights: Weights, shards: int = 1) -> None:
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[number::shards]}
        write_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_safetensors(file: Path, weights: Weights) -> None:
    header: dict[str, Entry] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in weights.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    write_raw_safetensors(
        file, json.dumps(header).encode(), b"".join(data for _, _, data in weights.values())
    )


def write_raw_safetensors(file: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> None:
    claimed = len(header) if length is None else length
    file.write_bytes(claimed.to_bytes(8, "little") + header + data)


def write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value))


@cache
def tokenizer_json() -> str:
    """Byte-level BPE, learned from this file's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return str(tokenizer.to_str())
