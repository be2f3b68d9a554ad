"""Sphinx's configuration. `docs/make.py` gathers the pages and starts Sphinx; run that."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = 'fdsl_nb'
author = 'fdsl_nb contributors'
project_copyright = author
html_title = 'fdsl_nb'
smartquotes_action = 'D'  # dashes only: a quotation mark may be one of Python's

extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'house']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
nb_execution_mode = 'off'  # notebooks come with their outputs
nb_merge_streams = True

highlight_language = 'none'  # unless a block says otherwise
default_role = 'py:obj'  # `name` in a docstring is a link where the name is ours
autodoc_typehints = 'signature'
autodoc_preserve_defaults = True
autodoc_default_options = {
    'members': True,
    'undoc-members': True,
    'member-order': 'bysource',
    'no-value': True,
}
add_module_names = False
toc_object_entries_show_parents = 'hide'

html_theme = 'sphinx_book_theme'
html_theme_options = dict(
    home_page_in_toc=True,
    show_navbar_depth=1,
    show_toc_level=1,
    use_download_button=False,
    use_fullscreen_button=False,
    use_source_button=False,
    navbar_persistent=[],
    pygments_light_style='tango',
    pygments_dark_style='monokai',
)
html_static_path = ['_build/source/_static']  # ours, and what npm brought
html_css_files = ['house.css']
html_copy_source = False
html_show_sphinx = False
html_last_updated_fmt = None
mathjax_path = 'mathjax/tex-svg.js'
mathjax_config_path = '_static/mathjax.js'
html_context = dict(default_mode='auto')
