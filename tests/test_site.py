"README.md and the site are made from the notebooks as they are now"
import re
from flow2lab.site import build_site, readme

def test_readme_in_sync(root):
    assert (root/'README.md').read_text(encoding='utf-8')==readme(write=False), 'README.md is stale: make readme'

def test_site_builds(root, tmp_path):
    "Every page renders without a warning: no dead link, no formula that cannot be read, nothing from another server"
    out = build_site(tmp_path/'site')
    pages = {str(p.relative_to(out)): p.read_text(encoding='utf-8') for p in out.rglob('*.html')}
    for nb in (root/'nbs').rglob('[0-9]*.ipynb'):
        if '.ipynb_checkpoints' not in nb.parts: assert str(nb.relative_to(root).with_suffix('.html')) in pages
    remote = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="(?:https?:)?//|<link[^>]*\bhref="(?:https?:)?//')
    assert [p for p,h in pages.items() if remote.search(h)]==[]
