"""The site: ``sphinx-build -W -n notebooks build/site``, from the root of the repository.

Nothing is fetched and no notebook is run: notebooks are committed with their outputs.
``-t online`` links names of other projects into their documentation.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the package, without an installation too

import dspark_jax  # noqa: E402

project = "dspark-jax"
author = "The dspark-jax authors"
version = release = dspark_jax.__version__
html_title = "dspark-jax"
html_theme = "sphinx_book_theme"
html_theme_options = {"use_download_button": False, "show_toc_level": 2}
html_copy_source = False

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "tables",
]
exclude_patterns = ["**.ipynb_checkpoints", "results"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types, with shapes and units
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
nitpick_ignore = [
    ("py:exc", "queue.Full"),  # Python's, whose inventory is not here
    ("py:exc", "SaveError"),  # of dspark_jax.checkpoint, which is no public name
]

# An inventory is a file on the network: without the tag there is none to wait for.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpy": ("https://numpy.org/doc/stable", None),
    }
    if tags.has("online")  # noqa: F821 - Sphinx defines it
    else {}
)
