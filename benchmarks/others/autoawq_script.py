"""Run by the Python of an environment with AutoAWQ: MODEL ROWS OUT; ROWS is JSON, lists of token ids."""

import json
import sys

import torch
from awq import AutoAWQForCausalLM
from transformers import AutoTokenizer


def main(model: str, rows_file: str, out: str) -> None:
    with open(rows_file) as stream:
        rows = json.load(stream)
    tokenizer = AutoTokenizer.from_pretrained(model)
    awq = AutoAWQForCausalLM.from_pretrained(
        model, device_map="cpu", torch_dtype=torch.float32, safetensors=True
    )
    awq.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=len(rows[0]),
        n_parallel_calib_samples=32,
    )
    awq.save_quantized(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
