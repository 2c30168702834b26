"""The source's own weights in one number type, tensor by tensor: what the torch backend serves as it is."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.building import Road, versions
from quant.calibrate import open_tokenizer
from quant.checkpoint import CONFIG
from quant.safetensors_header import TensorInfo, read_header
from quant.store import Variant
from quant.stream.road import as_json, bits_per_weight
from quant.stream.shards import write_shards
from quant.tensors import DTYPES, cast, read_tensors, write_file
from quant.texts import companion_files, read_words, text_files, write_texts
from quant.torch_plan import DTYPES as NAMES
from quant.torch_plan import plan_torch
from quant.torch_recipe import TorchRecipe


@dataclass(kw_only=True)
class PlainRoad(Road):
    """Raises BadSource (also for a number that the type cannot hold), DiskFull."""

    recipe: TorchRecipe

    def build(self) -> Variant:
        layout = plan_torch(self.source, self.recipe).layout
        open_tokenizer(self.source)
        words = read_words(self.source, layout.embedding.shape[0], layout.context)
        self.place.start()
        with self.stage("convert", "tensors") as step:
            pieces = self._pieces(tuple(layout.tensors), step)
        with self.stage("assemble", "bytes") as step:
            write_shards(pieces, self.place.out, step)
            shutil.rmtree(self._folder)
        dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[self.recipe.dtype or "bf16"]
        config = {key: value for key, value in self.source.config.items() if key != "dtype"}
        texts = {**companion_files(self.source), **text_files(self.source, words)}
        write_texts({CONFIG: as_json({**config, "torch_dtype": dtype}), **texts}, self.place.out)
        return self.publish(bits_per_weight(pieces, layout.elements), versions("torch"), resumed=False)

    @property
    def _folder(self) -> Path:
        return self.place.scratch / "tensors"

    def _pieces(self, infos: Sequence[TensorInfo], step: Callable[[int, int], None]) -> list[TensorInfo]:
        """Tensors that have the type already are taken from the source's file."""
        self._folder.mkdir(exist_ok=True)
        wanted, found = NAMES[self.recipe.dtype or "bf16"], []
        for number, info in enumerate(infos, 1):
            tensor = read_tensors({info.name: info}, finite=True)[info.name]
            if info.dtype == wanted:
                found.append(info)
            else:
                file = self._folder / f"{number}.safetensors"
                write_file(file, {info.name: cast(tensor, DTYPES[wanted], info.name)})
                found += read_header(file)
            step(number, len(infos))
        return found
