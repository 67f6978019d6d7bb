"The house: imports go to lower numbers only, each room says what it answers, and `help` explains each parameter"
import ast, importlib, inspect, json, re, textwrap
import pytest
from flow2lab.files import project_root

ROOT = project_root()
ROOMS = {p.stem[4:]: p for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))}
NUMBER = {name: int(p.stem[:3]) for name,p in ROOMS.items()}

def imported(path):
    "(module of ours, line) of each import in a module, those inside functions too"
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom):
            inside = node.level==1 or (node.module or '').split('.')[0]=='flow2lab'
            module = (node.module or '').removeprefix('flow2lab').removeprefix('.')
            if inside: yield from ((m, node.lineno) for m in ([module] if module else [a.name for a in node.names]))
        elif isinstance(node, ast.Import):
            yield from ((a.name[9:], node.lineno) for a in node.names if a.name.startswith('flow2lab.'))

def test_imports_go_to_lower_numbers():
    "No circle is possible: what a room uses stands before it"
    found = [(name, m, line) for name in ROOMS for m,line in imported(ROOT/'flow2lab'/f'{name}.py') if m in NUMBER]
    assert len(found)>300
    assert [f'{a} imports {b}, line {line}' for a,b,line in found if NUMBER[b]>=NUMBER[a]]==[]

def test_an_import_upwards_is_found(tmp_path):
    "The test above can fail: also for an import inside a function"
    code = 'def f():\n    from flow2lab.cli import main\n    from . import sweep\n    import flow2lab.site\n'
    (tmp_path/'a.py').write_text(code)
    assert sorted(imported(tmp_path/'a.py'))==[('cli', 2), ('site', 4), ('sweep', 3)]

@pytest.mark.parametrize('name', ROOMS)
def test_a_room_says_what_it_answers(name):
    "Title, a line that says why, the module it exports to; no cell that needs scrolling"
    cells = json.loads(ROOMS[name].read_text(encoding='utf-8'))['cells']
    first = ''.join(cells[0]['source'])
    assert re.match(rf'# {name}\n\n> \S.*[.?]', first), first[:100]
    code = [''.join(c['source']) for c in cells if c['cell_type']=='code']
    assert any(re.search(rf'^#\| default_exp {name}$', c, re.M) for c in code)
    assert [c[:60] for c in code if re.search(r'^#\| export', c, re.M) and c.count('\n')>60]==[]

def unexplained(f):
    "Parameters of `f` without a comment on their line or the line above; several may share a line"
    lines, start = inspect.getsourcelines(f)
    node = ast.parse(textwrap.dedent(''.join(lines))).body[0]
    args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    def comment(n): return '#' in lines[n-1] or n>1 and lines[n-2].strip().startswith('#')
    return [a.arg for a in args if a.arg not in ('self', 'cls') and not comment(a.end_lineno)
            and not any(a.arg==m for m in re.findall(r'`(\w+)`', inspect.getdoc(f) or ''))]

@pytest.mark.parametrize('name', ROOMS)
def test_help_explains_each_parameter(name):
    "A docstring, and for each parameter of every public function a comment beside it or its name in the docstring"
    module, bad = importlib.import_module(f'flow2lab.{name}'), []
    for n in getattr(module, '__all__', ()):
        f = getattr(module, n)
        if not inspect.isfunction(f) or f.__module__!=module.__name__: continue
        if not inspect.getdoc(f): bad.append(f'{n}: no docstring')
        bad += [f'{n}: {p}' for p in unexplained(f)]
    assert bad==[]
