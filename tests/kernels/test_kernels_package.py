"""Our top-level package `kernels` shares its name with Hugging Face's library, which must count as absent."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import kernels

PACKAGE = Path(kernels.__file__).parent
ROOT = PACKAGE.parent
PROBE = """
import diffusers.utils, transformers.utils
assert not transformers.utils.is_kernels_available(), "transformers takes our kernels for Hugging Face's"
assert not diffusers.utils.is_kernels_available(), "diffusers takes our kernels for Hugging Face's"
from diffusers import FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel
import kernels
print(kernels.__file__)
"""


def test_libraries_treat_their_kernels_as_absent():
    """In this process, where BitFlux is installed."""
    import diffusers.utils
    import transformers.utils
    from diffusers import FluxPipeline  # noqa: F401
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

    assert importlib.metadata.version("bitflux")
    assert not transformers.utils.is_kernels_available()
    assert not diffusers.utils.is_kernels_available()


@pytest.mark.slow
def test_libraries_treat_their_kernels_as_absent_where_bitflux_is_only_on_the_path(tmp_path):
    """A job's working directory is the only trace of BitFlux, and no installed metadata names its version."""
    hide = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(ROOT)!r})
real = importlib.metadata.distributions
importlib.metadata.distributions = lambda **kw: (d for d in real(**kw) if d.metadata["Name"] != "bitflux")
"""
    done = subprocess.run(
        [sys.executable, "-c", hide + PROBE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip().splitlines()[-1]) == PACKAGE / "__init__.py"


def test_kernels_import_nothing_of_the_rest():
    rest = {"bitflux_core", "evaluators", "cluster", "jobs"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not rest & {module.split(".")[0] for module in modules}, file
