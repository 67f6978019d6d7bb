"Data files as people really have them: the real ones of ../shared/data, and hostile ones"
import gzip, json, os, signal, subprocess, sys, textwrap, time
import pytest
from flow2lab import containers
from flow2lab.values import UserError
from flow2lab.files import project_root
from flow2lab.rows import raw_rows
from flow2lab.shapes import read_rows
from flow2lab.check import check, convert, write_rows
from flow2lab.contamination import split
from flow2lab.inventory import inventory, LIMITS

shared = project_root().parent/'shared'/'data'
real = pytest.mark.skipif(not shared.is_dir(), reason='the real data of ../shared/data is not here')

def complaint(f, *args, **kw):
    with pytest.raises(UserError) as e: list(f(*args, **kw))
    return str(e.value)

def put(folder, name, content):
    p = folder/name
    p.write_bytes(content.encode() if isinstance(content, str) else content)
    return p

# ---- real files

@real
@pytest.mark.parametrize('path,container,shape,rows', [
    ('alpaca/alpaca_en_demo.json', 'json', 'alpaca', 514), ('alpaca/litgpt_alpaca_fixture.json', 'json', 'alpaca', 23),
    ('dolly/dolly_sample.jsonl', 'jsonl', 'dolly', 81), ('dolly/litgpt_dolly_fixture.json', 'json', 'dolly', 12),
    ('preference/dpo_en_demo.json', 'json', 'preference', 161), ('preference/kto_en_demo.json', 'json', 'kto', 141),
    ('gsm8k/test.jsonl', 'jsonl', 'gsm8k', 655), ('gsm8k/train_first1500.jsonl', 'jsonl', 'gsm8k', 1500),
    ('webtext/c4_demo.jsonl', 'jsonl', 'text', 143), ('webtext/wiki_demo.txt', 'text', 'text', 30)])
def test_real_file(path, container, shape, rows):
    r = check(shared/path)
    assert (r.container, r.shape, r.rows, r.bad, r.ok) == (container, shape, rows, 0, True)
    assert len(list(read_rows(shared/path))) == rows

@real
def test_nothing_of_a_row_is_lost():
    for (_,raw),r in zip(raw_rows(shared/'gsm8k/test.jsonl'), read_rows(shared/'gsm8k/test.jsonl'), strict=True):
        assert [m['content'] for m in r['messages']] == [raw['question'], raw['answer']]
    for (_,raw),r in zip(raw_rows(shared/'preference/dpo_en_demo.json'),
                         read_rows(shared/'preference/dpo_en_demo.json'), strict=True):
        assert [m['content'] for m in r['prompt']] == [m['value'] for m in raw['conversations']]
        assert (r['chosen'], r['rejected']) == (raw['chosen']['value'], raw['rejected']['value'])

@real
def test_line_numbers_in_a_json_list():
    path = shared/'alpaca/alpaca_en_demo.json'
    lines = path.read_text(encoding='utf-8').split('\n')
    for n,row in raw_rows(path):
        assert (lines[n-1].strip() == '{'
                and json.loads('{' + lines[n].strip().rstrip(',') + '}') == dict(instruction=row['instruction']))

@real
def test_benchmarks_are_pointed_to_their_task():
    assert 'Use the task squad_v2' in complaint(read_rows, shared/'squad_v2/dev.json')
    assert 'Use the task arc' in complaint(read_rows, shared/'arc/ARC-Challenge-Dev.jsonl')
    assert ('no known shape has the fields id, name, instruction'
            in complaint(read_rows, shared/'alpaca/seed_tasks.jsonl'))

@real
def test_weights_are_not_data():
    assert 'not text' in complaint(read_rows, shared/'weights/stories260K/hf/model.safetensors')

@real
def test_containers_of_real_rows_agree(tmp_path):
    import pandas as pd
    src = shared/'dolly/dolly_sample.jsonl'
    df, want = pd.read_json(src, lines=True), list(read_rows(src))
    df.to_parquet(tmp_path/'d.parquet'); df.to_csv(tmp_path/'d.csv', index=False)
    df.to_json(tmp_path/'d.json', orient='records')
    df.to_json(tmp_path/'columns.json'); df.to_json(tmp_path/'d.jsonl.gz', orient='records', lines=True)
    for name in ('d.parquet', 'd.csv', 'd.json', 'columns.json', 'd.jsonl.gz'):
        assert list(read_rows(tmp_path/name)) == want, name

@real
def test_split_of_real_rows_stays():
    rows = list(read_rows(shared/'gsm8k/train_first1500.jsonl'))
    train, valid = split(rows)
    assert 105 <= len(valid) <= 195                                # 150, four standard deviations of 11.6
    assert split(rows[:700])[1] == [r for r in rows[:700] if r in valid]

# ---- the sets that come with the lab

def test_shipped_sets():
    got = {n: check(n+'.jsonl').rows for n in ('quotes_train', 'train', 'valid', 'test')}
    assert got == dict(quotes_train=20, train=80, valid=15, test=15)
    for n in ('train', 'valid', 'test'):
        for _,r in raw_rows(n+'.jsonl'):
            assert set(r)=={'text'} and r['text'].startswith('### User\n') and '\n\n### Assistant\n' in r['text']
    assert all(set(r)=={'input', 'output'} for _,r in raw_rows('sample_training_data.jsonl'))
    assert all(r['author'] in r['response'] for _,r in raw_rows('quotes_train.jsonl'))

def test_code_in_shipped_answers_compiles():
    blocks = [b.removeprefix('python\n') for n in ('train', 'valid', 'test') for r in read_rows(n+'.jsonl')
              for m in r['messages'] for b in m['content'].split('```')[1::2] if b.startswith('python')]
    assert len(blocks) >= 5
    for b in blocks: compile(b, 'answer', 'exec')

# ---- hostile files

def test_the_message_of_the_readme(tmp_path):
    p = put(tmp_path, 'train.jsonl', '{"text": "one"}\n{"a": 12\n{"text": "three"}\n')
    want = ('train.jsonl:2: invalid JSON at column 9 (missing "}"). 1 of 3 rows bad. Nothing written. '
            'Fix it, or use --skip-bad of data convert or corpus.')
    assert complaint(read_rows, p) == check(p).message == want

def test_skip_bad_says_so(tmp_path, capsys):
    p = put(tmp_path, 'a.jsonl', '{"text": "one"}\n{"text": ""}\n')
    assert list(read_rows(p, skip_bad=True)) == [dict(text='one')]
    assert capsys.readouterr().err == 'a.jsonl:2: empty text. 1 of 2 rows skipped.\n'
    assert 'Fix it.' in complaint(read_rows, put(tmp_path, 'b.jsonl', '{"text": ""}'), skip_bad=True)

@pytest.mark.parametrize('name,content,want', [
    ('a.jsonl', '', 'a.jsonl: empty, no rows'), ('a.json', '[]', 'empty, no rows'),
    ('a.csv', 'prompt,response\n', 'empty, no rows'), ('a.txt', ' \n\n', 'empty, no rows'),
    ('a.jsonl', '{"text": "caf\xe9"}'.encode('latin-1'), 'a.jsonl:1: not UTF-8 (byte 0xE9 at column 14)'),
    ('a.json', '[\n{"text": "caf\xe9"}]'.encode('latin-1'), 'a.json:2: not UTF-8 (byte 0xE9 at column 14)'),
    ('a.csv', 'prompt,response\na,caf\xe9\n'.encode('latin-1'), 'a.csv:2: not UTF-8'),
    ('a.txt', 'a\0b', 'a.txt:1: a NUL byte at column 2'),
    ('a.csv', 'prompt,response\na,b\0\n', 'NUL'), ('a.jsonl', '{"text": "a\0b"}', 'a NUL byte at column 12'),
    ('a.jsonl', '{"text": "a"}'.encode('utf-16'), 'UTF-16'),
    ('a.jsonl', '["a"]', 'a row is an object {...}, this is a list'),
    ('a.jsonl', '{"text": '+'['*100_000+'}', 'nested more than 64 deep'), ('a.json', '['*100_000, 'nested too deeply'),
    ('a.json', '[{"text": "a"},\n {"text": "b"\n {"text": "c"}]', 'a.json:3: invalid JSON at column 2 (missing ","'),
    ('a.json', '[{"text": "a"},\n {"text": "b"}', 'a.json:2: invalid JSON at column 15 (missing "]")'),
    ('a.json', '[{"text": "a"},]', 'a comma too many'), ('a.json', '[{"text": "a"}] x', 'something follows'),
    ('a.json', '"text"', 'a row is an object'),
    ('a.jsonl', '{\n"text": "a"\n}', 'name a file that holds one list .json'),
    ('a.csv', 'prompt,response\na\n', 'a.csv:2: 1 fields where the header has 2'),
    ('a.csv', 'prompt,response\na,b,c\n', '3 fields where the header has 2'),
    ('a.csv', 'prompt,answer\na,b\n', 'no known shape has the fields prompt, answer'),
    ('a.csv', 'prompt,prompt\na,b\n', 'two with the same'),
    ('a.csv', 'prompt,response\na,"b\nc,d\n', 'broken CSV'),
    ('a.csv', 'prompt,response\na,\n', 'a.csv:2: empty answer'),
    ('a.parquet', b'PAR1 and nothing else', 'not a sound Parquet file'), ('a.parquet', b'', 'size is 0 bytes'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "a"}\n'*9999, mtime=0)[:-60], 'the gzip stream stops in the middle'),
    ('a.jsonl.gz', gzip.compress(b'{"text": "a"}\n'*99, mtime=0)[:-6]+b'000000', 'damaged gzip'),
    ('a.zip', b'PK\x03\x04....', 'a zip archive'),
    ('a.jsonl', '{"prompt": "a", "response": 4}', 'is a number, not text'),
    ('a.jsonl', '{"messages": "hi"}', 'messages is a string'),
    ('a.jsonl', '{"messages": []}', 'empty messages'), ('a.jsonl', '{"text": "\\ud800"}', 'surrogate'),
    ('a.jsonl', '{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', 'a.jsonl:2: the id 1 has been used before'),
    ('a.jsonl', '{"text": "a"}\n{"prompt": "a", "response": "b"}',
     'mixed shapes: prompt_response here, text since line 1'),
    ('a.jsonl', '{"prompt": "a", "chosen": "b", "rejected": "b"}', 'chosen and rejected are the same'),
    ('a.jsonl', '{"messages": [{"role": "user", "content": "a"}]}', 'no answer: the last message is from user')])
def test_bad_file(tmp_path, name, content, want):
    p = put(tmp_path, name, content)
    said = complaint(read_rows, p)
    assert want in said and said.startswith(name) and 'Nothing written.' in said
    try: assert check(p).message == said
    except UserError as e: assert str(e) == said

def test_byte_order_mark_is_noted(tmp_path):
    r = check(put(tmp_path, 'a.jsonl', '\ufeff{"text": "a"}'))
    assert r.ok and 'byte order mark' in str(r)

def test_paths(tmp_path):
    (tmp_path/'loop').symlink_to(tmp_path/'loop'); (tmp_path/'lost.jsonl').symlink_to(tmp_path/'gone')
    os.mkfifo(tmp_path/'pipe')
    assert 'a link that leads nowhere' in complaint(read_rows, tmp_path/'loop')
    assert 'a link that leads nowhere' in complaint(read_rows, tmp_path/'lost.jsonl')
    assert 'not a regular file' in complaint(read_rows, tmp_path/'pipe')
    assert 'a folder, not a file' in complaint(read_rows, tmp_path)
    assert 'no such file' in complaint(read_rows, tmp_path/'none.jsonl')
    assert 'not a usable path' in complaint(read_rows, 'a'*5000)
    put(tmp_path, 'real.jsonl', '{"text": "a"}'); (tmp_path/'link').symlink_to(tmp_path/'real.jsonl')
    assert list(read_rows(tmp_path/'link')) == [dict(text='a')]

def test_a_huge_line_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, 'MAX_ROW', 1 << 20)
    p = put(tmp_path, 'a.jsonl', b'{"text": "one"}\n{"text": "' + b'x'*(5 << 20) + b'"}\n{"text": "three"}\n')
    assert complaint(read_rows, p).startswith('a.jsonl:2: longer than 1 MiB. Split it. 1 of 3 rows bad.')
    assert [r['text'] for r in read_rows(p, skip_bad=True)] == ['one', 'three']

def measured(code, *args):
    "What a process of its own prints"
    r = subprocess.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
                       capture_output=True, text=True, cwd=project_root())
    assert r.returncode==0, r.stderr
    return r.stdout.strip()

def test_memory_does_not_grow(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    row = lambda i: dict(prompt=f'{i} '+'why '*250, response=f'{i} '+'so '*330)
    small, big = 2_000, 20_000                                              # 4 MB and 40 MB
    for n in (small, big):
        write_rows(map(row, range(n)), tmp_path/f'{n}.jsonl')
        pq.write_table(pa.Table.from_pylist(list(map(row, range(n)))), tmp_path/f'{n}.parquet',
                       row_group_size=n, compression='none')
    code = '''
        import resource, sys
        from flow2lab.shapes import read_rows
        from flow2lab.check import convert
        assert sum(1 for _ in read_rows(sys.argv[1])) == int(sys.argv[2])
        if sys.argv[1].endswith('jsonl'): convert(sys.argv[1], sys.argv[1]+'.out.jsonl')
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'''
    unit = 1 if sys.platform=='darwin' else 1024
    for kind in ('jsonl', 'parquet'):
        a, b = [int(measured(code, tmp_path/f'{n}.{kind}', n))*unit for n in (small, big)]
        assert b-a < 15e6, (kind, a, b)                                     # a list of the rows would take 36 MB more

def test_imports_nothing_heavy():
    assert measured('''
        import sys
        from flow2lab.shapes import read_rows
        list(read_rows('train.jsonl'))
        print([m for m in ('torch', 'transformers', 'datasets', 'pandas', 'pyarrow') if m in sys.modules])''') == '[]'

# ---- whole or absent

def test_disk_full_leaves_the_old_file(tmp_path):
    src, dst = tmp_path/'src.jsonl', tmp_path/'dst.jsonl'
    write_rows((dict(text='x'*1000) for _ in range(1000)), src); dst.write_text('old')
    said = measured('''
        import resource, sys
        from flow2lab.values import UserError
        from flow2lab.check import convert
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try: convert(*sys.argv[1:], force=True)
        except UserError as e: print(e)''', src, dst)
    assert 'cannot write (File too large). Nothing written. Free some space' in said
    assert dst.read_text() == 'old' and sorted(os.listdir(tmp_path)) == ['dst.jsonl', 'src.jsonl']

def test_killed_while_writing_leaves_the_old_file(tmp_path):
    dst = tmp_path/'dst.jsonl'; dst.write_text('old')
    code = ('import itertools, sys; from flow2lab.check import write_rows; '
            'write_rows((dict(text=str(i)) for i in itertools.count()), sys.argv[1])')
    p = subprocess.Popen([sys.executable, '-c', code, str(dst)], cwd=project_root())
    try:
        deadline = time.time()+30
        while not any(f.stat().st_size for f in tmp_path.glob('.dst*')):
            assert time.time()<deadline and p.poll() is None; time.sleep(0.02)
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert dst.read_text() == 'old'

def test_broken_row_writes_nothing(tmp_path):
    p = put(tmp_path, 'a.jsonl', '{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(UserError, match='Nothing written'): convert(p, tmp_path/'out'/'b.jsonl')
    assert not list((tmp_path/'out').iterdir())
    assert convert(p, tmp_path/'out'/'b.jsonl.gz', skip_bad=True) == 1
    with pytest.raises(UserError, match='ends in .jsonl'): convert(p, tmp_path/'b.txt')

def test_inventory(tmp_path, monkeypatch):
    for k,d in dict(DATA='data', RESULTS='results', OUTPUTS='outputs').items():
        monkeypatch.setenv('FLOW2LAB_'+k, str(tmp_path/d))
    with pytest.raises(UserError, match='data: no such folder'): inventory()
    (tmp_path/'data').mkdir()
    assert inventory()['datasets']['count'] == 0                            # and no other folders yet
    write_rows([dict(text='a'), dict(text='b')], tmp_path/'data'/'a.jsonl')
    (tmp_path/'data'/'README.md').write_text('not data')
    run, adapter = tmp_path/'results'/'methods'/'one--0', tmp_path/'outputs'/'quotes_lora_adapter'
    run.mkdir(parents=True); adapter.mkdir(parents=True)
    (run/'metrics.json').write_text('{}')
    (adapter/'adapter_config.json').write_text('{"peft_type": "LORA", "base_model_name_or_path": "nano"}')
    inv = inventory()
    assert (inv['datasets']['count'], inv['datasets']['rows']) == (1, 2)
    assert inv['results'] == dict(runs=1, studies=dict(methods=1), bytes=2)
    assert [(a['name'], a['method'], a['base']) for a in inv['adapters']] == [('quotes_lora_adapter', 'LORA', 'nano')]
    assert inv['over'] == []
    monkeypatch.setitem(LIMITS, 'dataset', 10)
    assert inventory()['over'][0].startswith('a.jsonl: 28 B, over the 10 B of one dataset')
