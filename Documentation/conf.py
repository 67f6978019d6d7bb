"Configuration of the site: flow2lab.site.build_site stages the pages and calls Sphinx with it, see nbs/910_site.ipynb"
import re
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

project, author, copyright = 'flow2lab', 'The flow2lab authors', 'The flow2lab authors'
extensions = ['myst_nb']
root_doc = 'index'
exclude_patterns = []

# Pages show the outputs that the notebooks were committed with; the site runs nothing.
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = 'Source', 'Source'

myst_enable_extensions = ['amsmath', 'attrs_block', 'colon_fence', 'dollarmath', 'html_image']
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ['myst.header']     # a notebook may go from its title straight to the ### of a definition

smartquotes = False                     # a run's name has two hyphens in it

html_theme = 'pydata_sphinx_theme'
html_title = 'flow2lab'
html_static_path = ['_static']
html_css_files = ['flow2lab.css']
html_sidebars = {p: [] for p in ('index', 'axes', 'search')}
html_use_index = False
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = dict(
    navbar_end=['theme-switcher'], footer_start=['copyright'], footer_center=[], footer_end=[],
    header_links_before_dropdown=7, navigation_depth=2, show_toc_level=2, show_prev_next=True,
    use_edit_page_button=False,
    pygments_light_style='a11y-light', pygments_dark_style='a11y-dark')

log = logging.getLogger('flow2lab')

def _mathml(self, node, block):
    "Browsers draw MathML themselves: formulas need no script and no network"
    out = convert(node.astext().replace('{aligned}', '{align*}'), display='block' if block else 'inline')
    if re.search(r'<mi>(\\|&<)', out): log.warning('formula not understood: %s', node.astext(), location=node)
    self.body.append(out)
    raise nodes.SkipNode

def setup(app):
    app.add_html_math_renderer('mathml', (lambda self, node: _mathml(self, node, False), None),
                               (lambda self, node: _mathml(self, node, True), None))
    return dict(parallel_read_safe=True)

html_math_renderer = 'mathml'
