"Committed notebooks: executed, clean, small, and each opens with its idea."
import ast, json, re
from pathlib import Path
import pytest
from nbdev.config import get_config

NBS = Path(get_config().nbs_path)
NAMES = [p.name for p in sorted(NBS.glob('*.ipynb')) if p.name[0] not in '_.']
MACHINE = r'(?<![\w.~:/])/(home|root|tmp|work|mnt|opt|var|Users|private|usr/(local|lib))/[\w.]|\b[A-Z]:\\+Users|site-packages|ipykernel_\d+|\b\w+@[\w-]+:~'

@pytest.fixture(params=NAMES)
def nb(request): return NBS/request.param, json.loads((NBS/request.param).read_text(encoding='utf-8'))

def text(o): return ''.join(o) if isinstance(o, list) else str(o)
def shown(nb): # the text that a reader sees of the outputs
    for c in nb['cells']:
        for o in c.get('outputs', []):
            yield o, '\n'.join([text(o.get('text', '')), *(text(v) for k,v in o.get('data', {}).items() if k.startswith('text/'))])

def test_small(nb): assert nb[0].stat().st_size < 1e6

def test_clean(nb):
    path, d = nb
    assert set(d['metadata']) <= {'kernelspec', 'widgets', 'language_info'} and d['metadata']['kernelspec']['name'] == 'python3'
    for c in d['cells']: assert not set(c['metadata']) - {'tags'}, c['source']
    for o,s in shown(d):
        assert o['output_type'] != 'error' and o.get('name') != 'stderr', s
        assert not o.get('metadata') or set(o['metadata']) <= {'image/png', 'needs_background'}
        assert not re.search(MACHINE, s), re.search(MACHINE, s)
    for c in d['cells']: assert not re.search(MACHINE, text(c['source'])), c['source']

def test_a_machine_path_is_seen():
    for s in ('saved /home/ann/x', '/root/.cache/a', 'C:\\Users\\ann', '/tmp/tmpab12', 'lib/python3.11/site-packages/x'): assert re.search(MACHINE, s)
    for s in ('data/train', 'and/or', 'https://a.org/home/x', '3/255', '~/.fastai', 'results/tmp/x'): assert not re.search(MACHINE, s)

def speaks(src): # whether the last line of a cell is a value to be shown
    try: body = ast.parse(re.sub(r'^%.*', '', src, flags=re.M)).body
    except SyntaxError: return False
    return bool(body) and isinstance(body[-1], ast.Expr) and isinstance(body[-1].value, (ast.Name, ast.Attribute, ast.Subscript)) and not src.rstrip().endswith(';')

def test_executed(nb):
    code = [c for c in nb[1]['cells'] if c['cell_type'] == 'code' and text(c['source']).strip()]
    for c in code:
        src = text(c['source'])
        if speaks(src) or re.search(r'^print\(', src, re.M): assert c['outputs'], src
    assert any(c['outputs'] for c in code) or not code

def test_a_picture(nb):
    path, d = nb
    if path.stem in ('paper_to_code', '23_checkpoints', '27_command_line'): return # to look things up in
    md = '\n'.join(text(c['source']) for c in d['cells'] if c['cell_type'] == 'markdown')
    assert re.search(r'!\[[^\]]+\]\(images/', md) or any('image/png' in o.get('data', {}) for o,_ in shown(d))
    for alt,file in re.findall(r'!\[([^\]]*)\]\((images/[^)\s]+)', md): assert alt and (NBS/file).is_file(), file

def test_the_top_is_a_title_and_an_idea(nb):
    cells = [c for c in nb[1]['cells'] if c['cell_type'] == 'markdown']
    assert re.match(r'# \S.*\n\n> \S', text(cells[0]['source']))
    assert 'After this notebook' not in ''.join(text(c['source']) for c in cells)

def test_code_is_not_cut_off(nb):
    "Lines of at most 100 characters, but for a few."
    code = [c for c in nb[1]['cells'] if c['cell_type'] == 'code']
    long = [l for c in code for l in text(c['source']).splitlines() if len(l) > 100 and l[:2] != '#|']
    assert len(long) <= 2, long
