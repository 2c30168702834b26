"""Measurements made by hand, for tests of what follows from them."""

from typing import Any

from quant.measure.measurement import Divergence, Figure, Health, Histogram, Measurement, Reference, Speed


def measurement(kl: float = 0.01, *, error: float = 0.001, p99: float = 0.1, **changes: Any) -> Measurement:
    small = Figure(kl, error)
    plain: dict[str, Any] = {
        "key": "0" * 32,
        "files": "f" * 64,
        "variant": "q4_k_m",
        "bits": 4,
        "bits_per_weight": 4.8,
        "bytes": 1000,
        "reference": Reference(
            source="1" * 64,
            engine="gguf f32",
            text="2" * 64,
            kind="self",
            about="answers",
            texts=8,
            tokens=800,
            kept=512,
        ),
        "backend": "llama",
        "context": 1024,
        "complete": True,
        "kl": Divergence(
            mean=small,
            median=small,
            p90=small,
            p99=Figure(p99, error),
            p999=small,
            max=1.0,
            tail=Figure(0.0, 0.0),
            rest=0.01,
            histogram=Histogram(edges=(-3.0, -2.0, -1.0), counts=(3, 5)),
        ),
        "top1": Figure(0.9, 0.01),
        "top5": Figure(0.95, 0.01),
        "ln_ppl": Figure(2.0, 0.1),
        "ln_ppl_change": Figure(0.01, 0.001),
        "ppl_ratio": Figure(1.01, 0.001),
        "texts": ((kl, 100),),
        "health": Health(loops=0.0, source_loops=0.0),
        "speed": Speed(load_s=1.0, memory_bytes=10, prefill_1=1.0, decode_1=1.0, prefill_8=1.0, decode_8=1.0),
    }
    return Measurement(**(plain | changes))
