"""Pages and API reference build without warnings, and no public module or exported function is missing in them."""

import importlib
import os
import re
import subprocess
import sys
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


def public_modules() -> set[str]:
    """Names of all modules of the package but those with a leading underscore (`__main__`)."""
    paths = (ROOT / "iha_jax").rglob("*.py")
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    names = [".".join(part for part in path if part != "__init__") for path in parts]
    return {name for name in names if "._" not in name}


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """Builds the documentation; the names of what it describes, by kind (the lines of Sphinx's `objects.inv`)."""
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("documentation")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", "docs", str(folder)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr
    packed = (folder / "objects.inv").read_bytes().split(b"\n", 4)[4]  # behind four lines of text
    names = defaultdict(set)
    for line in zlib.decompress(packed).decode().splitlines():
        name, kind = re.match(r"(.+?) (\w+:\w+) ", line).groups()
        names[kind].add(name)
    return names


def test_documentation_builds_without_warnings_and_has_every_public_module(documented):
    assert documented["py:module"] == public_modules()


@pytest.mark.parametrize("package", ["iha_jax.ops", "iha_jax.model", "iha_jax.executed"])
def test_what_a_package_exports_is_in_the_reference(package, documented):
    module = importlib.import_module(package)
    exported = [getattr(module, name) for name in module.__all__ if callable(getattr(module, name))]
    assert exported
    assert {f"{thing.__module__}.{thing.__qualname__}" for thing in exported} <= (
        documented["py:function"] | documented["py:class"]
    )
