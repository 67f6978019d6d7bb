"Training beside what only processes can show: kills, a full disk, memory that runs out, two processes on one step."
import json, multiprocessing as mp, os, resource, signal, socket, time
from pathlib import Path
import pytest

ctx = mp.get_context('forkserver')
ctx.set_forkserver_preload(['flow2lab.train'])        # imports only: a forked child must not inherit threads

def _model(full=False):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.set_num_threads(1); torch.manual_seed(0)
    cfg = Qwen3Config(vocab_size=320, hidden_size=32, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                      intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=1024)
    if full: return Qwen3ForCausalLM(cfg)
    return get_peft_model(Qwen3ForCausalLM(cfg), LoraConfig(r=4, target_modules='all-linear', lora_dropout=0.1))

def _samples(n=60, size=30):
    import numpy as np
    rng = np.random.default_rng(0)
    return [dict(input_ids=x, labels=x)
            for x in (rng.integers(0, 320, rng.integers(size//2, size)).tolist() for _ in range(n))]

SETTINGS = dict(lr=1e-2, epochs=6, batch_tokens=256, save_every=3, eval_every=5)

def _run(out, settings=SETTINGS, pace=0, fsize=None, memory=None, world=None, full=False, note='result.json', **kw):
    "One training in a process of its own; what it came to is written to `note`"
    if world:
        os.environ.update(RANK=str(world[0]), LOCAL_RANK=str(world[0]), WORLD_SIZE=str(world[1]),
                          MASTER_ADDR='127.0.0.1', MASTER_PORT=str(world[2]))
    import torch
    from flow2lab.values import UserError
    from flow2lab.curve import Curve
    from flow2lab.train import fit
    if pace:      # time enough to be killed in
        write = Curve.write
        Curve.write = lambda self: (write(self), time.sleep(pace))[0]
    model = _model(full)
    samples = _samples(**kw)
    if memory: resource.setrlimit(resource.RLIMIT_AS, (_vm()+memory, resource.RLIM_INFINITY))
    if fsize: resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, resource.RLIM_INFINITY))
    try: r = fit(model, None, samples, settings, out, valid=samples[:5], progress=False)
    except UserError as e: d = dict(error=str(e))
    else:
        d = dict(status=r.status, message=r.message, resumed=r.resumed,
                 steps=[{k: v for k,v in s.items() if k!='seconds'} for s in r.steps])
    if fsize: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
    (Path(out).parent/note).write_text(json.dumps(d))

def _vm(): return int(Path('/proc/self/statm').read_text().split()[0])*os.sysconf('SC_PAGE_SIZE')

def _start(out, **kw):
    p = ctx.Process(target=_run, args=(str(out),), kwargs=kw); p.start(); return p

def _done(out, **kw):
    p = _start(out, **kw); p.join(300); assert p.exitcode==0
    return json.loads((out.parent/kw.get('note', 'result.json')).read_text())

def _weights(out): return (out/'last'/'adapter_model.safetensors').read_bytes()

@pytest.fixture(scope='module')
def unkilled(tmp_path_factory):
    out = tmp_path_factory.mktemp('unkilled')/'run'
    return _done(out), _weights(out)

def _wait(cond, p, limit=120):
    end = time.time()+limit
    while time.time()<end and p.is_alive():
        if cond(): return True
        time.sleep(0.002)
    return False

def test_killed_at_several_moments_resumes_to_the_same_bits(tmp_path, unkilled):
    out, rest = tmp_path/'run', []
    lines = lambda: (out/'steps.jsonl').read_text().count('\n') if (out/'steps.jsonl').exists() else 0
    saving = lambda: any((out/'checkpoints').glob('.checkpoint-*')) if out.exists() else False
    # before any checkpoint, between two, while saving
    for when in (lambda: lines()>=1, lambda: lines()>=5, saving, lambda: lines()>=14, saving):
        p = _start(out, pace=0.05)
        assert _wait(when, p), 'the run ended before it could be killed'
        os.kill(p.pid, signal.SIGKILL); p.join(); assert p.exitcode==-signal.SIGKILL
        for c in (out/'checkpoints').glob('checkpoint-*'): assert (c/'manifest.json').exists()
        assert not (out/'last').exists()
        rest.append((lines(), sorted(x.name for x in (out/'checkpoints').glob('*'))))
    got = _done(out)
    assert got['resumed']>0 and got['status']=='ok', rest
    assert got['steps']==unkilled[0]['steps']
    assert _weights(out)==unkilled[1]
    assert ([json.loads(l)['step'] for l in (out/'steps.jsonl').read_text().splitlines()]
            ==[s['step'] for s in got['steps']])

def test_full_disk_stops_with_a_sentence_and_resumes(tmp_path, unkilled):
    out = tmp_path/'run'
    # bytes a file may have: the curve fits, the optimizer's state does not
    got = _done(out, fsize=24_000)
    assert 'the disk is full' in got['error']
    assert not list((out/'checkpoints').glob('*')) and not (out/'last').exists()
    got = _done(out)
    assert got['status']=='ok' and _weights(out)==unkilled[1]

def test_memory_that_runs_out_is_a_status(tmp_path):
    big = dict(SETTINGS, batch_tokens=400_000, epochs=1, precision='fp32', seq_len=1024)
    got = _done(tmp_path/'run', settings=big, memory=300<<20, n=500, size=900)
    assert got['status']=='oom' and 'train.micro_tokens=200000' in got['message'], got

def test_two_processes_share_a_step(tmp_path):
    s = dict(lr=1e-3, epochs=1, batch_tokens=512, precision='fp32', save_every=2)
    one = _done(tmp_path/'one'/'run', settings=s, full=True)
    with socket.socket() as k: k.bind(('127.0.0.1', 0)); port = k.getsockname()[1]
    ps = [_start(tmp_path/'two'/'run', settings=s, full=True, world=(r, 2, port), note=f'result{r}.json')
          for r in range(2)]
    for p in ps: p.join(300); assert p.exitcode==0
    two = json.loads((tmp_path/'two'/'result0.json').read_text())
    assert ([x['step'] for x in two['steps']]==[x['step'] for x in one['steps']]
            and two['steps'][-1]['tokens']==one['steps'][-1]['tokens'])
    for a,b in zip(one['steps'], two['steps']):
        for k in ('loss', 'grad_norm'): assert abs(a[k]-b[k])<1e-4*a[k]
