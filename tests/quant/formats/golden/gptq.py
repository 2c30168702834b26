"""Writes gptq.safetensors with GPTQModel's own code; run once, in an environment that has it.

    pip install --no-deps gptqmodel==7.6.0      # beside torch 2.13.0, transformers 5.23.0 and this repository
    GPTQMODEL_CPU_WORKERS=4 python tests/quant/formats/golden/gptq.py

For every case: the tensors that TorchLinear packs, in both versions, and the float16 weights that its reader
decodes from the tensors that *we* pack. Both must meet the plain layer, or nothing is written.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn

from quant import numerics
from quant.formats.gptq import GPTQ, GPTQ_V2
from quant.layer import AffineLinear
from quant.scheme import Scheme

HERE = Path(__file__).parent
OUT, COLUMNS = 16, 64
PARTS = ("qweight", "qzeros", "scales", "g_idx")
CASES = {
    "w4g32": Scheme(bits=4, group=32),
    "w4row": Scheme(bits=4, group=None),
    "w8g64": Scheme(bits=8, group=64),
    "w8row": Scheme(bits=8, group=None),
    "w4g32-asymmetric": Scheme(bits=4, group=32, symmetric=False),
    "w8g32-asymmetric": Scheme(bits=8, group=32, symmetric=False),
}


def plain(seed: int, scheme: Scheme) -> AffineLinear:
    weight = torch.randn(OUT, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 0.02
    if not scheme.symmetric:
        weight[::3] = weight[::3].abs()  # zero points of 0, which borrow in version 1
    return numerics.round_to_nearest(weight, scheme, torch.float16)


def module_of(scheme: Scheme, **options: Any) -> TorchLinear:
    return TorchLinear(
        bits=scheme.bits,
        group_size=scheme.group or -1,
        sym=scheme.symmetric,
        desc_act=False,
        in_features=COLUMNS,
        out_features=OUT,
        **options,
    )


def written(layer: AffineLinear) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What GPTQModel packs: (version 1, version 2)."""
    linear = nn.Linear(COLUMNS, OUT, bias=False)
    linear.weight.data = layer.dequantize()
    module = module_of(layer.scheme)
    module.pack_original(linear, layer.scales.float(), layer.zeros.float())
    second = {part: getattr(module, part).clone() for part in PARTS}
    group = layer.scheme.group or -1
    config = QuantizeConfig(bits=layer.scheme.bits, group_size=group, sym=layer.scheme.symmetric)
    convert_gptq_v2_to_v1_format_module(module, config)
    return {part: getattr(module, part).clone() for part in PARTS}, second


def decoded(layer: AffineLinear) -> Tensor:
    """What GPTQModel's reader makes of our version 1."""
    module = module_of(layer.scheme)
    for part, tensor in GPTQ.pack(layer).items():
        getattr(module, part).copy_(tensor)
    module.qzero_format(format=1)
    convert_gptq_v1_to_v2_format_module(module, layer.scheme.bits, torch.int32)
    module.post_init()
    weight: Tensor = module.dequantize_weight().T
    return weight.contiguous()


def main() -> None:
    golden: dict[str, Tensor] = {}
    for seed, (name, scheme) in enumerate(CASES.items()):
        layer = plain(seed, scheme)
        first, second = written(layer)
        for ours, theirs in ((GPTQ.pack(layer), first), (GPTQ_V2.pack(layer), second)):
            for part in PARTS:
                assert torch.equal(ours[part], theirs[part]), (name, part)
        weight = decoded(layer)
        assert torch.equal(weight, layer.dequantize().half()), name
        golden |= {f"{name}.{part}": tensor for part, tensor in first.items()}
        golden |= {f"{name}.qzeros_v2": second["qzeros"], f"{name}.decoded": weight}
    made = {"gptqmodel": version("gptqmodel"), "torch": torch.__version__, "by": Path(__file__).name}
    save_file(golden, HERE / "gptq.safetensors", metadata=made)


if __name__ == "__main__":
    main()
