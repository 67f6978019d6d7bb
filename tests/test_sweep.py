"Sweeps in real processes: killed, interrupted, raced, nested, and through papermill's own command line"
import json, os, random, signal, subprocess, sys, textwrap, time
from pathlib import Path
import psutil, pytest
from flow2lab.values import UserError
from flow2lab.parameters import check_template, write_notebook
from flow2lab.execute import execute
from flow2lab.attempt import PARAMETERS, ToySpec
from flow2lab.sweep import sweep

SWEEPER = '''
import json, sys
from flow2lab.attempt import ToySpec
from flow2lab.sweep import sweep
if __name__=='__main__':
    seeds, kw = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    rs = sweep([ToySpec(seed=i) for i in seeds], 'demo', template='tiny.ipynb', **kw)
    print(json.dumps([(r.spec.seed, r.status, r.message) for r in rs]))
'''
BEGIN = '''
import json, os, time
from flow2lab.files import atomic_dir, project_path
spec = json.loads(spec_json)
seed = spec['seed']
def note(name):
    with open(project_path(name), 'a') as f: f.write(f'{seed} ')
note('began')
print('seed', seed, flush=True)
'''
RECORD = '''
with atomic_dir(folder) as d:
    name, _, id = os.path.basename(folder).rpartition('--')
    (d/'spec.json').write_text(json.dumps(dict(spec, id=id, name=name)))
    (d/'metrics.json').write_text(json.dumps(dict(id=id, name=name, status='ok', metrics={}, message='')))
note('done')
'''

class Lab:
    "A project of its own, with notebooks, and sweeps in other processes"
    def __init__(self, root):
        self.root, self.procs = root, []
        (root/'sweeper.py').write_text(SWEEPER)
        self.env = {k: v for k,v in os.environ.items() if not k.startswith('FLOW2LAB')}
        self.env.update(FLOW2LAB_ROOT=str(root), OMP_NUM_THREADS='1', PYTHONPATH=str(Path(__file__).parent.parent))
    def notebook(self, name, *cells, params=PARAMETERS):
        "A notebook whose first cell declares `params`"
        return write_notebook(name, params, *(textwrap.dedent(c) for c in cells))
    def template(self, middle='time.sleep(0.1)'):
        "The template of the sweeps: it notes that it began, does `middle`, writes a record and notes that it is done"
        return self.notebook('tiny.ipynb', BEGIN, middle, RECORD)
    def start(self, seeds, **kw):
        "A sweep in a process of its own"
        # a test run in the background ignores ctrl-C
        p = subprocess.Popen([sys.executable, 'sweeper.py', json.dumps(list(seeds)), json.dumps(kw)],
                             cwd=self.root, env=self.env, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        self.procs.append(p)
        return p
    def run(self, seeds, **kw):
        "[seed, status, message] of each run of a sweep in a process of its own"
        out, err = self.start(seeds, **kw).communicate(timeout=240)
        assert out, err
        return json.loads(out)
    def here(self, seeds, **kw):
        "A sweep in this process"
        return sweep([ToySpec(seed=i) for i in seeds], 'demo', template='tiny.ipynb', **kw)
    def noted(self, name):
        "Seeds that a file has noted"
        return sorted(map(int, (self.root/name).read_text().split())) if (self.root/name).exists() else []
    def wait_for(self, name, n=1, seconds=120):
        "Wait until a file has noted `n` seeds"
        end = time.time()+seconds
        while len(self.noted(name))<n:
            assert time.time()<end, f'only {self.noted(name)} in {name}'
            time.sleep(0.01)
    def records(self):
        "Seeds that have a record"
        return sorted(int(f.parent.name.split('-')[1]) for f in self.root.glob('data/results/demo/*--*/metrics.json'))
    def left(self):
        "What workspaces and temporary folders are left"
        demo = self.root/'data/results/demo'
        return sorted(p.name for p in demo.glob('.sweep/*')) + sorted(p.name for p in demo.glob('.*.tmp'))
    def strays(self):
        "Processes that still work for this lab"
        out = []
        for p in psutil.process_iter():
            try: out += [p] if p.pid!=os.getpid() and p.environ().get('FLOW2LAB_ROOT')==str(self.root) else []
            except (psutil.Error, OSError): pass
        return out

@pytest.fixture
def lab(tmp_path, monkeypatch):
    lab = Lab(tmp_path.resolve())
    monkeypatch.setenv('FLOW2LAB_ROOT', str(lab.root))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    yield lab
    for p in lab.procs:
        if p.poll() is None: p.kill()
        p.communicate()

def gone(lab, seconds=30):
    "Wait until nothing works for the lab any more"
    end = time.time()+seconds
    while (s := lab.strays()):
        assert time.time()<end, s
        time.sleep(0.05)
    return True

def test_killed_sweeps_resume(lab):
    "kill -9 at random moments: afterwards every run is recorded, none was finished twice, nobody is left working"
    lab.template('time.sleep(0.05)')
    random.seed(0)
    for k in range(1, 4):
        p = lab.start(range(8), jobs=2)
        lab.wait_for('done', 2*k-1)
        time.sleep(random.random()*0.15)
        p.kill()
        p.wait()
        assert gone(lab)
    rs = lab.run(range(8), jobs=2)
    assert [r[1] for r in rs] == ['ok']*8
    done = lab.noted('done')
    assert lab.records() == list(range(8)) and len(done)==len(set(done)), done
    assert lab.left() == []
    for f in lab.root.glob('data/results/demo/*--*'): assert {'metrics.json', 'spec.json'} <= set(os.listdir(f))

def test_killed_worker_is_repeated(lab):
    "kill -9 of a run's process: it is tried again, and the others notice nothing"
    lab.template('''
        if seed==1 and len(open(project_path('began')).read().split('1 '))<=2:
            open(project_path('pid'), 'w').write(str(os.getpid()))
            time.sleep(90)''')
    p = lab.start([0, 1, 2], jobs=2)
    while not (lab.root/'pid').exists() or not (lab.root/'pid').read_text():
        time.sleep(0.01)
        assert p.poll() is None
    os.kill(int((lab.root/'pid').read_text()), signal.SIGKILL)
    out, err = p.communicate(timeout=240)
    assert [r[1] for r in json.loads(out)] == ['ok']*3, out
    assert lab.noted('began') == [0, 1, 1, 2] and lab.noted('done') == [0, 1, 2]

def test_killed_warm_process_is_replaced(lab):
    "kill -9 of the warm process: its run is tried again by another one"
    lab.template("time.sleep(90 if seed==0 and open(project_path('began')).read().split().count('0')==1 else 0)")
    p = lab.start([0, 1])
    lab.wait_for('began')
    (server,) = [c for c in psutil.Process(p.pid).children() if 'import serve' in ' '.join(c.cmdline())]
    server.kill()
    out, err = p.communicate(timeout=240)
    assert [r[1] for r in json.loads(out)] == ['ok']*2, out
    assert lab.noted('began') == [0, 0, 1] and gone(lab)

def test_interrupt_says_how_to_resume(lab):
    "Ctrl-C: the sweep says what is recorded, and nothing goes on"
    lab.template('time.sleep(0 if seed==0 else 90)')
    p = lab.start([0, 1])
    lab.wait_for('began', 2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode!=0 and 'Recorded in demo: 1 of 2' in err, err
    assert gone(lab) and lab.records() == [0] and lab.left() == []

def test_two_sweeps_share_the_work(lab):
    "Two sweeps of the same study at the same time: each run once, both report all"
    lab.template('time.sleep(0.15)')
    ps = [lab.start(seeds, jobs=2) for seeds in (range(6), reversed(range(6)))]
    for p in ps: assert sorted(r[0] for r in json.loads(p.communicate(timeout=240)[0]) if r[1]=='ok') == list(range(6))
    assert lab.noted('began') == list(range(6)) and lab.left() == []

def test_failing_cell_and_timeout(lab, capsys):
    "A failing run is tried again and recorded as failed, with its executed notebook; " \
    "a hanging one is killed once; the sweep goes on"
    lab.template('if seed==1: print("x"); {}["no such key"]\nif seed==2: time.sleep(90)')
    (hung,), (ok, bad) = lab.here([2], timeout=2, progress=False), lab.here([0, 1], jobs=2)
    assert (ok.status, bad.status, hung.status) == ('ok', 'failed', 'failed')
    assert 'no such key' in bad.message and 'longer than 2 s' in hung.message and '1 failed' in capsys.readouterr().err
    # the hung one may not have come that far
    assert [i for i in lab.noted('began') if i<2] == [0, 1, 1]
    assert json.loads((bad.folder/'metrics.json').read_text())['status']=='failed'
    nb = (bad.folder/'notebook.ipynb').read_text()
    assert 'KeyError' in nb and 'seed 1' in nb and str(lab.root) not in nb
    lab.here([0, 1], retry=0)
    assert [i for i in lab.noted('began') if i<2] == [0, 1, 1, 1]                 # only what failed

def test_memory_error_is_a_result(lab):
    "A run that was out of memory is not tried again"
    lab.template('if seed==1: raise MemoryError("too large")')
    for _ in range(2): assert [r.status for r in lab.here([0, 1])] == ['ok', 'oom']
    assert lab.noted('began') == [0, 1]

def test_failure_replaces_no_result(lab):
    "A forced run that fails leaves the record that was there"
    lab.template('if (project_path("break")).exists(): 1/0')
    (r,) = lab.here([0])
    before = (r.folder/'notebook.ipynb').read_bytes()
    (lab.root/'break').touch()
    assert lab.here([0], force=True, retry=0)[0].status=='failed'
    assert (r.folder/'notebook.ipynb').read_bytes()==before
    assert lab.here([0])[0].status=='ok' and lab.left()==[]

STUDY = '''
import os
from flow2lab.attempt import ToySpec
from flow2lab.sweep import sweep
rs = sweep([ToySpec(seed=i) for i in range(3)], 'demo', template='tiny.ipynb', jobs=2)
print(rs, 'parent', os.getppid())'''

def test_study_that_sweeps(lab, capsys):
    "A study notebook, executed in a fork of the warm process, sweeps from inside; " \
    "the runs come from the same warm process"
    lab.template('print("parent", os.getppid())')
    lab.notebook('study.ipynb', STUDY, params="n = 1")
    execute('study.ipynb', 'out/study.ipynb', show=True)
    assert lab.records() == [0, 1, 2] and '3 runs, 0 were there, 3 done now' in capsys.readouterr().err
    text = (lab.root/'out/study.ipynb').read_text()
    (parent,) = {json.loads(f.read_text())['cells'][3]['outputs'][0]['text'][0]
                 for f in lab.root.glob('data/results/demo/*/notebook.ipynb')}
    assert 'tiny-2: ok' in text and parent.strip() in text and str(lab.root) not in text

def test_killed_study_leaves_nobody(lab):
    "kill -9 of the process that executes a study ends the study and its runs"
    lab.template('time.sleep(90)')
    lab.notebook('study.ipynb', STUDY, params="n = 1")
    code = "from flow2lab.execute import execute; execute('study.ipynb', 'out/study.ipynb')"
    p = subprocess.Popen([sys.executable, '-c', code], cwd=lab.root, env=lab.env)
    lab.procs.append(p)
    lab.wait_for('began', 2)
    p.kill()
    p.wait()
    assert gone(lab) and lab.records() == []

def test_fresh_processes_where_forks_are_unsafe(lab):
    "FLOW2LAB_FORK=0, and macOS: every run in a fresh interpreter, same results"
    lab.template('print("ok")')
    lab.env['FLOW2LAB_FORK'] = '0'
    assert [r[1] for r in lab.run([0, 1], jobs=2)] == ['ok', 'ok'] and gone(lab)

def test_torch_works_in_every_fork(lab, monkeypatch):
    "The warm process has imported torch and never computed: several runs with two threads each finish, " \
    "with equal numbers"
    lab.notebook('tiny.ipynb', BEGIN, '''
        import torch, numpy as np
        x = torch.randn(300, 300); y = torch.linalg.solve(x, x@x)
        z = np.ones((200, 200))@np.ones((200, 200))
        print(torch.get_num_threads(), float((y-x).abs().max())<1e-1, float(x.sum()), np.isfinite(z).all())''', RECORD)
    monkeypatch.setattr('flow2lab.sweep.cores', lambda: 4)
    rs = sweep([ToySpec(seed=3, eval=dict(x=i)) for i in range(3)], 'demo', jobs=2, template='tiny.ipynb', timeout=40)
    assert [r.status for r in rs] == ['ok']*3, rs
    (out,) = {''.join(json.loads((r.folder/'notebook.ipynb').read_text())['cells'][3]['outputs'][0]['text'])
              for r in rs}
    assert out.startswith('2 True') and 'True' in out[6:]

def test_papermill(lab):
    "Stock papermill with our engine, from its command line; a parameter name that is code is refused before it runs"
    lab.notebook('hi.ipynb', 'print("n is", n); n+1', params='n = 1  # A number')
    pm = [sys.executable, '-m', 'papermill', '--engine', 'flow2lab', '--no-progress-bar', 'hi.ipynb', 'out.ipynb',
          '-p', 'n', '3']
    r = subprocess.run(pm, cwd=lab.root, env=lab.env, capture_output=True, text=True, timeout=240)
    assert r.returncode==0 and 'n is 3' in (lab.root/'out.ipynb').read_text(), r.stderr
    import papermill
    for name, says in (('n=1;open("owned", "w")#', 'would be run as code'), ('m', 'unknown parameter "m"')):
        with pytest.raises(UserError, match=says):
            papermill.execute_notebook(str(lab.root/'hi.ipynb'), str(lab.root/'no.ipynb'), {name: 3},
                                       engine_name='flow2lab', progress_bar=False, cwd=str(lab.root))
    assert not (lab.root/'owned').exists()

@pytest.mark.parametrize('source, message', [
    ('spec_json = ""\nstudy = ""',               'unknown parameter "folder"'),
    ('spec_json, study = "", ""\nfolder = ""',   'line 1'),
    ('spec_json = study = ""\nfolder = ""',      'line 1'),
    ('spec_json = ""; study = ""\nfolder = ""',  'line 1'),
    ('import os\nfolder = ""',                   'line 1'),
    ('spec_json = ',                             'invalid syntax'),
    (None,                                       'no cells are tagged')])
def test_templates_refused(lab, source, message):
    "What papermill would overlook or misunderstand"
    lab.notebook('t.ipynb', 'pass', params=source or 'x = 1')
    nb = lab.root/'t.ipynb'
    if source is None: nb.write_text(nb.read_text().replace('"parameters"', ''))
    with pytest.raises(UserError, match=message): check_template('t.ipynb', ('spec_json', 'study', 'folder'))

def test_outputs_stay_in_the_project(lab, tmp_path_factory):
    "No output through .., a link or an absolute path that leads elsewhere"
    outside = tmp_path_factory.mktemp('outside')
    (lab.root/'link').symlink_to(outside)
    lab.notebook('hi.ipynb', '1', params='n = 1')
    lab.template()
    for out in ('link/x.ipynb', '../x.ipynb', str(outside/'x.ipynb')):
        with pytest.raises(UserError, match='leads out of the project'): execute('hi.ipynb', out)
    for study in ('../../link', 'x/../../../nbs', ''):
        with pytest.raises(UserError): sweep([], study, template='tiny.ipynb')
    assert not list(outside.iterdir())

def test_interrupt_during_the_warm_up(lab):
    "Ctrl-C while the warm process still imports: answered at once"
    slow = lab.root/'slow_import'
    (slow/'matplotlib').mkdir(parents=True)
    (slow/'matplotlib/__init__.py').write_text('import time; open("importing", "w").close(); time.sleep(90)')
    lab.env['PYTHONPATH'] += os.pathsep + str(slow)
    lab.template('import matplotlib')
    p = lab.start([0])
    while not (lab.root/'importing').exists():
        time.sleep(0.01)
        assert p.poll() is None
    t = time.time()
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert time.time()-t<60 and 'Recorded in demo: 0 of 1' in err and 'KeyboardInterrupt' in err, err
    assert gone(lab)

def test_talkative_run(lab):
    "Fifty thousand lines, and a progress bar of as many steps, cost little and arrive whole"
    lab.notebook('talk.ipynb', 'for i in range(50_000): print(i)',
                 'import sys\nfor i in range(20_000): sys.stderr.write(f"\\r{i}"); sys.stderr.flush()', params='n = 1')
    t = time.time()
    execute('talk.ipynb', 'out.ipynb')
    cells = json.loads((lab.root/'out.ipynb').read_text())['cells']
    assert len(cells[1]['outputs'][0]['text'])==50_000
    assert cells[2]['outputs'][0]['text']==['19999'] and time.time()-t<60
