"What the README and the studies say comes from records that the repository holds"
import json, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
REF = ROOT/'data'/'reference'
STUDIES = [d.name for d in sorted(REF.glob('*')) if (d/'answer.json').exists()]

def test_readme_tables_are_the_reference_records():
    from flow2lab.records import load_records
    from flow2lab.compare import compare
    from flow2lab.scales import base_spec, in_domain, scale_of
    text = (ROOT/'README.md').read_text()
    for study,scale in (('methods', 'nano'), ('methods-small', 'small')):
        s = scale_of(scale); df = load_records(REF/study)
        for line in str(compare(df, metric=in_domain(s),
                                baseline=base_spec(s).name if scale=='nano' else None)).splitlines():
            assert line.strip() in text, f'README lacks: {line}'

def test_readme_speeds_are_the_reference_records():
    from flow2lab.ratios import benchmark_line
    text = (ROOT/'README.md').read_text()
    rows = [r for p in sorted((REF/'benchmarks').glob('*.json')) for r in json.loads(p.read_text())]
    assert len(rows)>30
    for r in rows:
        assert benchmark_line(r).strip() in text, f'README lacks: {benchmark_line(r)}'
        higher = r.get('higher') or '/s' in r['unit'] or r['unit']=='pairs'
        better = r['ours']/r['peer'] if higher else r['peer']/r['ours']
        assert abs(better/r['ratio']-1)<.05, r           # some sides were recorded with two digits
        assert r['hardware'] and r['versions'] and r['peer_name'], r['work']

@pytest.mark.parametrize('study', ['methods', 'architectures', 'architectures-small', 'from_scratch',
                                   'from_scratch-small'])
def test_readme_findings_are_the_records(study):
    from flow2lab.findings import finding_line
    text = (ROOT/'README.md').read_text()
    for f in json.loads((REF/study/'answer.json').read_text())['findings']: assert finding_line(f) in text

def test_readme_on_real_text_says_what_the_ranks_are():
    from flow2lab.records import load_records
    from flow2lab.compare import compare
    assert 'The hybrid and Mamba-2 are ahead of the three others' in (ROOT/'README.md').read_text()
    rows = compare(load_records(REF/'architectures-small'), metric='perplexity/bits_per_byte').rows
    rank = {n.split('-')[0]: (lo, hi) for n,lo,hi in zip(rows['name'], rows['rank_low'], rows['rank_high'])}
    assert all(rank[a][1]<rank[b][0] for a in ('hybrid', 'mamba2') for b in ('transformer', 'moe', 'mamba')), rank
    assert len({rank[b] for b in ('transformer', 'moe', 'mamba')})==1, rank

@pytest.mark.parametrize('study', STUDIES)
def test_findings_follow_from_the_records(study):
    from flow2lab.records import load_records
    from flow2lab.findings import finding
    df = load_records(REF/study)
    for f in json.loads((REF/study/'answer.json').read_text())['findings']:
        again = finding(f['claim'], df, f['better'], f['worse'], f['metric'], f['source'], f['margin'])
        assert again.verdict==f['verdict'] and abs(again.diff-f['diff'])<1e-9 and abs(again.lo-f['lo'])<1e-9

@pytest.mark.parametrize('study', STUDIES)
def test_records_name_their_hardware_and_no_machine_path(study):
    from flow2lab.records import run_folders
    for f in run_folders(REF/study):
        env = json.loads((Path(f)/'env.json').read_text())
        assert env['hardware']['cpu'] and env['versions']['torch'] and env['commit']
        for p in Path(f).glob('*.json'): assert not re.search(r'"/(home|root|work|tmp|Users)/', p.read_text()), p

@pytest.mark.parametrize('size', ['micro', 'nano'])
def test_shipped_models_are_small_and_recorded(size):
    d = ROOT/'data'/'models'/'nano'/size
    assert sum(p.stat().st_size for p in d.iterdir())<=6e6 and (d/'model.safetensors').exists()
    r = json.loads((d/'record.json').read_text())
    assert r['parameters']>1e6 and r['curve'][-1]['loss']<r['curve'][0]['loss']

class Planned(Exception): pass

def specs_of(study, scale='nano'):
    "The Specs that a study's notebook hands to the sweep, found by running its cells up to there"
    import flow2lab.sweep
    cells = json.loads((ROOT/'nbs'/'studies'/f'{study}.ipynb').read_text())['cells']
    def planned(specs, *args, **kw): raise Planned(list(specs))
    sweep, flow2lab.sweep.sweep, names = flow2lab.sweep.sweep, planned, {}
    try:
        for c in cells:
            if c['cell_type']!='code': continue
            exec(''.join(c['source']), names)
            if 'parameters' in c['metadata'].get('tags', []): names['scale'] = scale
    except Planned as e: return e.args[0]
    finally: flow2lab.sweep.sweep = sweep

@pytest.mark.parametrize('study', ['methods', 'size_and_rank', 'better_start', 'learning_rates', 'architectures',
                                   'architecture_rates'])
def test_studies_ask_for_the_recorded_runs(study):
    "Every run of the reference has the id that the study's Spec has today, and no run is missing"
    from flow2lab.records import load_records
    assert {s.id for s in specs_of(study)}==set(load_records(REF/study)['id'])

def test_size_and_rank_has_two_sizes_at_every_scale():
    from flow2lab.scales import SCALES
    for s in SCALES.values(): assert s.smaller!=s.larger
    for scale in SCALES: assert len({s.base for s in specs_of('size_and_rank', scale)})==2

@pytest.mark.parametrize('study', ['methods', 'size_and_rank', 'better_start', 'architectures'])
def test_study_notebooks_show_the_records(study):
    "The notebook holds its outputs, and its last one is the sentence that the reference's findings make"
    from flow2lab.findings import conclusion, reference_findings
    cells = json.loads((ROOT/'nbs'/'studies'/f'{study}.ipynb').read_text())['cells']
    cells = [c for c in cells if c['cell_type']=='code']
    shown = [o for c in cells for o in c['outputs']]
    assert sum('image/png' in o.get('data', {}) for o in shown)>=2
    assert ''.join(cells[-1]['outputs'][0]['text']).strip()==conclusion(reference_findings(study))
    assert not re.search(r'"/(home|root|work|tmp|Users)/', json.dumps(shown))
