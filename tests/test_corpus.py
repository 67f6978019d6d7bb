"From text to a pack as processes: the real files of ../shared/data, hostile ones, a full disk, a kill in the middle"
import json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
from flow2lab import corpus, jobs, packs, tokenizer
from flow2lab.cli import main
from flow2lab.values import UserError
from flow2lab.files import project_root

shared = project_root().parent/'shared/data'
real = pytest.mark.skipif(not shared.is_dir(), reason='the real data of ../shared/data is not here')
WORDS = ("the of and that have with to be a in was for on as by at from his her it is are were which this had not but "
         "they you one all their there been "
         "many some would other into more its time only could new them man over also after first then any my now such "
         "like our").split()

def article(rng, n=300):
    "Text that passes the rules and resembles no other: common words among made-up ones"
    made = [''.join(rng.choice(list('aeioustrnlmd'), rng.integers(3, 9))) for _ in range(n//2)]
    words = rng.permutation([*rng.choice(WORDS, n-n//2), *made]).tolist()
    return ' '.join(w + ('.' if i%12==11 else '') for i,w in enumerate(words))

def write_rows(path, rows):
    "JSONL"
    path.write_text(''.join(json.dumps(r)+'\n' for r in rows))

@pytest.fixture(scope='session')
def web(tmp_path_factory):
    "2 MB: four chunks of one file"
    p, rng = tmp_path_factory.mktemp('web')/'web.jsonl', np.random.default_rng(0)
    words = np.array([w for _ in range(200) for w in article(rng).split()], object)
    write_rows(p, (dict(id=i, text=' '.join(words[rng.integers(0, len(words), 300)])) for i in range(1200)))
    return p

jobs.CHUNK = 600_000         # characters: several chunks of little text
FLOW2LAB = [sys.executable, '-c', 'import sys; from flow2lab import jobs; from flow2lab.cli import main; '
            'jobs.CHUNK = 600_000; sys.exit(main())']

def left(folder):
    "Scratch files that somebody left behind"
    if not folder.exists(): return []
    return sorted(str(f.relative_to(folder)) for f in folder.rglob('*') if 'tmp' in f.name)

def state(folder):
    "What two equal corpora have in common"
    return {k: v for k,v in corpus.manifest(folder).items() if k in ('hash', 'files', 'documents')}

def says(capsys, *argv, part):
    "The command fails with a sentence that holds `part`"
    assert main([str(a) for a in argv])==2
    err = capsys.readouterr().err
    assert part in err and 'Traceback' not in err, err

@pytest.fixture(scope='session')
def prepared(web, tmp_path_factory):
    return corpus.prepare(web, tmp_path_factory.mktemp('made')/'corpus', language='', workers=1)

@real
def test_known_duplicates(tmp_path, capfd):
    lines = (shared/'neardup_news/articles.train').read_text().splitlines()
    rows = [dict(zip(('id', 'text'), line.split(' ', 1))) for line in lines]
    write_rows(tmp_path/'news.jsonl', rows)
    assert main(['corpus', 'dedup', str(tmp_path/'news.jsonl'), '--json'])==0
    out = capfd.readouterr().out
    got = json.loads(out)
    truth = {frozenset(l.split()) for l in (shared/'neardup_news/articles.truth').read_text().splitlines()}
    found = {frozenset(p) for p in got['near']}
    assert out.count('\n')==1
    assert truth<=found and len(found-truth)<=5
    assert got['documents']==len(rows) and got['kept']==len(rows)-len(found)-got['exact']

@real
def test_real_text_to_a_trained_model(tmp_path, capfd):
    "Both kinds of pack of real text fill 98% of their places, and training takes them"
    def run(*a):
        rc, said = main([*map(str, a), '--json']), capfd.readouterr()
        assert rc==0, said.err
        return json.loads(said.out)
    leak = next(json.loads(l) for l in open(shared/'gsm8k/test.jsonl'))['question']
    (tmp_path/'leak.txt').write_text('\n'.join([
        leak+' So they said, and that was the end of the matter, as it is told to this day. '*3,
        article(np.random.default_rng(1))]))
    c = run('corpus', 'prepare', f'{shared}/webtext=2', f'{shared}/gutenberg=1', tmp_path/'leak.txt',
            '--out', tmp_path/'c', '--rules', 'encoding,boilerplate',
            '--against', f'gsm8k={shared}/gsm8k/test.jsonl')
    by = {Path(s['name']).name: s for s in c['report']['sources']}
    assert by['leak.txt']['removed']['contamination']==1 and abs(by['webtext']['share']/by['gutenberg']['share']-2)<.05
    t = run('tokenizer', 'train', tmp_path/'c', '--out', tmp_path/'tok', '--vocab', '2048')
    assert t['ok'] and t['vocab']==2048
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from flow2lab.packing import pack
    from flow2lab.train import fit
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=2048, hidden_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                         intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=256))
    for how in ('contiguous', 'first_fit'):
        p = run('pack', tmp_path/'c', '--tokenizer', tmp_path/'tok', '--out', tmp_path/how,
                '--seq-len', 256, '--how', how)
        assert p['efficiency']>=.98 and p['documents']==c['documents']
        k = packs.load_pack(tmp_path/how, AutoTokenizer.from_pretrained(tmp_path/'tok'))
        rows, valid = k.split(.05)
        r = fit(model, None, rows, dict(lr=3e-3, tokens=40_000, batch_tokens=2048), valid=valid, progress=False)
        assert r.status=='ok' and r.steps[-1]['loss']<r.steps[0]['loss']
    i = int(np.bincount(k.index[:,0]//256).argmax())            # the fullest row
    row = k.row(i)
    # positions restart at each document, in both ways to use a fitted pack
    mb = pack([rows[i] for i in range(3)])
    starts = {int(s)-256*i for s,l in k.index if s//256==i}
    inside = {int(s)-256*i+j for s,l in k.index if s//256==i for j in range(l)}
    begun = {int(p) for p in np.flatnonzero(row['position_ids']==0)}
    assert len(starts)>1 and starts==begun & inside
    assert (mb['position_ids']==0).sum()==3

def test_workers_make_no_difference(web, prepared, tmp_path):
    assert state(corpus.prepare(web, tmp_path/'c', language='', workers=3).folder)==state(prepared.folder)

def test_kill_and_go_on(web, prepared, tmp_path):
    "Killed when the first chunk is there: the same command makes the same corpus and does not clean that chunk again"
    out = tmp_path/'c'
    cmd = [*FLOW2LAB, 'corpus', 'prepare', str(web), '--out', str(out), '--language', 'any', '--workers', '1']
    p = subprocess.Popen(cmd, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (first := [*out.glob('stages/*/00000.parquet')]) and p.poll() is None: time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()
    assert not (out/'manifest.json').exists()
    before = first[0].stat().st_mtime_ns
    assert subprocess.run(cmd, capture_output=True).returncode==0
    assert state(out)==state(prepared.folder) and first[0].stat().st_mtime_ns==before and not left(out)

@pytest.mark.parametrize('limit', [200_000, 600_000])
def test_disk_full(web, prepared, tmp_path, limit):
    "Room for no chunk, or for the chunks but not for the shard: a sentence, nothing half-written; " \
    "with room the same command goes on"
    out = tmp_path/'c'
    cmd = [*FLOW2LAB, 'corpus', 'prepare', str(web), '--out', str(out), '--language', 'any', '--workers', '2']
    r = subprocess.run(cmd, capture_output=True, text=True,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert r.returncode==2 and 'cannot write' in r.stderr and 'Traceback' not in r.stderr, r.stderr
    assert not (out/'manifest.json').exists() and not left(out)
    before = {f: f.stat().st_mtime_ns for f in out.glob('stages/*/*.parquet')}
    assert subprocess.run(cmd, capture_output=True).returncode==0
    assert state(out)==state(prepared.folder) and all(f.stat().st_mtime_ns==t for f,t in before.items())

def huge(p): p.write_bytes(b'{"text": "' + b'word '*20_000_000 + b'"}\n')
def binary(p):
    p.with_suffix('.bin').write_bytes(bytes(range(256))*40)
    p.write_text('{"text": "fine"}\n')

# what is said -> what writes such a file
hostile = {'empty, no rows': lambda p: p.write_text(''), 'longer than 64 MiB. Split it': huge,
           'not UTF-8 (byte 0xE9': lambda p: p.write_bytes('{"text": "caf\xe9"}\n'.encode('latin-1')),
           'web.bin:1: a NUL byte at column 1: not text': binary,
           'no field "text". Its fields: txt': lambda p: p.write_text('{"txt": "a"}\n'),
           'invalid JSON at column': lambda p: p.write_text('{"text": "a"}\n{"text": \n')}

@pytest.mark.parametrize('part', hostile)
def test_hostile_input(part, tmp_path, capsys):
    (tmp_path/'in').mkdir()
    hostile[part](tmp_path/'in/web.jsonl')
    says(capsys, 'corpus', 'prepare', tmp_path/'in', '--out', tmp_path/'out', part=part)
    assert not (tmp_path/'out/manifest.json').exists() and not left(tmp_path/'out')

def test_users_mistakes(tmp_path, prepared, capsys):
    (tmp_path/'none').mkdir()
    for argv,part in [(('corpus',), 'say what to do'),
                      (('corpus', 'prepair', 'x'), 'Did you mean "prepare"'),
                      (('corpus', 'prepare'), 'name a source'),
                      (('corpus', 'prepare', 'nowhere.txt', '--out', tmp_path/'o'), 'no such file'),
                      (('corpus', 'prepare', tmp_path/'none', '--out', tmp_path/'o'), 'an empty folder'),
                      (('corpus', 'prepare', 'c4_english', '--out', tmp_path/'o'),
                       'Say how many documents with --limit'),
                      (('corpus', 'prepare', prepared.folder), 'with --out'),
                      (('corpus', 'stats', tmp_path/'none'), 'no corpus'),
                      (('tokenizer', 'train', prepared.folder, '--out', tmp_path/'t', '--vocab', '60000'),
                       'the text allows only'),
                      (('tokenizer', 'train', prepared.folder, '--out', tmp_path/'t', '--vocab', '100'),
                       'Set 512 or more'),
                      (('tokenizer', 'train', prepared.folder, '--out', tmp_path/'t', '--kind', 'words'),
                       'Known: bytes, sentencepiece'),
                      (('pack', prepared.folder, '--out', tmp_path/'p'), '--tokenizer is missing')]:
        says(capsys, *argv, part=part)
    assert sorted(f.name for f in tmp_path.iterdir())==['none']

def test_stale_things_are_refused(web, prepared, tmp_path, capsys):
    "A corpus changed under its manifest, and a pack by another tokenizer"
    c = corpus.prepare(web, tmp_path/'c', language='', limit=300, workers=1).folder
    a, b = (tokenizer.make_tokenizer(c, tmp_path/n, vocab=v) for n,v in (('a', 512), ('b', 600)))
    p = packs.pack_corpus(c, a, tmp_path/'p', seq_len=128, workers=1)
    with pytest.raises(UserError, match='packed with another tokenizer'): packs.load_pack(p.folder, b)
    shard = next(c.glob('shards-*/*'))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1]+b'?')
    says(capsys, 'pack', c, '--tokenizer', tmp_path/'a', '--out', tmp_path/'q',
         part='changed after the corpus was prepared')
    assert not (tmp_path/'q').exists()
    corpus.prepare(web, c, language='', limit=300, workers=1)
    assert shard.read_bytes()==whole

# chunks of the usual size
BIG = [sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())']
def peak(cmd):
    "Largest resident size (bytes) of any process that `cmd` starts"
    code = ('import resource, subprocess, sys; r = subprocess.run(sys.argv[1:]); '
            'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(r.returncode)')
    r = subprocess.run([sys.executable, '-c', code, *cmd], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    return int(r.stdout.split()[-1])*1024

@pytest.mark.skipif(os.environ.get('FLOW2LAB_SLOW')!='1',
                    reason='slow: set FLOW2LAB_SLOW=1 to prepare, tokenize and pack 1 GB (some 10 minutes)')
def test_memory_does_not_grow(web, tmp_path):
    "1 GB of varied text takes at most 300 MB more than 2 MB do, in every process of every stage"
    big, rng = tmp_path/'big.jsonl', np.random.default_rng(2)
    words = np.array(WORDS+[w for l in open(web).readlines()[:300] for w in json.loads(l)['text'].split()], object)
    with open(big, 'w') as f:
        while f.tell()<1e9: f.write(json.dumps(dict(text=' '.join(words[rng.integers(0, len(words), 400)])))+'\n')
    made = corpus.prepare(web, tmp_path/'t', language='', limit=0)
    tokenizer.make_tokenizer(made.folder, tmp_path/'tok', vocab=2048)
    def command(how, src, out):
        c = str(tmp_path/f'c{out}')
        if how=='prepare': return [*BIG, 'corpus', 'prepare', str(src), '--out', c, '--language', 'any']
        to = str(tmp_path/f'{how}{out}')
        return [*BIG, 'pack', c, '--tokenizer', str(tmp_path/'tok'), '--out', to, '--how', how]
    grown = {how: peak(command(how, big, 'big'))-peak(command(how, web, 'small'))
             for how in ('prepare', 'contiguous', 'first_fit')}
    print({k: f'{v/1e6:.0f} MB' for k,v in grown.items()})
    assert max(grown.values())<=300e6, grown
