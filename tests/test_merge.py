"`flow2lab merge` as a process: checked, whole or not at all, and a refusal costs a sentence"
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from flow2lab.spec import Spec
from flow2lab.methods import attach
from flow2lab.adapters import save_adapter
from flow2lab.dequantize import relative_error
from flow2lab.load import load_tokenizer
from flow2lab.runs import load_base, open_model
from flow2lab.tiny import logits_of

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.arange(2, 40)[None]

def merge(*args):
    code = 'import sys; from flow2lab.cli import main; sys.exit(main())'
    return subprocess.run([sys.executable, '-c', code, 'merge', *map(str, args)], capture_output=True, text=True,
                          cwd=ROOT, timeout=200, env={**os.environ, 'OMP_NUM_THREADS': '1'})

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
        f = tmp_path_factory.mktemp('run'+q)
        save_adapter(m, f/'adapter', s, tok=load_tokenizer('micro'))
        out[q] = f, logits_of(m.eval(), IDS)
    return out

@pytest.mark.parametrize('q,args,dtype,allowed', [
    ('', [], 'fp32', 1e-6), ('', ['--base-dtype', 'bf16'], 'bf16', 1e-2),
    ('nf4', ['--base-dtype', 'fp32'], 'fp32', 1e-6), ('nf4', [], 'NF4_w4_headfp32', 1e-6)])
def test_merged_computes_what_the_adapter_does(adapters, tmp_path, q, args, dtype, allowed):
    folder, want = adapters[q]
    r = merge(folder, '--out', tmp_path/'m', '--json', *args)
    assert r.returncode==0, r.stderr[-800:]
    got = json.loads(r.stdout)
    assert (got['dtype'], got['allowed'])==(dtype, allowed) and got['error']<=allowed
    assert json.loads((tmp_path/'m/merge.json').read_text())['error']==got['error']
    model, tok = open_model(tmp_path/'m')
    assert relative_error(logits_of(model, IDS), want) <= dict(fp32=2e-6, bf16=1e-2).get(dtype, .5)
    assert tok.chat_template and not hasattr(model, 'peft_config')
    # rounded again, and merge.json says by how much
    if q and not args: assert got['requantized']>1e-3 and model.quantized_by=='nf4'

def hostile_folders(adapter, tmp_path):
    "A folder with something precious, an adapter whose base was changed meanwhile, and one that PEFT alone wrote"
    mine, changed, plain = (tmp_path/n for n in ('mine', 'changed', 'plain'))
    for f in (mine, changed, plain): f.mkdir()
    (mine/'precious.txt').write_text('x')
    for f in adapter.iterdir(): (changed/f.name).write_bytes(f.read_bytes())
    info = json.loads((changed/'flow2lab.json').read_text())
    info['weights']['linear'] = '0'*16
    (changed/'flow2lab.json').write_text(json.dumps(info))
    (plain/'adapter_config.json').write_text('{}')
    return mine, changed, plain

def test_refusals(adapters, tmp_path):
    folder, _ = adapters['']
    mine, changed, plain = hostile_folders(folder/'adapter', tmp_path)
    out = tmp_path/'y'
    cases = [([folder, '--out', mine],                    'is no merge of ours'),
             ([changed, '--out', out],                    "are not that base's"),
             ([folder, '--base', 'nano', '--out', out],   'not that base'),
             (['no/such/adapter'],                        'no adapter here'),
             (['nano'],                                   'no adapter here'),
             ([plain],                                    'cannot be checked'),
             ([folder, '--base-dtype', 'int8'],           'base_dtype=int8')]
    for args, says in cases:
        r = merge(*args)
        assert r.returncode==2 and says in r.stderr and 'Traceback' not in r.stderr, (args, r.stderr[-500:])
    assert (mine/'precious.txt').exists() and not out.exists()
