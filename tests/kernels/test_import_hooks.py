"""Registration with transformers and peft, in whatever order they and this package are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["aqlm_native"].__name__ == "NativeConfig"
assert AUTO_QUANTIZER_MAPPING["aqlm_native"].__name__ == "NativeQuantizer"
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import aqlm_kernels; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import aqlm_kernels",
        "import aqlm_kernels, importlib.util; importlib.util.find_spec('transformers.quantizers.auto')",
    ],
)
def test_the_quantizer_is_registered_in_either_order(imports: str) -> None:
    run(imports + CHECK)


def test_the_package_alone_imports_neither_transformers_nor_peft() -> None:
    run("import sys, aqlm_kernels; assert not {'transformers', 'peft'} & sys.modules.keys()")


def test_a_library_that_fails_to_import_fails_as_it_does_alone(tmp_path: object) -> None:
    code = f"""
import sys
from pathlib import Path
from aqlm_kernels.import_hooks import import_after
sys.path.insert(0, {str(tmp_path)!r})
Path({str(tmp_path)!r}, "broken.py").write_text("raise ValueError('as it does alone')")
Path({str(tmp_path)!r}, "after.py").write_text("print('after')")
import_after("broken", "after")
import_after("missing", "after")
for name in "broken", "missing":
    try:
        __import__(name)
    except (ValueError, ImportError) as error:
        print(error)
Path({str(tmp_path)!r}, "broken.py").write_text("print('fixed')")
sys.path_importer_cache.clear()
import broken
"""
    assert run(code).split("\n") == ["as it does alone", "No module named 'missing'", "fixed", "after", ""]
