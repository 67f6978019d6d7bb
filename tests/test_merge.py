"`flow2lab merge` as a process: checked, whole or not at all, and a refusal costs a sentence"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from flow2lab.spec import Spec
from flow2lab.methods import attach
from flow2lab.adapters import save_adapter
from flow2lab.load import load_tokenizer
from flow2lab.runs import load_base, open_model

ROOT = Path(__file__).resolve().parents[1]
def merge(*args):
    return subprocess.run([sys.executable, '-c', 'import sys; from flow2lab.cli import main; sys.exit(main())',
                           'merge', *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '1'})
x = torch.arange(2, 40)[None]
def logits(m):
    with torch.no_grad(): return m(input_ids=x).logits.float()
def rel(a, b): return ((a-b).norm()/b.norm()).item()

@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    "{'': an adapter on micro, 'nf4': on micro quantized}, as folders of runs, with the logits of each"
    out = {}
    for q in ('', 'nf4'):
        s = Spec(base='micro', task='nano_math', method='lora', base_quant=q,
                 base_quant_args=dict(head='fp32') if q else {})
        m = attach(load_base(s), s)
        torch.manual_seed(0)
        for n,p in m.named_parameters():
            if 'lora_B' in n: p.data.normal_(0, .05)
        f = tmp_path_factory.mktemp('run'+q); save_adapter(m, f/'adapter', s, tok=load_tokenizer('micro'))
        out[q] = f, logits(m.eval())
    return out

@pytest.mark.parametrize('q,args,dtype,allowed', [
    ('', [], 'fp32', 1e-6), ('', ['--base-dtype', 'bf16'], 'bf16', 1e-2),
    ('nf4', ['--base-dtype', 'fp32'], 'fp32', 1e-6), ('nf4', [], 'NF4_w4_headfp32', 1e-6)])
def test_merged_computes_what_the_adapter_does(adapters, tmp_path, q, args, dtype, allowed):
    folder, want = adapters[q]
    r = merge(folder, '--out', tmp_path/'m', '--json', *args); assert r.returncode==0, r.stderr[-800:]
    got = json.loads(r.stdout)
    assert ((got['dtype'], got['allowed'])==(dtype, allowed) and got['error']<=allowed
            and json.loads((tmp_path/'m/merge.json').read_text())['error']==got['error'])
    model, tok = open_model(tmp_path/'m'); e = rel(logits(model), want)
    assert (e<=(2e-6 if dtype=='fp32' else 1e-2 if dtype=='bf16' else .5)
            and tok.chat_template and not hasattr(model, 'peft_config'))
    # rounded again, and that is said
    if q and not args: assert got['requantized']>1e-3 and model.quantized_by=='nf4'

def test_refusals(adapters, tmp_path):
    folder, _ = adapters['']
    mine = tmp_path/'mine'; mine.mkdir(); (mine/'precious.txt').write_text('x')
    hostile = tmp_path/'changed'; hostile.mkdir()
    for f in (folder/'adapter').iterdir(): (hostile/f.name).write_bytes(f.read_bytes())
    info = json.loads((hostile/'flow2lab.json').read_text()); info['weights']['linear'] = '0'*16
    (hostile/'flow2lab.json').write_text(json.dumps(info))
    plain = tmp_path/'plain'; plain.mkdir(); (plain/'adapter_config.json').write_text('{}')
    for args, says in (([folder, '--out', mine], 'is no merge of ours'),
                       ([hostile, '--out', tmp_path/'y'], "are not that base's"),
                       ([folder, '--base', 'nano', '--out', tmp_path/'y'], 'not that base'),
                       (['no/such/adapter'], 'no adapter here'), (['nano'], 'no adapter here'),
                       ([plain], 'cannot be checked'), ([folder, '--base-dtype', 'int8'], 'base_dtype=int8')):
        r = merge(*args)
        assert r.returncode==2 and says in r.stderr and 'Traceback' not in r.stderr, (args, r.stderr[-500:])
    assert (mine/'precious.txt').exists() and not (tmp_path/'y').exists()
