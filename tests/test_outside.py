"A researcher's own notebook, outside the package: what it adds is at home everywhere"
import json, os, subprocess, sys
from pathlib import Path
import pytest
from flow2lab.files import project_root

ROOT = project_root()
CELLS = [
    'from flow2lab.axes import arch, backend, method, objective, quantizer, shape, task',
    '''from flow2lab.certificate import low_rank, scaled
from flow2lab.methods import lora

@method(title='OLoRA', count=lora.count, rates=lora.rates, tiny=lora.tiny,
        checks=[scaled(lambda a: a.alpha/a.r), low_rank()])
def olora(r:int=8, alpha:float=16, targets='all-linear'):
    "LoRA whose factors start orthonormal: r (in + out) per layer"
    from peft import LoraConfig
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights='olora',
                      task_type='CAUSAL_LM')''',
    '''from flow2lab.nano import nano_math

@task
class my_sums(nano_math):
    "Sums of my own"
    objective = 'smoothed\'''',
    '''from flow2lab.train import labels

@objective
class smoothed(labels):
    "Labels, each step's loss a little larger"
    def loss(self, model, mb, n, slices=True): return 1.01*super().loss(model, mb, n, slices)''',
    '''from flow2lab.names import QuantizationSpec
from flow2lab.quantize import mark_quantized, nf4

@quantizer(usual=QuantizationSpec('MYNF4', weights=4, group=64, format='nf4'),
           trains=True, saves=True, library='bitsandbytes')
def my_nf4(model, calibration=None, /, head:str='fp32'):
    "NF4 under a name of my own"
    return mark_quantized(nf4(model, head=head), 'my_nf4', dict(head=head))''',
    '''@arch(sizes=dict(nano=dict(d=64, layers=2)), rates=dict(nano=2e-3), mixers=('attention',),
      model_types=('llama',))
def shallow(size:str='nano', vocab:int=0, context:int=0):
    "Two layers of Llama"
    from transformers import LlamaConfig
    s = shallow.sizes[size]
    return LlamaConfig(vocab_size=vocab or 512, hidden_size=s['d'], num_hidden_layers=s['layers'],
                       num_attention_heads=2, num_key_value_heads=2, intermediate_size=128,
                       max_position_embeddings=context or 512,
                       bos_token_id=None, eos_token_id=0, pad_token_id=1, tie_word_embeddings=True)''',
    '''from flow2lab.hf import hf

@backend(quantizes=True)
class my_hf(hf): "transformers, called by another name"''',
    '''@shape
def frage(r):
    "frage, antwort: a question and its answer in German"
    if 'frage' in r: return dict(messages=[dict(role='user', content=r.pop('frage')),
                                           dict(role='assistant', content=r.pop('antwort'))])''']
ADDED = dict(method='olora', task='my_sums', objective='smoothed', quantizer='my_nf4', arch='shallow', backend='my_hf',
             shape='frage')

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A notebook of a user's, and the command line with it"
    home = tmp_path_factory.mktemp('mine')
    def write(cells):
        def cell(source): return dict(cell_type='code', metadata={}, outputs=[], execution_count=None, source=source)
        code = [cell('#| export\n'+c) for c in cells]
        prose = dict(cell_type='markdown', metadata={}, source='# Mine')
        cells = [prose, cell('raise ValueError("not exported")'), *code]
        nb = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (home/'mine.ipynb').write_text(json.dumps(nb))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'FLOW2LAB_PLUGINS': str(home/'mine.ipynb'),
           'FLOW2LAB_RESULTS': str(home/'results'), 'FLOW2LAB_OUTPUTS': str(home/'outputs')}
    def python(code, *args):
        cmd = [sys.executable, '-c', code, *map(str, args)]
        return subprocess.run(cmd, capture_output=True, text=True, cwd=ROOT, env=env)
    def cli(*args):
        r = python('import sys; from flow2lab.cli import main; sys.exit(main())', *args, '--json')
        assert r.returncode==0, r.stderr[-1500:]
        return json.loads(r.stdout)
    write(CELLS)
    cli.home, cli.write, cli.python = home, write, python
    return cli

def test_listed(lab):
    found = lab('list')
    for axis,name in ADDED.items(): assert name in found[axis], axis

def test_trained_certified_quantized_named(lab):
    "Method, task, objective and quantizer of a user's in one run"
    m = lab('run', 'base=micro', 'task=my_sums', 'task_args.n=60', 'method=olora', 'method_args.r=2', 'train.lr=5e-3',
            'quant=my_nf4', 'eval=my_sums:10')
    assert m['status']=='ok' and m['certificate']['method']=='olora' and m['certificate']['rank']<=2
    assert m['name']=='micro-my_sums_SFT_OLoRA2_MYNF4_w4_headfp32'
    assert m['metrics']['my_sums/accuracy']['n']==10
    env = json.loads(next((lab.home/'results'/'runs').glob('*OLoRA2*/env.json')).read_text())
    assert list(env['plugins'])==['mine.ipynb']

def test_own_backend_shape_and_architecture(lab):
    m = lab('run', 'base=micro', 'backend=my_hf', 'eval=my_sums:10')
    assert m['status']=='ok' and m['metrics']['my_sums/accuracy']['n']==10
    rows = lab.home/'rows.jsonl'
    rows.write_text(''.join(json.dumps(dict(frage=f'{i}+1?', antwort=str(i+1)))+'\n' for i in range(40)))
    assert lab('data', 'check', rows)['shape']=='frage'
    m = lab('run', 'base=micro', 'task=chat', f'task_args.path={rows}', 'method=lora', 'train.lr=1e-3')
    assert m['status']=='ok'
    env = json.loads(next((lab.home/'results'/'runs').glob('micro-base*/env.json')).read_text())
    assert list(env['plugins'])==['mine.ipynb']          # also where the backend alone is from outside
    assert lab('estimate', 'base=shallow-nano')['parameters']>10_000
    m = lab('run', 'base=shallow-nano', 'task=nano_text', 'train.tokens=4000', 'train.seq_len=128',
            'train.loss_on=all', 'train.batch_tokens=1024')
    assert m['status']=='ok' and m['name'].startswith('shallow-nano-nano_text_PT')

def test_in_tables_rates_and_the_site(lab):
    "compare, the rates of a scale, the page of axes"
    names = [r['name'] for r in lab('compare', lab.home/'results'/'runs', '--metric', 'my_sums/accuracy')['rows']]
    assert any('OLoRA2' in n for n in names)
    code = ('from flow2lab.scales import scale_of, trained_spec; s = trained_spec(scale_of("nano"), "olora"); '
            'print(s.train.lr); from flow2lab.site import axes_page; page = axes_page({}); '
            f'print(all(f"| {{n}} |" in page for n in {[*ADDED.values()]}))')
    r = lab.python(code)
    assert r.stdout.split()==['0.01', 'True'], r.stderr[-800:]

def test_another_source_is_another_experiment(lab):
    "The id of a Spec that uses an entry from outside follows its source; the others' ids do not"
    code = ('from flow2lab.spec import Spec; t = dict(task="nano_math", eval=dict(nano_math=5)); '
            'print(Spec(method="olora", **t).id, Spec(method="lora", **t).id)')
    before = lab.python(code).stdout.split()
    lab.write([c.replace('1.01', '1.02') for c in CELLS])
    after = lab.python(code).stdout.split()
    lab.write(CELLS)
    assert len(before)==2 and before[0]!=after[0] and before[1]==after[1]
    assert lab.python(code).stdout.split()==before

def test_a_mistake_in_it_is_named(lab):
    "File, cell and line; exit code 2 and no traceback"
    lab.write([*CELLS, 'x = 1\ny = x/0'])
    r = lab.python('import sys; from flow2lab.cli import main; sys.exit(main())', 'list', 'method')
    lab.write(CELLS)
    assert r.returncode==2 and 'Traceback' not in r.stderr
    assert 'mine.ipynb' in r.stderr and 'division by zero' in r.stderr
