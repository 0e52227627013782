"""Pages and API reference: `pip install -e '.[docs]' && sphinx-build -W --keep-going -b html docs docs/_build`."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["SPHINX_APIDOC_OPTIONS"] = "members"  # what has a docstring

project = "iha_jax"
extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "api/modules.rst"]
html_theme = "furo"
myst_heading_anchors = 3  # links to headings, as on GitHub
default_role = "code"  # single backticks
smartquotes = False  # a value in quotes can be copied

# A page a package, written anew into docs/api at every build: no module can be forgotten.
apidoc_modules = [{"path": "../iha_jax", "destination": "api", "module_first": True}]
autodoc_default_options = {"ignore-module-all": True}  # a function stands where it is defined, and there alone
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lm_eval"]  # an extra; its version of the day would decide whether the reference builds
add_module_names = False
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"


def keep_layout(app, what, name, obj, options, lines):
    """Formulas and programs (indented) and tables (Markdown's) of docstrings are shown as they are written."""
    text = "\n".join(lines) + "\n"
    text = re.sub(r"(?<=\n\n)(?=    \S)", "::\n\n", text)
    text = re.sub(r"(?m)(?:^\|.*\n)+", lambda table: "::\n\n" + re.sub(r"(?m)^(?=\|)", "    ", table[0]), text)
    lines[:] = text.splitlines()


def name_arrays(app, what, name, obj, options, signature, returns):
    """`Float[Array, 'B N H d']` as in the source; jax.Array is printed with its module, a private one in some."""
    return tuple(part and re.sub(r"\bjax(?:lib)?\.(?:\w+\.)*Array\b", "Array", part) for part in (signature, returns))


def fill_in_readme(app, docname, source):
    """The page `readme` is the repository's README, its links made relative to this folder."""
    if docname == "readme":
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:)", "](../", text)
        source[0] = text.replace("](../docs/", "](").replace("](../benchmarks/README.md", "](benchmarks.md")


def setup(app):
    app.connect("autodoc-process-docstring", keep_layout, priority=400)  # before napoleon's
    app.connect("autodoc-process-signature", name_arrays)
    app.connect("source-read", fill_in_readme)
