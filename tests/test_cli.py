"The command line as a user meets it: one JSON object, exit codes, no tracebacks, nothing half-written"
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'/'data'
needs_data = pytest.mark.skipif(not SHARED.exists(), reason='no ../shared/data beside this checkout')

def cli(*args, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())',
                           *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **env})

def fails(*args, says, **env):
    r = cli(*args, **env)
    assert r.returncode==2, (r.returncode, r.stderr[-500:])
    assert 'Traceback' not in r.stderr and says in r.stderr, r.stderr[-500:]

def only_json(r):
    assert r.returncode==0, r.stderr[-800:]
    assert r.stdout.count('\n')==1, r.stdout[:300]
    return json.loads(r.stdout)

@needs_data
def test_score_equals_the_official_script():
    got = only_json(cli('score', 'squad_v2', SHARED/'squad_v2/pred_perturbed.json',
                        '--gold', SHARED/'squad_v2/dev.json', '--json'))
    want = json.loads((SHARED/'squad_v2/official_perturbed.json').read_text())
    for k in ('exact', 'f1', 'HasAns_f1', 'NoAns_f1', 'total'): assert got[k]==want[k], k

@needs_data
def test_score_gsm8k_in_the_gold_files_order(tmp_path):
    gold = [json.loads(l) for l in (SHARED/'gsm8k/test.jsonl').read_text().splitlines()]
    (tmp_path/'p.jsonl').write_text('\n'.join(json.dumps(dict(prediction=g['answer'] if i%4 else 'no idea'))
                                              for i,g in enumerate(gold)))
    got = only_json(cli('score', 'gsm8k', tmp_path/'p.jsonl', '--gold', SHARED/'gsm8k/test.jsonl', '--json'))
    wrong = len(range(0, len(gold), 4))
    assert got['total']==len(gold) and got['unparsed']==wrong and abs(got['accuracy']-(1-wrong/len(gold)))<1e-12

@needs_data
def test_compare_reads_pefts_files():
    got = only_json(cli('compare', *sorted((SHARED/'peft_metamathqa').glob('*.json'))[:12], '--json'))
    assert {'name', 'metric', 'n', 'ci95', 'rank_low', 'rank_high', 'pareto'} <= set(got['rows'][0])
    assert all(r['n']==1319 and 0<=r['metric']<=1 and r['ci95'][0]<=r['metric']<=r['ci95'][1] for r in got['rows'])
    assert set(got['tied_for_first']) <= {r['name'] for r in got['rows']}

@pytest.mark.parametrize('args,says', [
    (['lisst'], 'Did you mean "list"'),
    (['run', 'task=nano_math', 'method=lroa'], 'Did you mean "lora"'),
    (['run', 'task=nano_math', 'train.lrr=1'], 'Did you mean "lr"'),
    (['run', 'task=nano_maths'], 'Did you mean "nano_math"'),
    (['run', 'base=nowhere/nothing', 'task=nano_math', 'method=lora'], 'nowhere/nothing'),
    (['run', 'task=nano_math', 'method=dora', 'base_quant=int8'], 'dora'),
    (['eval', './no/model', '--tasks', 'nano_math'], './no/model'),
    (['eval', 'nano', '--tasks', 'gsm8k', '--data', 'no_such_file.jsonl'], 'no_such_file.jsonl'),
    (['score', 'squad_v2', 'nothing.json', '--gold', 'none.json'], 'no such file'),
    (['compare', 'no/such/study'], 'no/such/study'),
    (['study', 'metods'], 'Did you mean "methods"'),
    (['study', 'methods', '--scale', 'huge'], 'unknown scale "huge"'),
    (['data', 'check', 'nothing.jsonl'], 'nothing.jsonl'),
    (['data', 'chekc', 'x'], 'Did you mean "check"'),
    (['list', 'methd'], 'Did you mean "method"'),
    (['bench', 'nanoo'], 'nanoo'),
])
def test_mistakes_cost_a_sentence_and_exit_code_2(args, says):
    fails(*args, says=says, HF_ENDPOINT='http://127.0.0.1:9')

def test_the_issues_example(tmp_path):
    f = tmp_path/'train.jsonl'; f.write_text('{"text": "a"}\n{"text":1\n{"text": "b"}\n')
    fails('data', 'check', f, says='train.jsonl:2: invalid JSON at column')
    r = cli('data', 'check', f); assert '1 of 3 rows bad. Nothing written. Fix it, or use --skip-bad.' in r.stderr

def test_json_is_one_object_on_stdout():
    assert 'dora' in only_json(cli('list', 'method', '--json'))['method']
    assert only_json(cli('estimate', 'base=nano', 'task=nano_math', 'method=lora', '--json'))['trainable']>0
    assert only_json(cli('data', 'inventory', '--json'))['datasets']['count']>=6
    got = only_json(cli('eval', 'micro', '--tasks', 'nano_choice', '--limit', '20', '--json'))
    assert got['metrics']['nano_choice/accuracy']['n']==20

def test_a_run_is_recorded_once(tmp_path):
    args = ['run', 'base=micro', 'task=nano_math', 'task_args.n=60', 'method=lora', 'train.lr=5e-3',
            'eval=nano_math:20', '--json']
    a = only_json(cli(*args, FLOW2LAB_RESULTS=str(ROOT/'data/results/test-cli'), FLOW2LAB_OUTPUTS=str(tmp_path)))
    try:
        folder = next((ROOT/'data/results/test-cli/runs').glob('*--'+a['id']))
        before = (folder/'metrics.json').stat().st_mtime_ns
        assert {'spec.json', 'metrics.json', 'items.parquet', 'steps.jsonl', 'env.json',
                'notebook.ipynb'} <= {p.name for p in folder.iterdir()}
        b = only_json(cli(*args, FLOW2LAB_RESULTS=str(ROOT/'data/results/test-cli'), FLOW2LAB_OUTPUTS=str(tmp_path)))
        assert a==b and (folder/'metrics.json').stat().st_mtime_ns==before
    finally:
        import shutil; shutil.rmtree(ROOT/'data/results/test-cli', ignore_errors=True)
