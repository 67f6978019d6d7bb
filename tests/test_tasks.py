"Tasks against files that nobody in this project wrote, the hub's layout read by `datasets`, and hostile files " \
"of predictions."
import json, random, subprocess, sys
import pytest
from flow2lab.values import UserError
from flow2lab.files import project_root
from flow2lab.axes import task
from flow2lab.perplexity import perplexity, windows
from flow2lab.datasets import arc, gsm8k, openmath, squad_v2
from flow2lab.contamination import contamination
from flow2lab.score import score_file

shared = project_root()/'../shared/data'
real = pytest.mark.skipif(not shared.exists(),
                          reason='../shared/data is not here: real datasets are not part of the project')

def jsonl(f, rows):
    f.write_text('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding='utf-8')
    return f

# The official SQuAD script ----------------------------------------------------------------------------------------

@real
@pytest.mark.parametrize('gold,name', [('dev.json', 'perturbed'), ('gold_for_smollm2_135m.json', 'smollm2_135m')])
def test_squad_official(gold, name):
    d = shared/'squad_v2'
    want = json.loads((d/f'official_{name}.json').read_text())
    got = score_file('squad_v2', d/f'pred_{name}.json', d/gold)
    assert got==want and list(got)==list(want)              # every digit, every name, their order
    per = json.loads((d/f'official_{name}_per_question.json').read_text())
    pred = json.loads((d/f'pred_{name}.json').read_text())
    rows = squad_v2.load(path=d/gold)
    assert {r['id'] for r in rows}==set(per)
    for r in rows:
        s = squad_v2.official(r, pred[r['id']])
        assert [s['exact'], s['f1']]==per[r['id']], r['id']

@real
def test_squad_model_answers_agree_with_the_script_but_for_unanswerable():
    d = shared/'squad_v2'; rows = squad_v2.load(path=d, n=300)
    pred = json.loads((d/'pred_perturbed.json').read_text())
    for r in rows:
        p = pred[r['id']]
        assert squad_v2.score(r, p or 'Unanswerable.')==squad_v2.official(r, p)
    gold = [squad_v2.score(r, squad_v2.render(r)['answer']) for r in rows]
    assert set(squad_v2.aggregate(gold).values())=={1.0}

@real
def test_squad_totals():
    rows = squad_v2.load(path=shared/'squad_v2')            # the folder's dev file
    assert len(rows)==2421 and sum(not r['answers']['text'] for r in rows)==1253

# GSM8K ------------------------------------------------------------------------------------------------------------

@real
def test_gsm8k_labelled_solutions():
    judged = right = 0
    for l in (shared/'gsm8k/example_model_solutions.jsonl').read_text(encoding='utf-8').splitlines():
        r = json.loads(l)
        for m in ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification'):
            s = gsm8k.score(dict(answer=r['ground_truth']), r[m]['solution'])
            assert s['accuracy']==r[m]['is_correct'], (r['question'], m)
            judged += 1; right += r[m]['is_correct']
    assert judged==2620 and 0<right<judged

@real
def test_gsm8k_files():
    rows = gsm8k.load(path=shared/'gsm8k')
    assert len(rows)==655 and [r['id'] for r in rows]==[str(i) for i in range(655)]
    assert all(gsm8k.score(r, gsm8k.render(r)['answer'])['accuracy']==1 and '<<' not in gsm8k.render(r)['answer']
               for r in rows)
    train = gsm8k.load('train', path=shared/'gsm8k', n=1000)
    assert len(train)==1000 and len(gsm8k.load('train', path=shared/'gsm8k'))==1500
    backward = gsm8k.load(path=shared/'gsm8k/GSM8K_Backward.jsonl')
    assert len(backward)==400

@real
def test_gsm8k_score_file_units(tmp_path):
    rows = gsm8k.load(path=shared/'gsm8k/test.jsonl')
    f = jsonl(tmp_path/'p.jsonl',
              [dict(prediction=f'The answer is ${gsm8k.gold(r)+(2 if i%5==0 else 0)}') if i else dict(prediction='?')
               for i,r in enumerate(rows)])
    got = score_file('gsm8k', f, shared/'gsm8k/test.jsonl')
    assert got==dict(accuracy=524/655, abs_diff=130*2/654, unparsed=1, total=655)

# ARC --------------------------------------------------------------------------------------------------------------

@real
def test_arc_counts_and_forms():
    d = shared/'arc'
    for args, n in [(dict(), 581), (dict(split='validation'), 294), (dict(subset='easy'), 1168)]:
        rows = arc.load(path=d, **args)
        assert len(rows)==n
        for r in rows:
            p = arc.render(r)
            assert p['choices'][p['gold']]==p['answer']==r['answerKey'] and 3<=len(p['choices'])<=5
            assert all(f'\n{c["label"]}. {c["text"]}' in p['messages'][0]['content'] for c in r['question']['choices'])
            assert arc.score(r, p['gold'])['accuracy']==1
            assert arc.score(r, f'The answer is ({p["answer"]}).')['accuracy']==1
    assert (arc.aggregate([arc.score(r, 0) for r in rows])['f1']
            < arc.aggregate([arc.score(r, 0) for r in rows])['accuracy'])
    cloze = arc.load(path=d, ask='cloze', n=50)
    for r in cloze:
        p = arc.render(r)
        assert (p['answer'] in [c['text'] for c in r['question']['choices']]
                and p['answer'] not in p['messages'][0]['content'].replace(r['question']['stem'], ''))

@real
def test_one_folder_for_all_tasks():
    for name, n in [('arc', 581), ('gsm8k', 655), ('squad_v2', 2421)]: assert len(task[name].load(path=shared))==n
    with pytest.raises(UserError, match='no file is named as the train split of arc'): arc.load('train', path=shared)
    with pytest.raises(UserError, match='valid.txt'): perplexity.load(path=shared)
    assert len(perplexity.load('validation', path=shared))==60

@real
def test_few_shot_arc():
    rows = arc.load(path=shared/'arc', n=5, shots=4, shots_path=str(shared/'arc/ARC-Challenge-Dev.jsonl'))
    m = arc.render(rows[0])['messages']
    assert len(m)==9 and m[1]['content'] in 'ABCDE' and m[:-1]==arc.render(rows[4])['messages'][:-1]

@real
def test_contamination_in_real_data():
    train, test = gsm8k.load('train', path=shared/'gsm8k'), gsm8k.load(path=shared/'gsm8k')
    clean = contamination(train, test, gsm8k, gsm8k)
    leaked = contamination(train + test[10:20], test, gsm8k, gsm8k)
    assert set(leaked['exact'])-set(clean['exact'])=={str(i) for i in range(10, 20)}
    assert len(clean['flagged'])<10

# Perplexity -------------------------------------------------------------------------------------------------------

@real
def test_wikitext_documents():
    text = (shared/'wikitext2/valid.txt').read_text(encoding='utf-8')
    rows = perplexity.load(path=shared/'wikitext2/valid.txt')
    assert (''.join(r['text'] for r in rows).strip()==text.strip() and len(rows)==60
            and all(r['text'].startswith(' = ') for r in rows))
    cut = perplexity.load(path=shared/'tinyshakespeare/input.txt', chars=2000)
    assert (''.join(r['text'] for r in cut)==(shared/'tinyshakespeare/input.txt').read_text()
            and all(2000<=len(r['text'])<2600 for r in cut[:-1]))

def test_windows_against_the_naive_loop():
    rng = random.Random(0)
    for _ in range(300):
        n, w = rng.randint(1, 400), rng.randint(2, 64); s = rng.randint(1, w-1)
        seen = [t for b,e,f in windows(n, w, s) for t in range(f, e)]
        assert seen==list(range(1, n))
        for k,(b,e,f) in enumerate(windows(n, w, s)): assert e-b<=w and b<f and (k==0 or f-b>=min(w-s, f))

# The hub ----------------------------------------------------------------------------------------------------------

README = '---\nconfigs:\n{}---\n'
def hub_repo(folder, files, config='default'):
    "A dataset folder in the hub's layout: Parquet shards, named by configuration and split in its README"
    import pyarrow as pa, pyarrow.parquet as pq
    text = f'- config_name: {config}\n  data_files:\n'
    for split, rows in files.items():
        (folder/config).mkdir(parents=True, exist_ok=True)
        half = max(1, len(rows)//2)
        for i, part in enumerate((rows[:half], rows[half:])):
            if part: pq.write_table(pa.Table.from_pylist(part), folder/config/f'{split}-{i:05}-of-00002.parquet')
        text += f'  - split: {split}\n    path: {config}/{split}-*\n'
    (folder/'README.md').write_text(README.format(text))
    return str(folder)

def test_hub_layout(tmp_path):
    q = [dict(id=f'q{i}', question=f'Which is {i}?', choices=dict(text=list('wxyz'), label=list('ABCD')),
              answerKey='ABCD'[i%4]) for i in range(9)]
    repo = hub_repo(tmp_path/'ai2_arc', dict(train=q[:4], test=q), 'ARC-Challenge')
    rows = arc.load(hub=repo, n=5)
    # streamed by `datasets` and read from the files: the same draw
    assert rows==arc.load(path=repo, n=5) and len(rows)==5
    assert len(arc.load('train', hub=repo))==4
    s = [dict(id=f's{i}', title='T', context='Rome is old.', question='What is old?',
              answers=dict(text=['Rome'] if i%2 else [], answer_start=[0] if i%2 else [])) for i in range(6)]
    repo = hub_repo(tmp_path/'squad', dict(validation=s))
    rows = squad_v2.load(hub=repo)
    assert [squad_v2.render(r)['answer'] for r in rows]==['unanswerable', 'Rome']*3 and rows==squad_v2.load(path=repo)
    g = [dict(question=f'{i}+1?', answer=f'#### {i+1}') for i in range(6)]
    assert len(gsm8k.load(hub=hub_repo(tmp_path/'gsm8k', dict(test=g), 'main')))==6
    w = [dict(text=t) for t in ['', ' = Ada = \n', '', ' She wrote . \n', ' = = Life = = \n', ' = Ben = \n',
                                ' He read . \n']]
    docs = perplexity.load(hub=hub_repo(tmp_path/'wikitext', dict(test=w), 'wikitext-2-raw-v1'))
    assert ([d['text'].split()[1] for d in docs]==['Ada', 'Ben']
            and docs[0]['text'].startswith(' = Ada = \n \n She wrote . \n'))

def test_hub_openmath_holds_problems_out(tmp_path):
    rows = [dict(problem=f'What is {i//2}+1?', generated_solution=f'\\boxed{{{i//2+1}}}',
                 expected_answer=str(i//2+1), problem_source='x') for i in range(400)]
    rows += [dict(problem='Name it.', generated_solution='\\boxed{x^2}', expected_answer='x^2', problem_source='x')]
    repo = hub_repo(tmp_path/'m', dict(train_1M=rows))
    train, test = openmath.load('train', hub=repo), openmath.load(hub=repo)
    assert not {r['question'] for r in train} & {r['question'] for r in test}
    assert len(test)==len({r['question'] for r in test}) and 8<=len(test)<=35 and len(train)+2*len(test)==400
    assert len(openmath.load('train', hub=repo, pool=100))<100
    assert all(openmath.score(r, r['answer'])['accuracy']==1 for r in test)

def test_hub_mistakes(tmp_path):
    repo = hub_repo(tmp_path/'m', dict(test=[dict(question='1+1?', answer='#### 2')]), 'main')
    with pytest.raises(UserError, match='train'): gsm8k.load('train', hub=repo)
    with pytest.raises(UserError, match='ARC-Challenge'): arc.load(hub=repo)
    with pytest.raises(UserError, match='unknown argument of task gsm8k "subset"'):
        gsm8k.load(path=repo, subset='easy')
    with pytest.raises(UserError, match='unknown subset "hard". .*challenge, easy'): arc.load(path=repo, subset='hard')
    with pytest.raises(UserError, match='unknown split "tset". Did you mean "test"'): gsm8k.load('tset', hub=repo)

def test_no_hub_is_said_within_five_seconds():
    code = ('import time, os; t=time.time(); os.environ.update(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")\n'
            'from flow2lab.values import UserError\nfrom flow2lab.datasets import gsm8k\n'
            'try: gsm8k.load()\nexcept UserError as e: print(e)\nassert time.time()-t<5')
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=project_root())
    assert r.returncode==0 and 'cannot be reached' in r.stdout and 'Give path=' in r.stdout, r.stderr

def test_imports_no_torch():
    code = ('import sys, flow2lab.datasets; '
            'print([m for m in ("torch", "transformers", "datasets", "pyarrow") if m in sys.modules])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                          cwd=project_root()).stdout.strip()=='[]'

# Hostile files ----------------------------------------------------------------------------------------------------

GOLD = [dict(id=f'g{i}', question=f'{i}+1?', answer=f'#### {i+1}') for i in range(4)]
ok = lambda i, p='1': dict(id=f'g{i}', prediction=p)

@pytest.mark.parametrize('rows,said', [
    ([ok(0), ok(1), ok(2)], 'no prediction for 1 of the 4 ids in gold.jsonl: g3'),
    ([*map(ok, range(4)), ok(2)], r'p.jsonl:5: a second prediction for id "g2"; the first is at .*p.jsonl:3'),
    ([*map(ok, range(4)), ok(9)], r'p.jsonl:5: id "g9" is not in gold.jsonl'),
    ([*map(ok, range(3)), dict(id='g_3', prediction='1')],
     r'p.jsonl:4: id "g_3" is not in gold.jsonl. Did you mean "g3"'),
    ([ok(0), dict(prediction='1')], r'p.jsonl:2: no "id"'),
    ([ok(0), dict(id='g1', answer='1')], r'p.jsonl:2: no field "prediction"'),
    ([ok(0), dict(id='g1', prediction=None)], r'p.jsonl:2: the prediction is not a text but null'),
    ([ok(0), dict(id='g1', prediction=['1'])], r'p.jsonl:2: .* not a text'),
    ([ok(0), '{"id": "g1", "prediction": "1"'], r'p.jsonl:2: invalid JSON at column'),
    ([ok(0), '[1, 2]'], r'p.jsonl:2'),
    ([dict(prediction='1')]*3, 'None is left for id "g3"'),
    ([dict(prediction='1')]*5, r'The first one too many is at p.jsonl:5'),
    (['{"g0": "1", "g1": "1", "g2": "1", "g3": "1", "g0": "2"}'], r'p.jsonl:1: a second prediction for id "g0"'),
    (['', '   '], 'empty'), (['not json at all'], r'p.jsonl:1: invalid JSON'), (['"text"'], 'p.jsonl'),
    (['['*100000], 'p.jsonl'), (['12'], 'p.jsonl'),
])
def test_hostile_predictions(tmp_path, rows, said):
    gold, p = jsonl(tmp_path/'gold.jsonl', GOLD), jsonl(tmp_path/'p.jsonl', rows)
    with pytest.raises(UserError, match=said): score_file('gsm8k', p, gold)
    with pytest.raises(UserError): score_file('gsm8k', p.rename(tmp_path/'p.json'), gold)

@pytest.mark.parametrize('data,said', [(b'\xff\xfe{\x00}\x00', 'UTF'), (b'{"g0": "caf\xe9"}', 'not UTF-8'),
                                       (b'\x00\x01\x02', 'invalid JSON'), (b'', 'empty')])
def test_hostile_bytes(tmp_path, data, said):
    gold = jsonl(tmp_path/'gold.jsonl', GOLD); (tmp_path/'p.json').write_bytes(data)
    with pytest.raises(UserError, match=said): score_file('gsm8k', tmp_path/'p.json', gold)

def test_good_predictions_in_every_form(tmp_path):
    gold = jsonl(tmp_path/'gold.jsonl', GOLD)
    want = dict(accuracy=0.75, abs_diff=1/3, unparsed=1, total=4) | dict(abs_diff=0.0)
    texts = ['1', '#### 2', 'A: 3', 'who knows']
    by_id = {f'g{i}': t for i,t in enumerate(texts)}
    forms = dict(o=('o.json', [json.dumps(by_id, indent=1)]), bom=('b.json', ['\ufeff'+json.dumps(by_id)]),
                 one=('one.jsonl', [by_id]),
                 order=('r.jsonl', [dict(prediction=t) for t in texts]),
                 ids=('i.jsonl', [dict(id=k, prediction=t) for k,t in reversed(by_id.items())]),
                 list=('l.json', [json.dumps([dict(id=k, prediction=t) for k,t in by_id.items()])]),
                 rows=('s.json', [dict(id=k, prediction=t) for k,t in by_id.items()]),
                 numbers=('n.json', [json.dumps(dict(by_id, g0=1))]))
    for name,(f,rows) in forms.items(): assert score_file('gsm8k', jsonl(tmp_path/f, rows), gold)==want, name
    one = jsonl(tmp_path/'gold1.jsonl', GOLD[:1])
    for rows in ([dict(id='g0', prediction='1')], [dict(prediction='1')], [dict(g0='1')]):
        for f in ('x.json', 'x.jsonl'): assert score_file('gsm8k', jsonl(tmp_path/f, rows), one)['accuracy']==1

def test_gold_mistakes(tmp_path):
    p = jsonl(tmp_path/'p.json', ['{}'])
    twice = jsonl(tmp_path/'twice.jsonl', [*GOLD, GOLD[1]])
    with pytest.raises(UserError, match=r'twice.jsonl:5: id "g1" was given before, at .*twice.jsonl:2'):
        score_file('gsm8k', p, twice)
    for name,rows,said in [('gsm8k', [dict(question='1+1?')],
                            r'bad.jsonl:1: not a row of gsm8k \(no field .answer.\). Expected'),
                           ('gsm8k', [dict(question='1+1?', answer='')], 'no number in "answer"'),
                           ('gsm8k', [dict(question=3, answer='#### 3')], 'bad.jsonl:1: not a row'),
                           ('arc', [dict(id='a', prompt='?', choices=['x', 'y'], answer_idx=2)], 'none of 2 choices'),
                           ('arc', [dict(id='a', question=dict(stem='?', choices=[dict(text='x', label='A')]),
                                         answerKey='B')], 'bad.jsonl:1'),
                           ('squad_v2', [dict(id='a', question='?', answers=[])], 'no field .context.')]:
        with pytest.raises(UserError, match=said): score_file(name, p, jsonl(tmp_path/'bad.jsonl', rows))
    for text,said in [('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', 'not a SQuAD file'),
                      ('{"data": ', r'dev.json:1: invalid JSON'), ('{"data": 3}', 'not a SQuAD file')]:
        with pytest.raises(UserError, match=said): score_file('squad_v2', p, jsonl(tmp_path/'dev.json', [text]))
    with pytest.raises(UserError, match='Did you mean "gsm8k"'): score_file('gsm8', p, twice)
    with pytest.raises(UserError, match='no such file'):
        score_file('gsm8k', tmp_path/'none.json', jsonl(tmp_path/'g.jsonl', GOLD))
    with pytest.raises(UserError, match='nothing to predict'): score_file('perplexity', p, twice)

def test_hostile_answers():
    row = dict(answer='#### 18')
    for p in ['9'*100_000, '1'*20+'.'+'3'*100_000, '-'*10_000, '#### '*10_000, '\\boxed{'*10_000, '1/0',
              '$'*50_000, 'A: '*10_000, '1,'*30_000, '((((' *20_000+'=', '3 + '*20_000,
              '\x00', '\ud800', '½', '１８', '#### ', 'the answer is', '<<'*20_000]:
        s = gsm8k.score(row, p)
        assert s['accuracy'] in (0, 1) and all(v==v and abs(v)<1e50 for v in s.values())
