"From raw text to an aligned model by commands: each stage alone, two processes as one, mistakes in a sentence, " \
"no secret anywhere"
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
CANARY = 'hf_canaryCANARYcanaryCANARYcanary1'

def cli(*args, where=None, **env):
    kw = dict(FLOW2LAB_RESULTS=f'{where}/results', FLOW2LAB_OUTPUTS=f'{where}/outputs') if where else {}
    return subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())',
                           *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=600,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_TOKEN': CANARY, **kw, **env})

def ok(*args, **kw):
    r = cli(*args, '--json', **kw)
    assert r.returncode==0, r.stderr[-1500:]
    return json.loads(r.stdout), r

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a pack, a tokenizer and another one"
    from flow2lab.nano import pretraining_rows, row_text
    from flow2lab.tokenize import make_tokenizer, pack_corpus
    d = tmp_path_factory.mktemp('scratch'); rows = pretraining_rows(1500)
    (d/'raw.jsonl').write_text(''.join(json.dumps(dict(text=' '.join(row_text(next(rows)) for _ in range(10))))+'\n'
                                       for _ in range(150)))
    make_tokenizer(d/'raw.jsonl', d/'tok', vocab=600, context=256)
    make_tokenizer(d/'raw.jsonl', d/'other', vocab=560, context=256)
    pack_corpus(d/'raw.jsonl', d/'tok', d/'pack', seq_len=64, workers=1)
    return d

def pretrain(d, *more):
    return ['pretrain', '--pack', d/'pack', '--tokenizer', d/'tok', '--size', 'micro', '--tokens', 12_000,
            'train.precision=fp32', 'train.batch_tokens=2048', 'eval=samples:2', *more]
def runs(d): return {p.parent.name: p.stat().st_mtime_ns for p in (d/'results').glob('*/*/metrics.json')}

def test_stages_by_command(made):
    d = made
    one, r1 = ok(*pretrain(d), where=d)
    assert {'train/mfu', 'train/val_bits_per_byte', 'samples/words'} <= set(one['metrics'])
    two, r2 = ok('sft', '--base', one['id'][:10], '--task', 'nano_talk', '--template', 'alpaca', '--items', 10,
                 'task_args.n=60', where=d)
    three, r3 = ok('dpo', '--base', two['id'], '--task', 'nano_preference', '--items', 20, 'task_args.n=40', where=d)
    assert (three['name'].endswith('nano_preference_DPO_LoRa8_NoQuant')
            and 0<=three['metrics']['nano_preference/accuracy']['value']<=1)
    assert {'train/val_kl', 'train/val_margin', 'train/val_accuracy'} <= set(three['metrics'])
    steps = next((d/'results').glob(f'*/*{three["id"]}/steps.jsonl')).read_text().splitlines()
    assert abs(json.loads(steps[0])['loss']-0.6931472)<1e-5 and 'accuracy' in json.loads(steps[0])
    assert '### Response' in next((d/'outputs').glob(f'*{two["id"]}/last/chat_template.jinja')).read_text()
    before = runs(d); assert len(before)==3
    other, _ = ok('dpo', '--base', two['id'], '--task', 'nano_preference', '--items', 20, 'task_args.n=40',
                  '--beta', .3, where=d)
    assert three['id']!=other['id'] and {k: v for k,v in runs(d).items() if k in before}==before and len(runs(d))==4
    said = ' '.join(r.stdout+r.stderr for r in (r1, r2, r3))
    files = [f for f in d.rglob('*') if f.is_file()]
    assert len(files)>20 and CANARY not in said and not any(CANARY.encode() in f.read_bytes() for f in files)

def test_two_processes_are_one(made, tmp_path):
    one, _ = ok(*pretrain(made), where=made)
    two, _ = ok(*pretrain(made, '--processes', 2), where=tmp_path)
    read = lambda d, r: [json.loads(l) for l in
                         next((d/'results').glob(f'*/*{r["id"]}/steps.jsonl')).read_text().splitlines()]
    a, b = read(made, one), read(tmp_path, two)
    assert one['id']==two['id'] and len(a)==len(b)>=5
    assert (max(abs(x['loss']-y['loss']) for x,y in zip(a, b))<1e-5
            and max(abs(x.get('val_loss', 0)-y.get('val_loss', 0)) for x,y in zip(a, b))<1e-5)

def test_mistakes(made, tmp_path, monkeypatch, capsys):
    "In this process: nothing is trained, so nothing may be imported twice"
    from flow2lab.cli import main
    monkeypatch.setenv('FLOW2LAB_RESULTS', str(tmp_path/'results'))
    monkeypatch.setenv('FLOW2LAB_OUTPUTS', str(tmp_path/'outputs'))
    def refused(*args, says):
        rc, err = main(map(str, args)), capsys.readouterr().err
        assert rc==2 and says in err, (rc, err)
    d, p = made, lambda **kw: [x for k,v in {**dict(pack=made/'pack', tokenizer=made/'tok', size='micro'),
                                             **kw}.items() for x in (f'--{k}', v)]
    refused('pretrain', *p(tokenizer=d/'other'), says='packed with another tokenizer')
    refused('pretrain', *p(ratio=0), says='trains nothing')
    refused('pretrain', *p(tokens=-5), says='trains nothing')
    refused('pretrain', *p(size='tinny'), says='no preset')
    refused('pretrain', *p(pack=tmp_path/'none'), says='none')
    same = tmp_path/'same.jsonl'
    same.write_text(json.dumps(dict(prompt='a?', chosen='b', rejected='c'))+'\n'
                    +json.dumps(dict(prompt='a?', chosen='b', rejected='b'))+'\n')
    refused('dpo', '--base', 'micro', '--data', same, says='same.jsonl:2')
    refused('dpo', '--base', 'micro', '--task', 'nano_preference', '--beta', 0, says='beta=0')
    empty = tmp_path/'empty.jsonl'; empty.write_text(json.dumps(dict(instruction='Say.', output=''))+'\n')
    refused('sft', '--base', 'micro', '--data', empty, says='empty.jsonl:1')
    refused('sft', '--base', 'micro', '--task', 'nano_talk', '--template', 'alpacca', says='Did you mean "alpaca"')
    assert not list(tmp_path.glob('results/*/*/metrics.json')) and not list(tmp_path.glob('outputs/*'))
