"""Configuration of the documentation site. Build it as CONTRIBUTING.md says."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import loft_jax

project = "loft_jax"
author = "the loft_jax authors"
copyright = f"2026, {author}"
release = version = loft_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # a copy of MathJax: the site makes no request to other hosts
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
    "public_names",  # in _ext
    "repository_files",  # in _ext
    "short_types",  # in _ext
    "functions_in_tables",  # in _ext
]
exclude_patterns = ["_build", "_ext", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
# Everything that does not resolve is a warning, and the build turns warnings into errors.
nitpicky = False
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autoclass_content = "class"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # "b1, b2, eps: ..." stays one entry
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Source"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]

# A notebook is a Markdown page with code cells. All of them run when the site is built.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "notebooks")
nb_execution_timeout = 900  # for a cell, on a busy machine
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

html_theme = "furo"
html_title = "loft_jax"
html_static_path = ["_static"]
html_css_files = ["loft.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_dark_style = "a11y-high-contrast-dark"  # the default underlines modules like links
