"A real JupyterLab: its server, a real kernel that runs a notebook through the server's API, and the page in a browser."
import json, os, shutil, socket, subprocess, sys, time, uuid
from pathlib import Path
from urllib.request import Request, urlopen
import pytest
from nbdev.config import get_config

CFG, TOKEN = get_config(), 'ader'
TOP, NBS = Path(CFG.config_path), Path(CFG.nbs_path)

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab server over a copy of the notebooks; a function that calls its API."
    home = tmp_path_factory.mktemp('lab')
    root = shutil.copytree(NBS, home/'nbs', ignore=shutil.ignore_patterns('_*', '.ipynb_checkpoints'))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(TOP), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1', **{
        f'JUPYTER_{k}': str(home/k) for k in ('CONFIG_DIR', 'DATA_DIR', 'RUNTIME_DIR')}, IPYTHONDIR=str(home/'ipython'))
    log = open(home/'log', 'w')
    p = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--port-retries=0', f'--IdentityProvider.token={TOKEN}',
                          f'--ServerApp.root_dir={root}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate'],
                         stdout=log, stderr=log, env=env)
    base = f'http://127.0.0.1:{port}'
    def api(path, method='GET', /, **body):
        r = Request(f'{base}/api/{path}', json.dumps(body).encode() if body else None, method=method,
                    headers={'Authorization': f'token {TOKEN}', 'Content-Type': 'application/json'})
        with urlopen(r, timeout=30) as f: return json.loads(f.read() or '{}')
    for _ in range(240):
        try: api('status'); break
        except OSError:
            assert p.poll() is None, (home/'log').read_text()
            time.sleep(0.25)
    else: raise RuntimeError((home/'log').read_text())
    api.base, api.ws = base, f'ws://127.0.0.1:{port}'
    yield api
    p.terminate()
    p.wait(20)

def execute(ws, code):
    "Run `code` in the kernel behind the websocket `ws`; its outputs as a notebook keeps them."
    mid = uuid.uuid4().hex
    ws.send(json.dumps(dict(channel='shell', header=dict(msg_id=mid, msg_type='execute_request', username='', session=mid, version='5.3', date=''),
                            parent_header={}, metadata={}, buffers=[],
                            content=dict(code=code, silent=False, store_history=True, user_expressions={}, allow_stdin=False, stop_on_error=True))))
    outs = []
    while True:
        m = json.loads(ws.recv())
        if m['parent_header'].get('msg_id') != mid: continue
        t, c = m['msg_type'], m['content']
        if t == 'stream': outs.append(dict(output_type=t, **c))
        elif t in ('display_data', 'execute_result'): outs.append(dict(output_type=t, **{k: c[k] for k in ('data', 'metadata')}, **({'execution_count': c['execution_count']} if t[0] == 'e' else {})))
        elif t == 'error': raise AssertionError(f'{code}\n\n' + '\n'.join(c['traceback']))
        elif t == 'status' and c['execution_state'] == 'idle': return outs

@pytest.fixture(scope='module')
def executed(lab):
    "02_attention.ipynb, run to its end in a kernel, and saved, all by the server's API."
    import websocket
    name = '02_attention.ipynb'
    nb = lab(f'contents/{name}?content=1')['content']
    kernel = lab('sessions', 'POST', path=name, name=name, type='notebook', kernel=dict(name='python3'))['kernel']['id']
    ws = websocket.create_connection(f'{lab.ws}/api/kernels/{kernel}/channels', header=[f'Authorization: token {TOKEN}'], timeout=120)
    n = 0
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        c['outputs'], n = execute(ws, ''.join(c['source'])), n + 1
        c['execution_count'] = n
    ws.close()
    lab(f'contents/{name}', 'PUT', type='notebook', content=nb)
    return nb

def test_a_notebook_runs_to_its_end_in_a_real_kernel(executed):
    old = json.loads((NBS/'02_attention.ipynb').read_text())
    pictures = lambda nb: [i for i,c in enumerate(nb['cells']) for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert pictures(executed) == pictures(old) and pictures(old) # as committed
    assert not [o for c in executed['cells'] for o in c.get('outputs', []) if o.get('name') == 'stderr']

def test_the_executed_notebook_opens_in_jupyterlab(lab, executed, browser, tmp_path):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    errors = []
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.goto(f'{lab.base}/lab/tree/02_attention.ipynb?token={TOKEN}')
    page.locator('.jp-Notebook h1', has_text='Attention').first.wait_for(timeout=60000)
    page.locator('.jp-Notebook .jp-RenderedImage img').first.wait_for(state='attached', timeout=30000)
    shot = page.screenshot(path=tmp_path/'lab.png')
    assert len(shot) > 20000 and not errors
    page.close()

def test_lab_opens_at_the_index(lab):
    make = (TOP/'Makefile').read_text()
    assert 'jupyter lab --notebook-dir nbs nbs/index.ipynb' in make and lab('contents/index.ipynb?content=0')['type'] == 'notebook'

def test_the_sliders_move(lab, browser):
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.goto(f'{lab.base}/lab/tree/04b_explore.ipynb?token={TOKEN}')
    page.locator('.jp-Notebook h1', has_text='See an attack').first.wait_for(timeout=60000)
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').first.wait_for(state='attached', timeout=60000) # the kernel is there
    page.get_by_role('menuitem', name='Run', exact=True).click()
    page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    page.keyboard.press('Escape')
    handle = page.locator('.jp-OutputArea .widget-slider .noUi-handle').first
    handle.wait_for(state='attached', timeout=120000)
    handle.scroll_into_view_if_needed(timeout=20000)
    picture = page.locator('.jp-OutputArea img.widget-image').first
    before = picture.get_attribute('src')
    handle.focus()
    for _ in range(20): page.keyboard.press('ArrowRight')
    page.wait_for_function('([e, was]) => e.src != was', arg=[picture.element_handle(), before], timeout=20000)
    if os.environ.get('SHOT'): page.screenshot(path=os.environ['SHOT'])
    page.close()
