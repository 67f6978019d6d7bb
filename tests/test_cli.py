"The command line as a user meets it: one JSON object, exit codes, no tracebacks, nothing half-written"
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent/'shared'/'data'
needs_data = pytest.mark.skipif(not SHARED.exists(), reason='no ../shared/data beside this checkout')

def cli(*args, here=ROOT, said=None, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())',
                           *map(str, args)], capture_output=True, text=True, cwd=here, timeout=300, input=said,
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
    (['run', 'task=nano_math', 'train.lr=fast'], 'train.lr=fast: give a number'),
    (['run', 'task=nano_math', 'seed=x'], 'seed=x: give a whole number'),
    (['run', 'task=nano_math', 'method=lora', 'method_args.r=-3'], 'method_args.r=-3: give 1 or more'),
    (['run', 'task=nano_math', 'train.seq_len=abc'], 'train.seq_len=abc: give a whole number'),
    (['run', 'task=nano_math', 'train.epochs=0'], 'trains nothing'),
    (['run', 'task=nano_math', 'train.tokens=-5'], 'train.tokens=-5: give 0 or more'),
    (['run', 'method=lora'], 'method without task'),
    (['eval', 'nano', '--limit', '-3'], 'n=-3: give 0 or more'),
    (['chat', 'nano', '--temperature', '-1'], 'Give 0 or more'),
    (['pretrain', '--pack', 'nowhere', '--tokenizer', 'nowhere'], 'nowhere: no tokenizer there'),
    (['corpus', 'prepare', 'README.md', '--out', '/nowhere', '--language', 'zz'], 'unknown language "zz"'),
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
    r = cli('data', 'check', f)
    assert '1 of 3 rows bad. Nothing written. Fix it, or use --skip-bad of data convert or corpus.' in r.stderr

def test_data_inventory_names_a_folder_that_is_not_there():
    fails('data', 'inventory', says='/no/such', FLOW2LAB_DATA='/no/such')

def test_a_file_of_the_user_is_not_overwritten(tmp_path):
    mine, rows = tmp_path/'mine.jsonl', tmp_path/'rows.csv'
    mine.write_text('{"text": "mine"}\n'); rows.write_text('prompt,response\na,b\n')
    for args in (['data', 'convert', rows], ['corpus', 'dedup', mine]):
        fails(*args, '--out', mine, says='mine.jsonl: exists already')
    assert mine.read_text()=='{"text": "mine"}\n'
    assert cli('data', 'convert', rows, '--out', mine, '--force').returncode==0 and '"b"' in mine.read_text()

def test_paths_are_meant_from_here(tmp_path):
    "`run` in a folder of the user's with a file of its own: the worker, which stands elsewhere, finds it"
    rows = [dict(messages=[dict(role='user', content=f'{i}+1'), dict(role='assistant', content=str(i+1))])
            for i in range(40)]
    (tmp_path/'good.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    got = only_json(cli('run', 'base=micro', 'task=chat', 'task_args.path=good.jsonl', 'eval.chat.path=./good.jsonl',
                        'eval.chat.n=3', '--json', here=tmp_path, FLOW2LAB_RESULTS=str(tmp_path/'results'),
                        FLOW2LAB_OUTPUTS=str(tmp_path/'outputs')))
    assert got['metrics']['chat/f1']['n']==3

def test_a_reader_that_has_heard_enough():
    code = 'import sys; from flow2lab.cli import main; sys.exit(main())'
    for more in ([], ['--json']):
        p = subprocess.Popen([sys.executable, '-c', code, 'list', *more], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        p.stdout.close(); said = p.stderr.read(); p.wait()
        assert 'BrokenPipe' not in said and 'Traceback' not in said, said[-500:]

def test_json_is_one_object_on_stdout():
    assert 'dora' in only_json(cli('list', 'method', '--json'))['method']
    assert only_json(cli('estimate', 'base=nano', 'task=nano_math', 'method=lora', '--json'))['trainable']>0
    assert only_json(cli('data', 'inventory', '--json'))['datasets']['count']>=6
    got = only_json(cli('eval', 'micro', '--tasks', 'nano_choice', '--limit', '20', '--json'))
    assert got['metrics']['nano_choice/accuracy']['n']==20
    got = only_json(cli('chat', 'nano', '--max-tokens', '5', '--json', said='1 + 2?\n'))
    assert [m['role'] for m in got['messages']]==['user', 'assistant']

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

def test_a_mistake_in_the_last_row_costs_no_run(tmp_path):
    rows = [json.dumps(dict(instruction=f'Say {i}.', output=str(i))) for i in range(9)]
    good, bad = tmp_path/'good.jsonl', tmp_path/'bad.jsonl'
    good.write_text('\n'.join(rows)); bad.write_text('\n'.join([*rows, '{"instruction": "broken']))
    env = dict(FLOW2LAB_RESULTS=str(tmp_path/'results'))
    for fields in ([f'task_args.path={bad}'], [f'task_args.path={good}', f'eval.alpaca.path={bad}']):
        fails('run', 'task=alpaca', 'method=lora', *fields, says='bad.jsonl:10', **env)
    assert not (tmp_path/'results').exists()
