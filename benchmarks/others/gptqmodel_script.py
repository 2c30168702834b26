"""Run by the Python of an environment with GPTQModel: MODEL ROWS OUT; ROWS is JSON, lists of token ids."""

import json
import sys

from gptqmodel import GPTQModel, QuantizeConfig


def main(model: str, rows_file: str, out: str) -> None:
    with open(rows_file) as stream:
        rows = json.load(stream)
    config = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False)
    gptq = GPTQModel.load(model, config, device="cpu")
    gptq.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    gptq.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
