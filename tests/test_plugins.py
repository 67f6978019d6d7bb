"One entry of each kind from a notebook outside the package: listed, found, named, part of an id, used by runs"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from flow2lab import axes
from flow2lab.values import UserError
from flow2lab.axes import Axis, reload_plugins
from flow2lab.spec import Spec
from flow2lab.parameters import write_notebook
from flow2lab.attempt import PARAMETERS, ToySpec
from flow2lab.sweep import sweep

SETUP = '''#| export
from flow2lab.axes import arch, backend, kernel, method, objective, quantizer, rule, shape, source, task
from flow2lab.nano import nano_math'''

ENTRIES = '''#| export
@method(title='Mine', count=lambda layers, a, model: 0, checks=[])
def my_method(r:int=4):
    "My method"

@quantizer
def my_quantizer(model, calibration=None, /, head:str='fp32'):
    "My quantizer"

@arch(sizes=dict(small=dict()))
def my_arch(size:str='small', vocab:int=0, context:int=0):
    "My arch"

@task
class my_task(nano_math):
    "My task"
    objective = 'my_objective'

@backend
class my_backend:
    "My backend"

@objective
class my_objective:
    "My objective"

@kernel
def my_kernel():
    "My kernel"
    return None, 'for tests only'

@shape
def my_shape(row):
    "My shape"

@source
def my_source():
    "My source"
    return dict(repo='me/mine')

@rule
def my_rule(doc):
    "My rule"'''

KINDS = 'method quantizer arch task backend objective kernel shape source rule'.split()

@pytest.fixture
def lab(tmp_path, monkeypatch):
    "A project with a plugin"
    root = tmp_path.resolve()
    monkeypatch.setenv('FLOW2LAB_ROOT', str(root))
    (root/'settings.ini').write_text('[flow2lab]\nplugins = mine.ipynb\n')
    write_notebook('mine.ipynb', '1/0    # not exported', SETUP, ENTRIES)
    reload_plugins()
    yield root
    monkeypatch.undo()
    reload_plugins()

@pytest.mark.parametrize('kind', KINDS)
def test_at_home_in_each_axis(lab, kind):
    "Found, listed, described; with the file that defines it"
    axis = Axis.all[kind]
    name = 'my_'+kind
    assert axis[name].__module__=='flow2lab_plugins.mine'
    assert name in list(axis) and f'{name} (mine.ipynb)' in repr(axis)
    assert axis.doc(name)==f'My {kind}' and axis.where(name)==lab/'mine.ipynb'

def test_ids_and_names(lab):
    "A Spec that uses an entry follows its source; another Spec does not know of it"
    mine = Spec(base='my_arch-small', task='my_task', method='my_method', quant='my_quantizer', backend='my_backend',
                eval={'my_task': 5})
    used = ('method', 'quantizer', 'arch', 'task', 'backend', 'objective')
    assert mine.plugins().keys() == {f'{k} my_{k}' for k in used}
    assert '_Mine4_' in mine.name and 'my_task' in mine.name and 'MY_QUANTIZER' in mine.name
    other = Spec(base='none/such', task='nano_math', method='lora')
    before = mine.id, other.id
    write_notebook('mine.ipynb', '', SETUP, ENTRIES + '\n# changed')
    reload_plugins()
    assert mine.but().id!=before[0] and other.but().id==before[1]

def test_command_line_lists_it(lab):
    "`flow2lab list method` in a process of its own"
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
    code = 'from flow2lab.cli import main; main(["list", "method"])'
    r = subprocess.run([sys.executable, '-c', code], env=env, cwd=lab, capture_output=True, text=True, timeout=120)
    assert 'my_method' in r.stdout and 'lora' in r.stdout, r.stderr

@pytest.mark.parametrize('fork', ['1', '0'])
def test_runs_find_it(lab, fork, monkeypatch):
    "Runs are other processes, forked or fresh; both read the plugin from its file"
    monkeypatch.setenv('FLOW2LAB_FORK', fork)
    write_notebook('template.ipynb', PARAMETERS, 'import json, os\nfrom flow2lab.axes import method', '''
os.makedirs(folder)
name, _, id = os.path.basename(folder).rpartition('--')
record = dict(id=id, name=name, seed=0, status='ok', metrics={}, message=str(method['my_method'].title))
for f in ('spec', 'metrics'):
    with open(f'{folder}/{f}.json', 'w') as h: json.dump(record, h)''')
    from flow2lab.warm import warm
    warm().close()                                   # one that knows the setting
    (r,) = sweep([ToySpec(seed=1)], 'plugged', template='template.ipynb', progress=False)
    warm().close()
    assert (r.status, r.message) == ('ok', 'Mine')

def test_broken_plugin_harms_only_who_needs_it(lab):
    "With a broken plugin the package's own entries work; a list or an unknown name says what is wrong, each time"
    (lab/'mine.ipynb').write_text((lab/'mine.ipynb').read_text().replace('import nano_math', 'import nano_meth'))
    reload_plugins()
    assert axes.method['lora'].title and len(Spec(base='none/such', task='nano_math', method='lora').id)==16
    for _ in range(2):
        with pytest.raises(UserError, match='mine.ipynb, cell 2, line 3: ImportError'): list(axes.method)
    with pytest.raises(UserError, match='mine.ipynb, cell 2'): axes.method['lroa']
