"""Every notebook: in sync with flow2lab/, clean, runnable.

Library notebooks and labs are run by nbdev-test, one test each, so that pytest's last line counts notebooks and tests together.
Studies, benchmarks and the run template take minutes and are run by the sweep, `make lab` and `make bench`; here they are read:
they parse, what they import from flow2lab exists, and papermill finds their parameters.
"""
import ast, json, re, shutil
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from flow2lab.core import project_root

ROOT = project_root()
ALL = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')
             if '.ipynb_checkpoints' not in p.parts)
PARAMETERIZED = [p for p in ALL if p.startswith(('nbs/studies/', 'nbs/benchmarks/')) or p=='nbs/run.ipynb']
EXECUTED = [p for p in ALL if p not in PARAMETERIZED]

def cells(path, kind='code'):
    return [c for c in json.loads((ROOT/path).read_text(encoding='utf-8'))['cells'] if c['cell_type']==kind]
def source(cell): return ''.join(cell['source'])

@pytest.fixture
def copy(tmp_path):
    "The project's notebooks and modules in a folder of their own, for commands that write"
    for f in ('pyproject.toml', 'settings.ini'): shutil.copy(ROOT/f, tmp_path)
    for d in ('nbs', 'flow2lab'):
        shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    return tmp_path

def files(d, ext):
    return {str(p.relative_to(d)): p.read_bytes() for p in sorted(d.rglob('*'+ext)) if '__pycache__' not in p.parts}

def test_modules_in_sync(copy, run):
    "flow2lab/ is what nbdev-export makes of the notebooks: same files, same bytes"
    have = files(copy/'flow2lab', '.py')
    for f in (copy/'flow2lab').glob('*.py'):
        if f.name!='__init__.py': f.unlink()
    r = run('nbdev-export', cwd=copy)
    assert r.returncode==0, r.stderr
    made = files(copy/'flow2lab', '.py')
    assert len(made) > 3
    assert sorted(made)==sorted(have), 'modules without a notebook, or not exported: make clean-notebooks'
    assert [f for f in made if made[f]!=have[f]]==[], \
        'differ from their notebooks: edit the notebook, then make clean-notebooks'

def test_notebooks_clean(copy, run):
    "nbdev-clean has nothing to do"
    have = files(copy/'nbs', '.ipynb')
    r = run('nbdev-clean', cwd=copy)
    assert r.returncode==0 and 'Failed' not in r.stderr, r.stderr
    made = files(copy/'nbs', '.ipynb')
    assert [f for f in have if made[f]!=have[f]]==[], 'not clean: make clean-notebooks'

def test_no_path_of_one_machine():
    "Neither code nor outputs name a folder that exists on one machine only"
    place = re.compile(r'(?<![\w.])/(home|Users|root|work|tmp|private|var/folders)/[A-Za-z]')
    bad = [f'{p}: {m.group()}' for p in ALL if (m := place.search((ROOT/p).read_text(encoding='utf-8')))]
    assert bad==[]

@pytest.mark.parametrize('path', EXECUTED)
def test_run(path, run):
    r = run('nbdev-test', ROOT/path, '--n-workers', '0')
    assert r.returncode==0 and 'Success.' in r.stdout, r.stdout[-2000:] + r.stderr[-6000:]

@pytest.mark.parametrize('path', PARAMETERIZED)
def test_read(path):
    tree = ast.parse('\n'.join(TransformerManager().transform_cell(source(c)) for c in cells(path)))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0]=='flow2lab':
            exec(ast.unparse(node), {})

@pytest.mark.parametrize('path', [p for p in PARAMETERIZED if 'benchmarks' not in p])
def test_parameters(path):
    "One cell tagged `parameters`, before all use, in which papermill understands every line"
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node
    tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged)==1, 'needs exactly one cell with the tag `parameters`'
    names = [n.targets[0].id for n in ast.parse(source(tagged[0])).body]
    assert names and names==[p.name for p in _infer_parameters(load_notebook_node(str(ROOT/path)))]
