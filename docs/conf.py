"""How Sphinx builds these pages: from this checkout alone, without a network, and strictly."""

import re

import mpisign

project = "mpisign"
version = release = mpisign.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md"]  # for those who look at the folder
myst_heading_anchors = 3

# A name that no page documents is a warning, and `-W` makes it an error. Other projects' names are written in full in
# our signatures; their documentation is not ours to look up, so they stay plain text.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(torch|collections\.abc|npt|os|pathlib|MPI)\..*"),
    ("py:class", r"mpisign\..*\.(HasState|Stateful)"),  # whatever has state_dict() and load_state_dict()
    ("py:class", r"(mpisign\..*\.)?T"),  # whatever it is
]

autodoc_mock_imports = ["accelerate", "lightning", "torchmetrics", "transformers"]  # none is needed to read these pages
autodoc_inherit_docstrings = False  # a memory's own page need not repeat what all memories do
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
maximum_signature_line_length = 100  # else a parameter a line
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"mpisign {version}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = html_show_copyright = html_show_sourcelink = False


LINK_OUT = re.compile(r"(?<!!)(\[[^][]*\])\(\.\./")  # but not a picture's


def setup(app):
    """Let links to files outside this folder be plain ones, which also work where the sources are looked at."""
    app.connect("source-read", lambda app, page, source: source.insert(0, LINK_OUT.sub(r"\1(path:../", source.pop())))
