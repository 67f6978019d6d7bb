"Records as processes meet them: many writers, kills, full disks, and result files that others made"
import json, os, random, shutil, signal, subprocess, sys, time, warnings
import pytest
from flow2lab.values import UserError
from flow2lab.files import project_root
from flow2lab.records import load_items, load_records, read_run, run_folders, summary
from flow2lab.foreign import load_any
from flow2lab.intervals import wilson
from flow2lab.compare import compare

WRITER = '''
import sys
from pathlib import Path
from flow2lab.files import hash_of
from flow2lab.spec import Spec
from flow2lab.records import metric, save
class Toy(Spec):
    "A Spec whose id and name need no axis"
    id = property(lambda s: hash_of(s.to_dict()))
    name = property(lambda s: f'toy-lora{s.method_args["r"]}')
root, first, last, n = Path(sys.argv[1]), *map(int, sys.argv[2:5])
for i in range(first, last):
    s = Toy(task='toy', method='lora', method_args=dict(r=i//3), seed=i%3)
    right = [float((i*j)%7<4) for j in range(n)]
    items = [dict(task='toy', item=f'q{j}', prediction='x'*50+str(j*i), score=r, metrics=dict(accuracy=r))
             for j,r in enumerate(right)]
    save(s, {'toy/accuracy': metric(sum(right)/n, 'fraction', 'max', n=n)}, items, steps=[dict(step=1, loss=1.)],
         folder=root/f'{s.name}--{s.id}', env={})
    print(i, flush=True)
'''

def writer(root, first, last, n=20, **kw):
    return subprocess.Popen([sys.executable, '-c', WRITER, str(root), str(first), str(last), str(n)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def quiet_load(root):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return load_records(root)

def test_concurrent_writers_keep_everything(tmp_path):
    "Four processes, overlapping work: every run is there once and whole, and nothing else"
    ps = [writer(tmp_path, a, a+30) for a in (0, 15, 30, 0)]
    for p in ps:
        out, err = p.communicate(timeout=120)
        assert p.returncode==0, err
    df = quiet_load(tmp_path)
    assert len(df)==60 and df['id'].is_unique and (df['status']=='ok').all()
    assert len(load_items(df))==60*20
    assert not [f for f in os.listdir(tmp_path) if f.startswith('.')]
    assert compare(df).paired

def test_kill_during_save_leaves_nothing_half(tmp_path):
    "Killed at six moments: what has a run's name is whole, and the next writer finishes the work"
    rnd, killed = random.Random(0), 0
    for k in range(6):
        p = writer(tmp_path, 0, 24, n=3000)
        p.stdout.readline()
        time.sleep(rnd.random()*.15)
        p.send_signal(signal.SIGKILL)
        killed += p.wait()==-signal.SIGKILL
        p.communicate()
        for f in run_folders(tmp_path):
            read_run(f)
            assert set(os.listdir(f))=={'spec.json','metrics.json','items.parquet','steps.jsonl','env.json'}
        df = quiet_load(tmp_path)
        assert len(load_items(df, ['score']))==3000*len(df)
    assert killed>=3
    p = writer(tmp_path, 0, 24, n=3000)
    assert p.communicate(timeout=120) and p.returncode==0
    assert len(quiet_load(tmp_path))==24

def test_full_disk_leaves_nothing(tmp_path):
    "A file that cannot grow: UserError, and no folder"
    script = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n' + WRITER
    p = subprocess.run([sys.executable, '-c', script, str(tmp_path), '0', '1', '5000'], capture_output=True, text=True)
    assert p.returncode==1 and 'UserError' in p.stderr and 'Nothing was changed' in p.stderr
    assert os.listdir(tmp_path)==[]

def test_summary_is_the_same_bytes(tmp_path):
    "Other order on disk, other hash seed, another process"
    writer(tmp_path/'a', 0, 12).communicate()
    fs = list((tmp_path/'a').iterdir())
    random.Random(1).shuffle(fs)
    for f in fs: shutil.copytree(f, tmp_path/'b'/f.name)
    want = summary(tmp_path/'a').read_bytes()
    for seed in '0', '1':
        subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.records import summary; summary(sys.argv[1])',
                        str(tmp_path/'b')], env=dict(os.environ, PYTHONHASHSEED=seed), check=True)
        assert (tmp_path/'b'/'metrics_summary.csv').read_bytes()==want

@pytest.fixture(scope='module')
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp('three')
    writer(root, 0, 3).communicate()
    return root

@pytest.mark.parametrize('name,text,says', [
    ('metrics.json', '{"id": "x', 'cannot be read'), ('metrics.json', '[]', 'no JSON object'),
    ('metrics.json', '{"id": "x"}', 'no field "name"'),
    ('spec.json', '', 'cannot be read'), ('spec.json', None, 'is missing'),
    ('metrics.json', b'\xff\xfe', 'cannot be read')])
def test_broken_folders_are_named_and_skipped(three, tmp_path, name, text, says):
    root = tmp_path/'study'
    shutil.copytree(three, root)
    f = sorted(root.iterdir())[0]/name
    if text is None: f.unlink()
    else: f.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match=says) as w: df = load_records(root)
    assert len(df)==2 and any(f.parent.name in str(x.message) for x in w)

def real(name):
    p = project_root()/'..'/'shared'/'data'/name
    if not p.exists(): pytest.skip(f'no real files "{name}" beside the project (../shared/data)')
    return p

def test_peft_files():
    p = real('peft_metamathqa')
    df = load_any(p, 'peft')
    c = compare(df, metric='accuracy')
    want = {}
    for f in p.glob('*.json'):
        d = json.loads(f.read_text())
        want[d['run_info']['experiment_name']] = d['train_info']['metrics'][-1]['test accuracy']
    got = {r['name']: r for r in c.to_dict()['rows']}
    assert {k: r['metric'] for k,r in got.items()}==want and {r['n'] for r in got.values()}=={1319}
    for r in got.values(): assert r['ci95']==pytest.approx([float(x) for x in wilson(r['metric'], 1319)], abs=1e-12)
    top = max(want, key=want.get)
    assert top in c.tied_for_first and all(got[k]['rank_low']==1 for k in c.tied_for_first)
    for r in got.values():
        better, as_good = (sum(f(v) for v in want.values()) for f in (r['metric'].__lt__, r['metric'].__le__))
        assert r['rank_low'] <= 1+better and r['rank_high'] >= as_good
    cost = {r['name']: (r['train/peak_memory'], r['train/seconds']) for r in df.to_dict('records')}
    def dominates(j, k):
        "As good in everything, and not the same"
        as_good = want[j]>=want[k] and cost[j][0]<=cost[k][0] and cost[j][1]<=cost[k][1]
        return as_good and (want[j], *cost[j])!=(want[k], *cost[k])
    def dominated(k): return any(dominates(j, k) for j in want)
    assert {k for k,r in got.items() if r['pareto']}=={k for k in want if not dominated(k)}
    wide = compare(load_any(p, n=200), metric='accuracy')
    assert len(wide.tied_for_first)>len(c.tied_for_first) and any('unpaired' in n for n in wide.notes)

def test_lm_eval_files():
    df = load_any(real('pythia_lm_eval'), 'lm-eval')
    assert len(df)==81
    c = compare(df[df['name'].str.startswith('pythia-v1.1-70m@')], metric='lambada_openai/acc')
    r = c.rows.set_index('name').loc['pythia-v1.1-70m@step143000']
    assert r['n']==5153 and r['rank_high']<=20 and c.rows['name'].iloc[0] in c.tied_for_first
    ppl = compare(df[df['name'].str.startswith('pythia-v1.1-70m@')], metric='lambada_openai/ppl')
    assert ppl.direction=='min' and ppl.rows['value'].is_monotonic_increasing and ppl.tied_for_first
    t = load_any(real('lm_eval_tables'))
    assert t['name'].nunique()==1 and compare(t, metric='arc_easy/acc').rows['n'].tolist()==[10]

def test_malformed_foreign_files(tmp_path):
    text = sorted(real('peft_metamathqa').glob('*.json'))[0].read_text()
    d, bad = json.loads(text), tmp_path/'run.json'
    def with_info(**kw): return json.dumps(dict(d, train_info=dict(d['train_info'], **kw)))
    for broken,message in [
            (text[:500], r'run.json:\d+: invalid JSON'),
            (json.dumps({k: v for k,v in d.items() if k!='train_info'}), 'no field "train_info"'),
            (with_info(metrics=[]), 'no entry with "test accuracy"'),
            (json.dumps(dict(d, train_info=[1])), 'field "train_info" is'),
            (with_info(train_time='long'), "train/seconds is 'long'")]:
        bad.write_text(broken)
        with pytest.raises(UserError, match=message): load_any(bad, 'peft')
    d = json.loads(next(real('pythia_lm_eval').rglob('*step0.json')).read_text())
    d['results']['piqa']['acc'] = None
    bad.write_text(json.dumps(d))
    with pytest.raises(UserError, match='results.piqa.acc" is None, not a number'): load_any(bad)
