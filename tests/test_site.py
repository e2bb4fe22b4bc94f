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
                file, line = re.search(rf'{{#{re.escape(nb.anchors[n])} .symbol}}.*?{CFG.git_url}/blob/{CFG.branch}/(\S+)#L(\d+)', md, re.S).groups()
                assert re.search(rf'(def|class) {n.split(".")[-1]}\b', (TOP/file).read_text().splitlines()[int(line)-1]), n
            told = [k for k,v in maker.docments(nb.symbols[name]).items() if v and k not in ('return', 'self')]
            assert all(f'| `{k}` |' in md or f'*{k}` |' in md for k in told), name
            seen += bool(told)
    assert seen > 50

def test_source_is_folded_under_its_entry(maker, built):
    "Open on the pages of the method, with the table of parameters folded; closed elsewhere."
    for nb in (maker.Notebook(NBS/n) for n in NAMES):
        page = (built[0]/f'{nb.page}.html').read_text()
        folds = re.findall(r'<details( open="")? class="code-fold">\s*<summary>Source of ([^<]*)<', page)
        assert {n for _,names in folds for n in names.split(', ')} == set(nb.symbols), nb.page
        assert all(bool(is_open) == nb.is_story for is_open,_ in folds), nb.page
        assert ('<summary>Parameters</summary>' in page) <= nb.is_story, nb.page
    assert 'RandomCrop.__call__ ' in re.sub('<[^>]*>', ' ', (built[0]/'data.html').read_text()) # not bold

def test_what_a_library_calls_is_not_listed(maker):
    nb = maker.Notebook(NBS/'05_training.ipynb')
    assert maker.is_hook(nb.module, 'Method.before_fit') and maker.is_hook(nb.module, 'Method.state_dict')
    assert not maker.is_hook(nb.module, 'Method.loss') and 'Method.before_fit' not in nb.symbols
    assert not [n for n in maker.links([nb]) if re.search(r'\.(before|after)_', n)]

def test_a_figure_has_its_size_and_its_words(maker):
    png = 'iVBORw0KGgoAAAANSUhEUgAAAoAAAAHg' # 640 x 480
    out = dict(output_type='display_data', data={'image/png': png}, metadata={'image/png': dict(width=320, height=240)})
    cell = lambda src: dict(cell_type='code', source=src, outputs=[json.loads(json.dumps(out))])
    shown = lambda src, above='': maker.outputs(cell(src), 'Curves', above)['outputs'][0]['data']['text/html'][0]
    assert 'width="320" height="240" alt="Two &lt;lines&gt;"' in shown('#| fig-alt: Two <lines>\nplot()')
    assert '<figcaption>A caption</figcaption>' in shown('#| fig-cap: A caption\nplot()')
    assert 'alt="Curves. loss against epoch. From a comment"' in shown("# From a comment\nax.set(xlabel='epoch', ylabel='loss')")
    assert 'alt="Curves. What stands above"' in shown('plot()', 'Before.\n\nWhat *stands* [above](x.html):')

def test_a_frozen_progress_bar_a_warning_or_an_error_is_not_published(maker, built):
    text = lambda s: dict(output_type='stream', name='stdout', text=[s])
    for s in ('<progress value="3">', ' 25%|██▌ ', 'a.py:3: UserWarning: old', 'Traceback (most recent call last)'): assert maker.unfit(text(s)), s
    assert maker.unfit(dict(output_type='error')) and maker.unfit(text('') | dict(name='stderr'))
    assert not maker.unfit(text('accuracy 25% | 30%, a warning'))
    for f in built[0].glob('*.html'): assert not re.search('cell-output-(error|stderr)|<progress', f.read_text()), f.name

def test_formulas_are_set_as_they_should_be(maker):
    show = lambda md: maker.formulas(md)
    assert show(r'$KL(T\,\|\,S)$, `$KL$`') == r'$\mathrm{KL}(T\,\Vert \,S)$, `$KL$`'
    assert show(r'$x_{adv} \in \text{some set}, \frac{ab}{c}$') == r'$x_{\mathrm{adv}} \in \text{some set}, \frac{\mathrm{ab}}{c}$'
    assert show(r'$$a = b \tag{3}$$') == r'$$a = b \qquad\text{(3)}$$'
    long = show(r'$$' + r'L = S(x) + S(x) + S(x) + S(x) + S(x) + S(x) + S(x) + S(x), \qquad x = \alpha + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8$$')
    assert long.count('$$') == 4 # in two lines
    m = maker.mathml(r'<span class="math display">\[\begin{aligned} a &amp;= \mathrm{KL} \\ b &amp;= 2 \end{aligned}\]</span>')
    assert '<mtr>' in m and '<mi>KL</mi>' in m and '&amp;' not in m

def test_every_page_opens_in_colab(built):
    for n in NAMES:
        page = (built[0]/f'{re.sub(r"^[0-9]+[a-z]*_", "", n[:-6])}.html').read_text()
        assert f'https://colab.research.google.com/github/{CFG.user}/{CFG.repo}/blob/{CFG.branch}/nbs/{n}' in page, n
        assert n == 'index.ipynb' or f'git clone' in page, n

def test_badges_are_links_on_the_site_and_pictures_in_the_readme(maker, built):
    md = '[![CI](https://a.org/b.svg)](https://a.org)'
    assert maker.linked(md, {}) == '[CI](https://a.org){.badge-link}'
    readme = (TOP/'README.md').read_text()
    assert readme.count('[![') >= 4 and all(u.startswith((CFG.git_url, CFG.doc_host)) for u in re.findall(r'\)\]\(([^)]*)\)', readme))

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

MEASURE = '''() => {
    const all = (q, f) => [...document.querySelectorAll(q)].filter(o => o.checkVisibility() && f(o)).map(o => o.textContent.trim().slice(0, 80) || o.alt)
    document.querySelectorAll('details').forEach(o => o.open = true)
    const wide = o => o.scrollWidth > o.clientWidth + 1
    const lines = o => Math.round(o.getBoundingClientRect().height / parseFloat(getComputedStyle(o).lineHeight))
    const broken = o => { // a word of a cell in two lines
        const texts = document.createTreeWalker(o, NodeFilter.SHOW_TEXT)
        for (let t = texts.nextNode(); t; t = texts.nextNode()) {
            if (t.parentElement.closest('math')) continue
            for (const m of t.data.matchAll(/[A-Za-z0-9.]+/g)) {
                const r = document.createRange(); r.setStart(t, m.index); r.setEnd(t, m.index + m[0].length)
                if (r.getClientRects().length > 1) return true } }
        return false }
    const inside = o => { for (let p = o.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX != 'visible') return true }
    return {
        code: all('main pre', wide), formulas: all('main .math.display', wide),
        words: all('main td', broken), intervals: all('main td', o => /^[\\d.]+ ± [\\d.]+$/.test(o.textContent.trim()) && o.getClientRects().length && getComputedStyle(o).whiteSpace != 'nowrap'),
        over: all('main *', o => o.getBoundingClientRect().right > innerWidth + 1 && !inside(o)),
        lists: all('.words, .params', o => [...o.querySelectorAll('td')].some(d => d.getBoundingClientRect().right > innerWidth + 1)),
        mute: all('main img', o => !o.alt), stretched: all('main figure img[width]', o => o.getBoundingClientRect().width > +o.getAttribute('width') + 1),
        errors: all('.cell-output-stderr, .cell-output-error, progress', o => true) } }'''

@pytest.mark.parametrize('size,scheme', [('desktop', 'light'), ('phone', 'dark')])
def test_every_page_in_a_browser(served, built, browser, size, scheme):
    """It loads whole and in its colours, and nothing is cut off, broken or mute: code, formulas, words in
    cells, intervals, figures; on a phone a formula or a table of numbers scrolls by itself."""
    w, h = SIZES[size]
    context = browser.new_context(viewport=dict(width=w, height=h), color_scheme=scheme)
    page, said, bad = context.new_page(), [], {}
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
        cut = page.evaluate(MEASURE)
        if size == 'phone': del cut['formulas'], cut['words']
        bad |= {(f.name, k): v for k,v in cut.items() if v}
    assert not said and not bad
    context.close()

def test_what_is_cut_off_is_seen(browser):
    page = browser.new_page(viewport=dict(width=400, height=400))
    page.set_content("""<main style="width: 300px"><pre style="overflow-x: auto">""" + 'x'*200 + """</pre><img src="">
        <table style="width: 40px; table-layout: fixed"><td style="word-break: break-all">Tensor</td><td>1.0 ± 0.2</td></table>
        <p style="width: 500px">wide</p><div class="words"><table><td style="min-width: 600px">a</td></table></div><progress></progress></main>""")
    facts = page.evaluate(MEASURE)
    page.close()
    assert all(facts[k] for k in ('code', 'words', 'intervals', 'over', 'lists', 'mute', 'errors')), facts

def test_brackets_grow(served, browser):
    page = browser.new_page()
    page.goto(f'{served}/weighting.html')
    heights = page.evaluate("[...document.querySelectorAll('math mfrac')].map(o => [o, o.previousElementSibling]).filter(([o, b]) => b && b.textContent == '(').map(os => os.map(o => o.getBoundingClientRect().height))")
    page.close()
    assert heights and all(b > 0.9*o for o,b in heights)

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
