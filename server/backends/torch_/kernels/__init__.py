"""Kernels of the torch backend: packed linear layers, paged attention, what lies between. docs/kernels.md.

`packed` and `linear` (4 and 8 bits, codebooks, LLM.int8), `w8a8`, `attention`, `activations`.
"""
