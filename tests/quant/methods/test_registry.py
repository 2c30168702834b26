import subprocess
import sys

import pytest

from quant.errors import BadRecipe
from quant.methods.registry import METHODS, load_method


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_where_the_table_says_and_knows_its_name(name: str) -> None:
    assert load_method(name).name == name


def test_an_unknown_method_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BadRecipe, match=r"method 'gptqq' is not known \(known: .*gptq.*rtn"):
        load_method("gptqq")


def test_listing_methods_imports_no_torch() -> None:
    code = "import sys, quant.methods.registry as it; it.method_names(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
