"The site: every link, picture and formula of what is built, and every page in a real browser."
import importlib.util, inspect, json, re, shutil, threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest, yaml
from nbdev.config import get_config

CFG = get_config()
TOP, NBS = Path(CFG.config_path), Path(CFG.nbs_path)
NAMES = [p.name for p in sorted(NBS.glob('*.ipynb')) if p.name[0] not in '_.']
SIZES = {'desktop': (1280, 900), 'phone': (390, 844)}


@pytest.fixture(scope='session')
def maker():
    "The program behind `make docs`, as a module."
    spec = importlib.util.spec_from_file_location('ader_site', TOP/'.ci'/'site.py')
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    return m

@pytest.fixture(scope='session')
def built(maker, tmp_path_factory):
    "The site, built in a folder of its own, and what the builder read."
    d = tmp_path_factory.mktemp('site')
    maker.build(d/'_docs', d/'_proc')
    return d/'_docs', d/'_proc'


# ---- what is written

def test_no_link_leads_nowhere(maker, built): assert not maker.broken(built[0])

def test_a_broken_link_and_a_missing_picture_are_found(maker, built, tmp_path):
    out = shutil.copytree(built[0], tmp_path/'docs')
    f = out/'attention.html'
    f.write_text(f.read_text() + '<a href="nowhere.html">a</a><a href="data.html#no-such-thing">b</a><img src="images/gone.png">')
    assert maker.broken(out) == ['attention.html: nowhere.html', 'attention.html: data.html#no-such-thing', 'attention.html: images/gone.png']

def test_every_notebook_is_a_page_and_in_the_sidebar(maker, built):
    def files(o): return [x for i in o for x in (files(i['contents']) if 'contents' in i else [i['href']])] if isinstance(o, list) and all(isinstance(i, dict) for i in o) else \
                         [x for i in o for x in ([i] if isinstance(i, str) else files([i]))]
    listed = files(yaml.safe_load((built[1]/'_quarto.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(listed) == sorted([f'{maker.page(n)}.ipynb' for n in NAMES] + ['api.qmd'])
    assert {p.stem for p in built[0].glob('*.html')} == {maker.page(n) for n in NAMES} | {'api'}
    numbered = [maker.page(n) + '.ipynb' for n in NAMES if n[0].isdigit()]
    assert [o for o in listed if o in numbered] == numbered # in reading order

def test_a_name_in_prose_leads_to_its_entry(maker, built):
    nbs = [maker.Notebook(NBS/n) for n in NAMES]
    to = maker.links(nbs)
    assert to['ader.attacks.PGD'] == to['PGD'] == 'attacks.html#PGD'
    assert maker.linked('See `ader.attacks.PGD`, `PGD()`, ``PGD`` and [`PGD`](x.html).\n```\n`PGD`\n```', to) == \
        'See [`ader.attacks.PGD`](attacks.html#PGD), [`PGD()`](attacks.html#PGD), ``PGD`` and [`PGD`](x.html).\n```\n`PGD`\n```'
    assert maker.linked('[next](03_losses.ipynb#eq), [home](index.ipynb)', to) == '[next](losses.ipynb#eq), [home](index.ipynb)'

def test_a_parameter_leads_nowhere(built):
    "Though a function has the same name."
    for f in built[0].glob('*.html'):
        if f.stem == 'api': continue
        for row in re.findall(r'<tr[^>]*>\s*<td[^>]*>(.*?)</td>', f.read_text(), re.S): # its first cell
            assert not re.fullmatch(r'\s*<a [^>]*><code>\w+</code></a>\s*', row), (f.name, row)

def test_every_symbol_has_an_entry_with_its_parameters_and_its_source(maker, built):
    seen = 0
    for nb in (maker.Notebook(NBS/n) for n in NAMES):
        ids = re.findall(r'\sid="([^"]+)"', maker.Page(built[0]/f'{nb.page}.html').html)
        assert not [o for o in ids if ids.count(o) > 1], nb.page
        for name in nb.symbols:
            md = maker.entry(nb, name)
            for n in [name] + [f'{name}.{m}' for m in nb.methods(name)]:
                assert ids.count(nb.anchors[n]) == 1
                file, line = re.search(rf'{n} {{#{re.escape(nb.anchors[n])} .symbol}}.*?{CFG.git_url}/blob/{CFG.branch}/(\S+)#L(\d+)', md, re.S).groups()
                assert re.search(rf'(def|class) {n.split(".")[-1]}\b', (TOP/file).read_text().splitlines()[int(line)-1]), n
            told = [k for k,v in maker.docments(nb.symbols[name]).items() if v and k not in ('return', 'self')]
            assert all(f'| `{k}` |' in md or f'*{k}` |' in md for k in told), name
            seen += bool(told)
    assert seen > 50

def test_headings_leave_the_anchors_of_symbols_alone(maker):
    assert maker.apart('## ADER\n## ADER+\n## Why\n', {'ader'}, []) == '## ADER {#on-ader}\n## ADER+ {#on-ader-2}\n## Why\n'

def test_nothing_is_fetched_from_afar(maker, built):
    for name,p in maker.pages(built[0]).items():
        assert not p.remote, name
        assert 'MathJax' not in p.html and 'katex' not in p.html, name
    for f in built[0].rglob('*.css'): assert not re.search(r'@import url\(["\']?https?:|url\(["\']?https?:', f.read_text(errors='ignore')), f

def test_formulas_are_formulas(maker, built):
    for n in NAMES:
        p, cells = maker.Page(built[0]/f'{maker.page(n)}.html'), json.loads((NBS/n).read_text())['cells']
        md = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        md = re.sub(r'```.*?```|`[^`\n]*`', '', md, flags=re.S)
        assert p.math >= len(re.findall(r'\$\$.+?\$\$|(?<!\$)\$(?!\s)[^$\n]+?(?<!\s)\$(?!\d)', md, re.S)), n
        assert not re.search(r'\\[(\[a-z]', p.text), n

def test_a_formula_that_cannot_be_drawn_is_refused(maker):
    assert '<mfrac>' in maker.mathml(r'<span class="math inline">\(\frac{1}{2}\)</span>')
    with pytest.raises(SystemExit, match='nosuchthing'): maker.mathml(r'<span class="math display">\[\nosuchthing x\]</span>')


# ---- in a browser

@pytest.fixture(scope='session')
def served(built):
    "The address of the site."
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(built[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()

@pytest.mark.parametrize('size,scheme', [('desktop', 'light'), ('phone', 'dark')])
def test_every_page_in_a_browser(served, built, browser, size, scheme):
    w, h = SIZES[size]
    context = browser.new_context(viewport=dict(width=w, height=h), color_scheme=scheme)
    page, said = context.new_page(), []
    page.on('console', lambda m: said.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: said.append(str(e)))
    for f in sorted(built[0].glob('*.html')):
        page.goto(f'{served}/{f.name}')
        facts = page.evaluate('''() => ({
            wide: document.documentElement.scrollWidth - innerWidth,
            blank: [...document.images].filter(i => !(i.complete && i.naturalWidth)).length,
            flat: [...document.querySelectorAll('math')].filter(m => m.checkVisibility() && !m.getBoundingClientRect().height).length,
            toc: !!document.querySelector('#TOC, nav[role="doc-toc"]'), sections: document.querySelectorAll('main h2').length,
            back: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0),
            fore: getComputedStyle(document.querySelector('main')).color.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)})''')
        assert facts['wide'] <= 0 and not facts['blank'] and not facts['flat'], (f.name, facts)
        assert facts['toc'] or not facts['sections'], f.name
        assert (facts['back'] < facts['fore']) == (scheme == 'dark'), (f.name, facts)
    assert not said
    context.close()

def test_code_is_not_cut_off(served, built, browser):
    "On a small desktop, but for a few lines that are too long everywhere."
    page, cut = browser.new_page(viewport=dict(width=1280, height=900)), []
    for f in sorted(built[0].glob('*.html')):
        page.goto(f'{served}/{f.name}')
        cut += page.evaluate("[...document.querySelectorAll('main pre')].map(o => o.scrollWidth > o.clientWidth + 1)")
    page.close()
    assert len(cut) > 500 and sum(cut) < 0.05*len(cut)

def test_search_finds_the_attention_block(served, browser):
    page = browser.new_page()
    page.goto(f'{served}/index.html')
    box = page.locator('input[type=search], .smalldocs-search input, #quarto-search input').first
    box.fill('AttentionBlock')
    hit = page.locator('a[href*="attention.html"]', has_text='AttentionBlock').first
    hit.wait_for(timeout=5000)
    hit.click()
    page.wait_for_url('**/attention.html*')
    page.close()

def test_the_dark_switch(served, browser):
    page = browser.new_page(color_scheme='light')
    page.goto(f'{served}/index.html')
    back = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
    light = back()
    page.locator('.quarto-color-scheme-toggle').first.click()
    page.wait_for_function('([was]) => getComputedStyle(document.body).backgroundColor != was', arg=[light])
    page.reload()
    assert back() != light # it is remembered
    page.close()

def test_a_phone_opens_the_sidebar(served, browser):
    page = browser.new_page(viewport=dict(width=390, height=844))
    page.goto(f'{served}/attention.html')
    link = page.locator('#quarto-sidebar a', has_text='Losses').first
    on_screen = 'e => { const r = e.getBoundingClientRect(); return r.left >= 0 && r.right <= innerWidth && r.height > 0 && e.checkVisibility() }'
    assert not link.evaluate(on_screen)
    page.locator('.quarto-btn-toggle').first.click()
    page.wait_for_function(on_screen, arg=link.element_handle(), timeout=3000)
    link.click()
    page.wait_for_url('**/losses.html')
    page.close()


# ---- quarto

def test_quarto_is_used_where_it_is(maker, tmp_path, monkeypatch):
    fake = tmp_path/'bin'/'quarto' # says what it was called with, and leaves a page where quarto would
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@" > "$2/called"\nmkdir "$2/_docs" && echo "<p>made by quarto" > "$2/_docs/index.html"\n')
    fake.chmod(0o755)
    monkeypatch.setenv('PATH', f'{fake.parent}:/usr/bin:/bin')
    monkeypatch.setattr(maker, 'stage', lambda proc: proc.mkdir() or maker.config((TOP/'_quarto.yml').read_text(), NAMES))
    maker.build(tmp_path/'out', tmp_path/'proc')
    assert (tmp_path/'proc'/'called').read_text().startswith(f'render {tmp_path/"proc"}')
    assert 'quarto' in (tmp_path/'out'/'index.html').read_text()

def test_what_quarto_reads_needs_no_number(maker, built):
    for f in built[1].glob('*.ipynb'):
        nb = json.loads(f.read_text())
        assert 'output-file' not in nb['cells'][0]['source'] # the page is called as the notebook
        for c in nb['cells']:
            if c['cell_type'] == 'markdown':
                for to in re.findall(r'\]\((\w+\.ipynb|\w+\.html)[#)]', ''.join(c['source'])): assert (built[1]/to).with_suffix('.ipynb').is_file() or to == 'api.html', (f.name, to)

def test_the_workflow_builds_what_make_builds():
    w = yaml.safe_load((TOP/'.github'/'workflows'/'docs.yml').read_text())
    steps = w['jobs']['build']['steps']
    assert any('quarto-actions/setup' in s.get('uses', '') for s in steps) and any(s.get('run') == 'make docs' for s in steps)
    assert any('deploy-pages' in s.get('uses', '') for s in w['jobs']['publish']['steps'])
