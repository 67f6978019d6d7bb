"From raw text to an aligned model by the README's commands, two processes as one, mistakes in a sentence, " \
"no secret anywhere"
import io, json, os, shlex, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
CANARY = 'hf_canaryCANARYcanaryCANARYcanary1'

def cli(*args, where=None, here=ROOT, said=None, **env):
    "A command as a process of its own, whose records and outputs go to the folder `where`"
    kw = dict(FLOW2LAB_RESULTS=f'{where}/results', FLOW2LAB_OUTPUTS=f'{where}/outputs') if where else {}
    return subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())',
                           *map(str, args)], capture_output=True, text=True, cwd=here, timeout=600, input=said,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', 'HF_TOKEN': CANARY, **kw, **env})

def ok(*args, **kw):
    "The JSON that a command answers, and its process"
    r = cli(*args, '--json', **kw)
    assert r.returncode==0, r.stderr[-1500:]
    return json.loads(r.stdout), r

def write_rows(path, rows):
    "JSONL"
    path.write_text(''.join(json.dumps(r)+'\n' for r in rows))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a pack, a tokenizer and another one"
    from flow2lab.nano import pretraining_rows, row_text
    from flow2lab.tokenizer import make_tokenizer
    from flow2lab.packs import pack_corpus
    d, rows = tmp_path_factory.mktemp('scratch'), pretraining_rows(1500)
    write_rows(d/'raw.jsonl', (dict(text=' '.join(row_text(next(rows)) for _ in range(10))) for _ in range(150)))
    make_tokenizer(d/'raw.jsonl', d/'tok', vocab=600, context=256)
    make_tokenizer(d/'raw.jsonl', d/'other', vocab=560, context=256)
    pack_corpus(d/'raw.jsonl', d/'tok', d/'pack', seq_len=64, workers=1)
    return d

def pretrain(d, *more):
    return ['pretrain', '--pack', d/'pack', '--tokenizer', d/'tok', '--size', 'micro', '--tokens', 12_000,
            'train.precision=fp32', 'train.batch_tokens=2048', 'eval=samples:2', *more]

def runs(d):
    "{run: when its metrics were written}"
    return {p.parent.name: p.stat().st_mtime_ns for p in (d/'results').glob('*/*/metrics.json')}

# What the README's commands get besides, to be done in seconds
SHORT = {'tokenizer': '--vocab 600 --context 256', 'pack': '--seq-len 64 --workers 1', 'corpus': '--workers 1',
         'pretrain': '--size micro --tokens 12000 train.precision=fp32 train.batch_tokens=2048 eval=samples:2',
         'sft': '--template alpaca --items 10', 'dpo': '--items 10', 'chat': '--max-tokens 8'}

def readme():
    "The commands under the README's heading, without comments"
    block = (ROOT/'README.md').read_text().split('## From your text to a model that answers')[1].split('```')[1]
    return [shlex.split(l, comments=True)[1:] for l in block.strip().splitlines()]

@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    "A folder with what the README's commands start from, and what became of it: {command: CompletedProcess}"
    from flow2lab.nano import pretraining_rows, row_text
    d, rows = tmp_path_factory.mktemp('texts'), pretraining_rows(3500)
    (d/'my_texts').mkdir()
    def talk(): return ' '.join(row_text(next(rows)) for _ in range(20))
    write_rows(d/'my_texts/a.jsonl', [dict(text=f'Here is what the people of the town {i} have to say of it. {talk()}')
                                      for i in range(150)])
    write_rows(d/'instructions.jsonl', [dict(instruction=f'Add {i} and 1.', output=str(i+1)) for i in range(200)])
    write_rows(d/'pairs.jsonl', [dict(prompt=f'Add {i} and 1.', chosen=str(i+1), rejected='No.') for i in range(120)])
    return d

def test_the_commands_of_the_readme(texts):
    "From another folder than the project's, with what each prints; from pretraining on without pack and tokenizer"
    d, run, said = texts, '', {}
    assert [c[0] for c in readme()]==['corpus', 'tokenizer', 'pack', 'pretrain', 'sft', 'dpo', 'merge', 'chat']
    for c in readme():
        args = [run if a=='RUN' else a for a in c] + SHORT.get(c[0], '').split()
        if c[0]=='corpus': args += ['--rules', 'encoding']
        said[c[0]] = r = cli(*args, where=d, here=d, said='Add 3 and 1.\n')
        assert r.returncode==0, (args, r.stderr[-1500:])
        if c[0] in ('pretrain', 'sft', 'dpo'): run = r.stdout.split()[2]
        if c[0]=='pretrain':
            shutil.rmtree(d/'packed')
            shutil.rmtree(d/'words')
    assert (d/'my_model'/'model.safetensors').is_file() and len(runs(d))==3
    record = {k: json.loads((d/'results/scratch'/said[k].stdout.split()[2]/'metrics.json').read_text())
              for k in ('pretrain', 'sft', 'dpo')}
    one, two, three = record.values()
    assert {'train/mfu', 'train/val_bits_per_byte', 'samples/words'} <= set(one['metrics'])
    assert three['name'].endswith('preference_DPO_LoRa8_NoQuant')
    assert {'train/val_kl', 'train/val_margin', 'train/val_accuracy', 'preference/accuracy'} <= set(three['metrics'])
    steps = next((d/'results').glob(f'*/*{three["id"]}/steps.jsonl')).read_text().splitlines()
    assert abs(json.loads(steps[0])['loss']-0.6931472)<1e-5 and 'accuracy' in json.loads(steps[0])
    assert '### Response' in next((d/'outputs').glob(f'*{two["id"]}/last/chat_template.jinja')).read_text()
    before = runs(d)
    other, _ = ok('dpo', '--base', two['id'], '--data', 'pairs.jsonl', '--items', 10, '--beta', .3, where=d, here=d)
    assert three['id']!=other['id'] and {k: v for k,v in runs(d).items() if k in before}==before and len(runs(d))==4
    text = ' '.join(r.stdout+r.stderr for r in said.values())
    files = [f for f in d.rglob('*') if f.is_file()]
    assert len(files)>20 and CANARY not in text
    assert not any(CANARY.encode() in f.read_bytes() for f in files)

def test_a_run_is_a_model(texts, monkeypatch, capsys):
    "By its folder, from here or absolute, by its name and by the beginning of its id; in this process"
    from flow2lab.cli import main
    d = texts
    monkeypatch.chdir(d)
    for k in ('RESULTS', 'OUTPUTS'): monkeypatch.setenv(f'FLOW2LAB_{k}', str(d/k.lower()))
    run = min((d/'results/scratch').glob('*preference_DPO*'))
    id = run.name[-16:]
    def works(*args):
        rc = main(map(str, args))
        out, err = capsys.readouterr()
        assert rc==0, err
        return out
    assert 'instruct/f1' in works('eval', run, '--tasks', 'instruct', '--data', 'instructions.jsonl', '--limit', 3)
    assert 'bench/load' in works('bench', os.path.relpath(run), '--prompt', 8, '--new-tokens', 2, '--repeats', 1)
    assert 'relative error' in works('merge', id[:5], '--out', 'again')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('Add 3 and 1.\n'))
    works('chat', run.name, '--max-tokens', 4)
    assert 'trainable' in works('estimate', f'base={id}', 'task=nano_talk')

def test_two_processes_are_one(made, tmp_path):
    one, _ = ok(*pretrain(made), where=made)
    two, _ = ok(*pretrain(made, '--processes', 2), where=tmp_path)
    def curve(d, r):
        file = next((d/'results').glob(f'*/*{r["id"]}/steps.jsonl'))
        return [json.loads(line) for line in file.read_text().splitlines()]
    a, b = curve(made, one), curve(tmp_path, two)
    assert one['id']==two['id'] and len(a)==len(b)>=5
    for k in ('loss', 'val_loss'): assert max(abs(x.get(k, 0)-y.get(k, 0)) for x,y in zip(a, b))<1e-5

def test_mistakes(made, tmp_path, monkeypatch, capsys):
    "In this process: nothing is trained, so nothing may be imported twice"
    from flow2lab.cli import main
    monkeypatch.setenv('FLOW2LAB_RESULTS', str(tmp_path/'results'))
    monkeypatch.setenv('FLOW2LAB_OUTPUTS', str(tmp_path/'outputs'))
    def refused(*args, says):
        rc, err = main(map(str, args)), capsys.readouterr().err
        assert rc==2 and says in err, (rc, err)
    def options(**kw):
        kw = {**dict(pack=made/'pack', tokenizer=made/'tok', size='micro'), **kw}
        return [word for k,v in kw.items() for word in (f'--{k}', v)]
    for kw,says in [(dict(tokenizer=made/'other'), 'packed with another tokenizer'), (dict(ratio=0), 'trains nothing'),
                    (dict(tokens=-5), 'trains nothing'), (dict(size='tinny'), 'no preset'),
                    (dict(pack=tmp_path/'none'), 'none')]:
        refused('pretrain', *options(**kw), says=says)
    same = tmp_path/'same.jsonl'
    write_rows(same, [dict(prompt='a?', chosen='b', rejected='c'), dict(prompt='a?', chosen='b', rejected='b')])
    refused('dpo', '--base', 'micro', '--data', same, says='same.jsonl:2')
    refused('dpo', '--base', 'micro', '--task', 'nano_preference', '--beta', 0, says='beta=0')
    empty = tmp_path/'empty.jsonl'
    write_rows(empty, [dict(instruction='Say.', output='')])
    refused('sft', '--base', 'micro', '--data', empty, says='empty.jsonl:1')
    refused('sft', '--base', 'micro', '--task', 'nano_talk', '--template', 'alpacca', says='Did you mean "alpaca"')
    assert not list(tmp_path.glob('results/*/*/metrics.json')) and not list(tmp_path.glob('outputs/*'))
