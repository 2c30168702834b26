"""Kernels of the torch backend: packed linear layers, paged attention and what lies between them. docs/kernels.md.

`packed` and `linear` (4 and 8 bits, codebooks, LLM.int8), `w8a8`, `attention`, `activations`.
"""
