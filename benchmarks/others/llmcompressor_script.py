"""Run by the Python of an environment with llm-compressor: MODEL ROWS OUT; ROWS is JSON, lists of token ids.

AWQ's scales and then codes of 4 bits with zero points, groups of 128, all at its defaults.
"""

import json
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main(model: str, rows_file: str, out: str) -> None:
    with open(rows_file) as stream:
        rows = json.load(stream)
    if not torch.cuda.is_available():  # it pins memory for a device even where there is none
        setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)  # noqa: B010
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.generation_config = GenerationConfig()  # it refuses to save sampling that is off
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(
        model=loaded,
        tokenizer=tokenizer,
        dataset=text,
        recipe=[
            AWQModifier(),
            QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="W4A16_ASYM"),
        ],
        num_calibration_samples=len(rows),
        max_seq_length=len(rows[0]),
        shuffle_calibration_samples=False,
    )
    loaded.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
