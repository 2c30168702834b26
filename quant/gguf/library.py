"""llama.cpp's compute backends, where they are libraries of their own.

An image for many machines is built with one library for each generation of processors, and one for CUDA. They
lie beside libllama.so, but llama.cpp looks for them beside the executable, which is Python.
"""

from pathlib import Path
from types import ModuleType


def load_backends(native: ModuleType) -> None:
    """Register the best backends that lie beside libllama.so; nothing to do where they are compiled in.

    `native` is llama_cpp.llama_cpp. Its own handle is used, because loading libggml.so by path can give a
    second copy with a registry of its own.
    """
    if native._lib.ggml_backend_reg_count() == 0:
        folder = Path(str(native.__file__)).parent / "lib"
        native._lib.ggml_backend_load_all_from_path(str(folder).encode())
