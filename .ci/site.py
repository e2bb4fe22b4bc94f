"""Build the site in _docs/ from the notebooks and `_quarto.yml`: with quarto when it is on the PATH, else with smalldocs.

The notebooks are prepared once, for both: pages lose the number of their notebook (02_attention.ipynb becomes attention.html),
names in backticks become links, and every exported cell gets an entry for each of its symbols, with a table of its parameters.
On the pages of the method the code is open and the table folded, elsewhere the code is folded. A figure has its own size and an
alternative text: the cell's `#| fig-alt: ...` or `#| fig-cap: ...`, else what stands above it."""
import ast, base64, html, inspect, json, re, shutil, struct, subprocess, sys
from functools import cached_property
from html.parser import HTMLParser
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from urllib.parse import unquote, urldefrag
import yaml
from fastcore.docments import docments
from nbdev.config import get_config

TOP = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOP))
CFG = get_config(path=TOP)
LIB = CFG.lib_path.name

def page(nb): return re.sub(r'^\d+[a-z]*_', '', Path(nb).stem) # 09b_reproduce.ipynb -> reproduce
def md_cell(src): return dict(cell_type='markdown', id=None, metadata={}, source=src)
def raw_cell(src): return dict(cell_type='raw', id=None, metadata={}, source=src)

# ---- symbols: where each is explained, and where its source is

def name_of(o): # of a definition; a method added by `@patch` bears the name of its class, too
    patched = any(getattr(getattr(d, 'func', d), 'id', '') == 'patch' for d in o.decorator_list) # @patch, @patch(as_prop=True)
    return f'{ast.unparse(o.args.args[0].annotation)}.{o.name}' if patched else o.name

def definitions(cell): # names of the functions and classes that a cell defines
    return [name_of(o) for o in ast.parse(cell).body if hasattr(o, 'decorator_list') and o.name[0] != '_']

def is_hook(module, name): # a method that a library calls by itself, such as fastai's `before_fit`; nobody looks it up
    owner, _, m = name.rpartition('.')
    if not owner or m.startswith('__') or m == 'forward': return False
    theirs = [b for b in attrgetter(owner)(module).__mro__[1:] if not b.__module__.startswith(LIB)]
    return bool(re.match('(before|after)_(fit|epoch|train|validate|batch|pred|loss|backward|step|cancel)|(load_)?state_dict$', m)) or any(hasattr(b, m) for b in theirs)

def inner(o): return o.fget if isinstance(o, property) else o.func if isinstance(o, cached_property) else o # the function of a property

def code(cell): return re.sub(r'^(#\|.*|%.*)\n?', '', ''.join(cell['source']), flags=re.M).strip('\n')
def directives(cell): return dict(re.findall(r'^#\|\s*([\w-]+):?[ \t]*(.*)$', ''.join(cell['source']), re.M)) if cell['cell_type'] == 'code' else {}

class Notebook:
    "A notebook on its way to a page."
    def __init__(self, path): self.path, self.page, self.nb = path, page(path), json.loads(path.read_text(encoding='utf-8'))
    @cached_property
    def module(self):
        m = next((d['default_exp'] for c in self.nb['cells'] if 'default_exp' in (d := directives(c))), None)
        return import_module(f'{LIB}.{m}') if m and m != 'all' else None
    @cached_property
    def symbols(self): # name -> object, in the order of the notebook
        if not self.module: return {}
        names = [n for c in self.nb['cells'] if 'export' in directives(c) for n in definitions(code(c))]
        return {n: inner(attrgetter(n)(self.module)) for n in names if not is_hook(self.module, n)}
    @cached_property
    def lines(self): # the line of the module on which each function, class and method begins
        d = {}
        for o in ast.parse(inspect.getsource(self.module)).body:
            if hasattr(o, 'decorator_list'): d |= {name_of(o): o.lineno, **{f'{o.name}.{m.name}': m.lineno for m in o.body if hasattr(m, 'decorator_list')}}
        return d
    @cached_property
    def anchors(self): # names and what they lead to on this page; `View` keeps its capital where there is a `view`
        d = {}
        for n in [o for n in self.symbols for o in (n, *(f'{n}.{m}' for m in self.methods(n)))]:
            d[n] = n.lower() if n == n.lower() or n.lower() not in (*self.symbols, *d.values()) else n
        return d
    def methods(self, name): # those of the class `name` that say what they take or return
        own = vars(self.symbols[name]) if inspect.isclass(self.symbols[name]) else {}
        return [n for n,f in own.items() if inspect.isfunction(f) and (n[0] != '_' or n == '__call__') and f'{name}.{n}' in self.lines and f'{name}.{n}' not in self.symbols
                and not is_hook(self.module, f'{name}.{n}') and any(docments(f).values())]
    @cached_property
    def is_story(self): return bool(re.match('0[0-6]|11', self.path.name)) # a page of the method, whose code is what is read

def links(nbs): # what a name in backticks leads to
    d = {}
    for nb in nbs:
        for n,a in nb.anchors.items():
            d.setdefault(n, f'{nb.page}.html#{a}')
            for m in (nb.module.__name__, nb.module.__name__.partition('.')[2]): d[f'{m}.{n}'] = f'{nb.page}.html#{a}' # ader.attacks.PGD, attacks.PGD
        if nb.module: d[nb.module.__name__] = f'{nb.page}.html'
    return d

def linked(md, to): # Markdown with links on the names it has in backticks
    def line(l):
        if l.startswith('#'): return l
        if m := re.match(r'\| `[*\w]+` \| ', l): return m[0] + line(l[m.end():]) # a parameter is no function of that name
        sub = lambda m: f'[{m[0]}]({to[m[1]]})' if m[1] in to else m[0]
        return re.sub(r'(?<!\[)(?<!`)`([\w.]+)(?:\(\))?`(?!`)(?!\]\()', sub, l)
    fenced, out = False, []
    for l in md.split('\n'):
        if l.lstrip().startswith('```'): fenced = not fenced
        out.append(l if fenced else line(l))
    md = re.sub(r'\[!\[([^\]]*)\]\(https?:[^)]*\)\]\(([^)]*)\)', r'[\1](\2){.badge-link}', '\n'.join(out)) # nothing is fetched from afar
    return re.sub(r'\]\((\d+[a-z]*_)?(\w+)\.ipynb', r'](\2.ipynb', md) # links between notebooks, to their pages

# ---- entries

def short(s): # torch.Tensor -> Tensor; 0.031372549019607843 -> 8/255
    def frac(m):
        n = float(m[0])*255
        return f'{n:.0f}/255' if abs(n - round(n)) < 1e-6 else f'{float(m[0]):.4g}'
    return re.sub(r'(?<![\d.])0\.\d{6,}', frac, re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_]\w*)", '', s))

def in_cell(s): return str(s).replace('|', '\\|').replace('\n', ' ')
def as_code(s): return f'`{in_cell(s)}`' if s else ''

def parameters(o):
    try: return inspect.signature(o).parameters
    except (ValueError, TypeError): return {}

def table(o): # the parameters of `o`, with types, defaults and docments
    empty, rows = inspect.Parameter.empty, []
    docs = docments(o, full=True)
    params = parameters(o)
    def kind(a): return '' if a in (empty, None) else short(a if isinstance(a, str) else inspect.formatannotation(a))
    for n,p in params.items():
        d = docs.get(n) or {}
        if n == 'self' or (p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not d.get('docment')): continue
        star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        default = '' if p.default is empty else getattr(p.default, '__name__', None) or short(repr(p.default))
        rows.append((star + n, kind(p.annotation), default, d.get('docment') or ''))
    ret = docs.get('return') or {}
    if ret.get('docment') and not inspect.isclass(o):
        rows.append(('**returns**', kind(ret.get('anno', empty)), '', ret['docment']))
    if not any(r[1] or r[3] for r in rows): return ''
    out = [('parameter', 'type', 'default', 'what it is'), ('---',)*4]
    out += [(n if n == '**returns**' else as_code(n), as_code(t), as_code(d), in_cell(w)) for n,t,d,w in rows]
    out = list(zip(*(c for c in zip(*out) if any(c[2:])))) # no empty columns
    return '::: {.params}\n\n' + '\n'.join('| ' + ' | '.join(r) + ' |' for r in out) + '\n\n:::'

def entry(nb, name): # Markdown: heading, source, docstring, parameters; and those of its methods
    o, file = nb.symbols[name], f'{CFG.git_url}/blob/{CFG.branch}/{LIB}/{Path(nb.module.__file__).name}'
    def one(n, f, level, doc):
        params, shown = table(f), n.replace('__', r'\_\_')
        if nb.is_story and params: params = f'<details class="fold"><summary>Parameters</summary>\n\n{params}\n\n</details>'
        return f'{"#"*level} {shown} {{#{nb.anchors[n]} .symbol}}\n\n{doc} [source]({file}#L{nb.lines[n]}){{.source}}\n\n{params}'
    parts = [one(name, o, 3, o.__doc__ and inspect.cleandoc(o.__doc__) or '')]
    for m in nb.methods(name): parts.append(one(f'{name}.{m}', vars(o)[m], 4, inspect.cleandoc(vars(o)[m].__doc__ or '')))
    return '\n\n'.join(parts)

# ---- pages

def heading(md): # title, description and the rest of a page's first cell
    m = re.match(r'#\s+(.+?)\s*\n+(?:>\s*(.+?)\s*(?:\n|$))?', md + '\n')
    return (m[1], m[2] or '', md[m.end():]) if m else ('', '', md)

FROZEN = r'<progress|\d%\|[█▏▎▍▌▋▊▉ ]|it/s\]|\b[A-Z]\w*Warning\b|Traceback \(most recent' # progress bars, warnings and errors

def unfit(out): # whether an output is not to be published
    said = ''.join(out.get('text', '')) + ''.join(''.join(v) for k,v in out.get('data', {}).items() if k.startswith('text/'))
    return out['output_type'] == 'error' or out.get('name') == 'stderr' or bool(re.search(FROZEN, said))

def last_words(md): # the last paragraph of some Markdown, as plain text
    prose = [p for p in re.sub(r'```.*?```', '', md, flags=re.S).split('\n\n') if p.strip() and p.lstrip()[0] not in '#|>$<!-']
    s = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', prose[-1]) if prose else ''
    return re.sub(r'[*`$]|\\\w+', '', ' '.join(s.split())).rstrip(':')

def alternative(cell, where, above): # what a figure shows, for who can't see it: its heading and axes, and the text before it
    d, src = directives(cell), code(cell)
    for k in ('fig-alt', 'fig-cap'):
        if d.get(k): return d[k].strip('"\'')
    title, y, x = (next(iter(re.findall(rf"""{k}(?:=|\()['"]([^'"]+)['"]""", src)), '') for k in ('title', 'ylabel', 'xlabel'))
    comment = re.match(r'#\s*(.+)', src)
    axes = '; '.join(filter(None, (title, f'{y} against {x}' if x and y else x or y)))
    alt = '. '.join(filter(None, (where.replace('`', ''), axes, comment[1] if comment else last_words(above))))
    return alt if len(alt) <= 300 else alt[:300].rsplit(' ', 1)[0] + ' …'

def picture(png, meta, alt, caption): # as HTML, at the size that the notebook shows
    w, h = struct.unpack('>II', base64.b64decode(png)[16:24])
    size = meta.get('image/png', {})
    w, h = size.get('width', w), size.get('height', h)
    img = f'<img src="data:image/png;base64,{png}" width="{w}" height="{h}" alt="{html.escape(alt)}">'
    return f'<figure class="figure">{img}{f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""}</figure>'

def tidy(table): # pandas' HTML: one row of headings, and the columns of numbers marked
    table = re.sub(r'<th></th>((?:\s*<th>[^<]*</th>)+)\s*</tr>\s*<tr[^>]*>\s*<th>([^<]*)</th>(?:\s*<th></th>)+\s*</tr>', r'<th>\2</th>\1</tr>', table)
    rows = [re.findall(r'<td>(.*?)</td>', r, re.S) for r in re.findall(r'<tr.*?</tr>', table, re.S)]
    cells = list(zip(*(r for r in rows if r)))
    number = [all(re.fullmatch(r'[-−–—\s]*|nan|(<b>|\*\*)?[-−+]?\d[\d.,e+-]*.{0,24}', c) for c in col) and any(re.search(r'\d', c) for c in col) for col in cells]
    def row(m):
        n = iter(number)
        r = re.sub(r'<td>', lambda _: '<td class="num">' if next(n, False) else '<td>', m[0])
        heads = len(re.findall('<th>', r))
        if '<td' in r or heads < len(number): return r
        n = iter([False]*(heads - len(number)) + number)
        return re.sub('<th>', lambda _: '<th class="num">' if next(n) else '<th>', r)
    return re.sub(r'<tr.*?</tr>', row, re.sub(r' style="text-align: right;"| border="1"', '', table), flags=re.S)

def outputs(cell, where='', above=''): # a picture takes the place of the sliders that need a kernel
    d, n = directives(cell), 0
    pictures = sum('image/png' in o.get('data', {}) for o in cell.get('outputs', []))
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if len(data) > 1: data.pop('application/vnd.jupyter.widget-view+json', None)
        if 'image/png' in data:
            n += 1
            alt = alternative(cell, where, above) + (f' ({n} of {pictures})' if pictures > 1 else '')
            o['data'] = {'text/html': [picture(''.join(data['image/png']).replace('\n', ''), o.get('metadata', {}), alt, d.get('fig-cap', '').strip('"\'') if n == 1 else '')]}
        elif 'text/html' in data: data['text/html'] = [tidy(''.join(data['text/html']))]
        if 'text/markdown' in data: data['text/markdown'] = [''.join(data['text/markdown'])]
    return cell

def words(md): # tables of words, marked: on a phone they are shown as lists
    def one(m):
        cells = [c for l in m[0].split('\n') for c in re.split(r'(?<!\\)\|', re.sub(r'\([^)]*\)', '', l))]
        return f'::: {{.words}}\n\n{m[0]}\n\n:::' if max(map(len, cells)) > 36 and '-:' not in m[0] else m[0]
    return re.sub(r'(?<!\n\|)(?<!\.params\}\n\n)(?:^\|.*\|\n)\|[-:| ]+\|(?:\n\|.*\|)+', one, md, flags=re.M)

# ---- formulas

WORDS = r'\\(?:begin|end|mathrm|text|operatorname|mathbf|mathcal|mathbb|label)\*?\s*\{[^}]*\}|\\[A-Za-z]+|\\.|[A-Za-z]{2,}'

def formula(tex): # names of several letters upright; ‖ as a command, since `\|` in a table is a bar; a number that every reader knows
    tex = re.sub(WORDS, lambda m: m[0] if m[0][0] == '\\' else rf'\mathrm{{{m[0]}}}', tex)
    tex = re.sub(r'(?<!\\)\\\|', r'\\Vert ', tex)
    return re.sub(r'\\tag\{(.*?)\}', r'\\qquad\\text{(\1)}', tex)

def display(tex): # a long line is broken at its widest gaps
    tex = formula(tex)
    parts = [p.strip() for p in re.split(r'\\qquad(?!\\text\{\()', tex)]
    if len(parts) == 1 or r'\begin' in tex or len(re.sub(r'\\[A-Za-z]+|[{}_^\\ ,]', '', tex)) < 56: return f'$${tex}$$'
    return '\n\n'.join(f'$${p.rstrip(",") + ","*(p is not parts[-1])}$$' for p in parts)

def formulas(md): # all formulas of some Markdown, those in code left alone
    def one(m):
        if m[1]: return display(m[1])
        return f'${formula(m[2])}$' if m[2] else m[0]
    return re.sub(r'```.*?```|`[^`\n]*`|\$\$(.+?)\$\$|(?<![\$\\])\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)', one, md, flags=re.S)

def apart(md, symbols, used): # Markdown whose headings leave the anchors of the symbols alone, and each other's (`used`)
    def one(m):
        slug = re.sub(r'[^\w.-]+', '-', m[2].lower()).strip('-')
        if slug not in symbols: return m[0]
        used.append(slug)
        return f'{m[0]} {{#on-{slug}{"-" + str(n) if (n := used.count(slug)) > 1 else ""}}}'
    return re.sub(r'^(#{2,6} +)([^{\n]+?) *$', one, md, flags=re.M)

def fold(cell, nb): # the options of an exported cell's code: what is documented above it, or private, is folded
    names = definitions(code(cell))
    shown = [n for n in names if n in nb.symbols]
    if shown: return {'code-fold': 'show' if nb.is_story else 'true', 'code-summary': f'"Source of {", ".join(shown)}"'}
    if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(code(cell)).body): return {'code-fold': 'true', 'code-summary': 'Imports'}
    private = [o.name for o in ast.parse(code(cell)).body if hasattr(o, 'decorator_list')]
    if private or names: return {'code-fold': 'true', 'code-summary': f'"Internal: {", ".join(names or private)}"'}
    return {}

def elsewhere(nb): # how to run the page without installing anything
    top = f'https://colab.research.google.com/github/{CFG.user}/{CFG.repo}/blob/{CFG.branch}/{CFG.nbs_path.name}/{nb.path.name}'
    tools = ' '.join(f"'{o}'" for o in CFG.dev_requirements.split() if re.match('nbdev|fastcore|execnb', o)) # what notebooks import
    first = f'!git clone -q {CFG.git_url} && pip install -q ./{CFG.repo} {tools}\n%cd {CFG.repo}/{CFG.nbs_path.name}'
    return dict(text='Open in Colab', icon='play-circle', href=top), f"""<details class="fold run">
<summary>Run this page</summary>

[Open in Colab]({top}) and run this cell first:

```python
{first}
```

</details>"""

def prepare(nb, to):
    "The cells of a page."
    title, about, rest = heading(''.join(nb.nb['cells'][0]['source']))
    if not title: raise SystemExit(f'{nb.path}: the first cell must begin with "# Title"')
    front = dict(title=title)
    if about: front['description'] = about
    git = f'{CFG.git_url}/blob/{CFG.branch}/{CFG.nbs_path.name}/{nb.path.name}'
    colab, run = elsewhere(nb)
    front['code-links'] = [dict(text='This page as a notebook', icon='journal-code', href=git), colab]
    cells = [raw_cell(f'---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---')]
    if nb.page != 'index': cells.append(md_cell(run))
    symbols, used, where, above = set(nb.anchors.values()), [], title, ''
    def text(md): return words(formulas(linked(md, to)))
    for c in [md_cell(rest)] + nb.nb['cells'][1:]:
        d = directives(c)
        if c['cell_type'] == 'markdown':
            above = ''.join(c['source'])
            where = next(iter(re.findall(r'^#+ +(.+?) *$', above, re.M)[-1:]), where)
            cells.append({**c, 'source': apart(text(above), symbols, used)})
        elif d.keys() & {'hide', 'default_exp', 'exporti'} or (not code(c) and c['cell_type'] == 'code'): continue
        else:
            if said := [o for o in c.get('outputs', []) if unfit(o)]:
                print(f'{nb.path.name}: left out a progress bar, a warning or an error: {str(said)[:120]}', file=sys.stderr)
                c['outputs'] = [o for o in c['outputs'] if o not in said]
            if 'export' in d:
                d |= fold(c, nb)
                for n in definitions(code(c)):
                    if n not in nb.symbols: continue
                    own = parameters(nb.symbols[n]) # a word of the docstring that is one of these is no link
                    cells.append(md_cell(formulas(linked(entry(nb, n), {k: v for k,v in to.items() if k not in own}))))
            keep = ''.join(f'#| {k}: {v}\n' for k,v in d.items() if v and k not in ('fig-alt', 'fig-cap'))
            c = outputs({**c, 'execution_count': None}, where, above)
            c['source'] = keep + code(c)
            for o in c.get('outputs', []):
                if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = text(''.join(o['data']['text/markdown']))
            cells.append(c)
    for i,c in enumerate(cells): c['id'] = f'c{i}' if not c.get('id') else c['id']
    return {**nb.nb, 'cells': cells}

def api(nbs): # the page that lists every symbol
    out = ['---', 'title: Every symbol', 'description: The modules of ader, and what each holds', '---', '']
    for nb in nbs:
        if not nb.symbols: continue
        out += [f'## [{nb.module.__name__}]({nb.page}.ipynb)', '', '::: {.params}', '', '| symbol | what it is |', '|---|---|']
        out += [f'| [`{n}`]({nb.page}.html#{nb.anchors[n]}) | {in_cell((inspect.getdoc(o) or "").split(chr(10))[0]) if o.__doc__ else ""} |' for n,o in nb.symbols.items()]
        out += ['', ':::', '']
    return '\n'.join(out)

# ---- the site

def config(text, names): # `_quarto.yml` for the prepared pages: globs written out, numbers gone
    def paths(o): # a glob in `contents` is the notebooks it matches, in order
        if isinstance(o, list): return [p for x in o for p in (expand(x) if isinstance(x, str) else [paths(x)])]
        if isinstance(o, dict): return {k: paths(expand(v) if k == 'contents' and isinstance(v, str) else v) for k,v in o.items()}
        return rename(o) if isinstance(o, str) else o
    def expand(g): return [rename(g)] if not any(c in g for c in '*?[') else [f'{page(n)}.ipynb' for n in names if Path('nbs', n).match(g)]
    def rename(s): return f'{page(s)}.ipynb' if s.startswith('nbs/') and s.endswith('.ipynb') else s.removeprefix('nbs/')
    cfg = yaml.safe_load(text)
    render = cfg['project'].pop('render')
    cfg = paths(cfg)
    cfg['project']['render'] = [r.removeprefix('nbs/') for r in render]
    def full(o): # a group without pages is not shown
        return [x for x in o if not (isinstance(x, dict) and 'section' in x and not x['contents'])]
    side = cfg['website']['sidebar']
    side['contents'] = full(side['contents'])
    return cfg

def stage(proc):
    "Prepare everything that quarto or smalldocs reads, in the folder `proc`."
    shutil.rmtree(proc, ignore_errors=True)
    proc.mkdir(parents=True)
    nbs = [Notebook(p) for p in sorted(CFG.nbs_path.glob('*.ipynb')) if p.name[0] not in '_.']
    to = links(nbs)
    for nb in nbs: (proc/f'{nb.page}.ipynb').write_text(json.dumps(prepare(nb, to), ensure_ascii=False), encoding='utf-8')
    (proc/'api.qmd').write_text(api(nbs), encoding='utf-8')
    shutil.copytree(CFG.nbs_path/'images', proc/'images')
    for f in CFG.nbs_path.glob('*.css'): # with its fonts inside
        inside = lambda m: 'url(data:font/woff;base64,' + base64.b64encode((CFG.nbs_path/m[1]).read_bytes()).decode() + ')'
        (proc/f.name).write_text(re.sub(r'url\((fonts/\w+\.woff)\)', inside, f.read_text(encoding='utf-8')), encoding='utf-8')
    cfg = config((TOP/'_quarto.yml').read_text(encoding='utf-8'), [nb.path.name for nb in nbs])
    (proc/'_quarto.yml').write_text(yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True), encoding='utf-8')
    return cfg

def local(out): # smalldocs' site, without what it loads from afar
    for f in out.glob('*.html'): f.write_text(mathml(f.read_text(encoding='utf-8')), encoding='utf-8')
    for f in (out/'site_libs'/'themes').glob('*.css'):
        f.write_text(re.sub(r'@import url\([^)]*//fonts[^)]*\);?', '', f.read_text(encoding='utf-8')), encoding='utf-8')

def mathml(page): # smalldocs loads KaTeX from afar; every browser reads MathML, which quarto writes too (`html-math-method`)
    from latex2mathml.converter import convert
    def one(m):
        tex = html.unescape(m[2]).strip()[2:-2].strip().replace(r'\arg', r'\mathrm{arg}\,')
        tex = re.sub(r'\\[bB]ig+[lr]?\s*(?=\\Vert|\\\|)|\\big[lr]?\s*(?=[()[\]])', '', tex).replace('{aligned}', '{align*}') # it knows the large forms of brackets only
        out = convert(tex, display='block' if m[1] == 'display' else 'inline')
        out = re.sub(r'<mo ([^>]*minsize[^>]*)>([([{])', r'<mo form="prefix" \1>\2', out) # brackets are no operators between two terms
        out = re.sub(r'<mo ([^>]*minsize[^>]*)>([])}])', r'<mo form="postfix" \1>\2', out)
        out = re.sub('<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>', r'<mrow>\1<mo lspace="0.05em" rspace="0">&#x02032;</mo></mrow>', out) # in this font raised by itself
        out = re.sub(r'(?:<mi mathvariant="normal">\w</mi>){2,}', lambda w: f'<mi>{re.sub("<[^>]*>", "", w[0])}</mi>', out) # one word
        if '\\' in re.sub(r'<[^>]*>', '', out): raise SystemExit(f'this formula has a command that latex2mathml lacks: {tex}')
        return f'<span class="math {m[1]}">{out}</span>'
    s = re.sub(r'<span class="math (inline|display)">(.*?)</span>', one, page, flags=re.S)
    return re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\n?', '', s)

# ---- what was built

class Page(HTMLParser):
    "The links, pictures, anchors, tables and formulas of a page."
    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.refs, self.remote, self.text, self.math, self.mute = path, [], [], [], '', 0, 0
        self.html = path.read_text(encoding='utf-8')
        self.feed(self.html)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids += [o for o in (a.get('id'), a.get('data-anchor-id')) if o]
        for k in ('href', 'src'):
            if a.get(k) and not a[k].startswith('data:'):
                self.refs.append(a[k])
                if tag != 'a' and re.match('https?:|//', a[k]): self.remote.append(a[k])
        self.math += tag == 'math'
        self.mute += tag in ('code', 'script', 'style', 'pre')
    def handle_endtag(self, tag): self.mute -= tag in ('code', 'script', 'style', 'pre')
    def handle_data(self, s): self.text += '' if self.mute else s

def pages(out): return {p.relative_to(out).as_posix(): Page(p) for p in sorted(out.glob('*.html'))}

def broken(out):
    "The internal links and pictures that lead nowhere."
    all_, bad = pages(out), []
    for name,p in all_.items():
        for ref in p.refs:
            if re.match(r'[a-z]+:|//', ref): continue
            path, anchor = urldefrag(ref)
            path = unquote(path.partition('?')[0])
            to = (out/path if path else out/name).resolve()
            if to.is_dir(): to = to/'index.html'
            if not to.is_file(): bad.append(f'{name}: {ref}')
            elif anchor and to.suffix == '.html' and unquote(anchor) not in all_[to.relative_to(out.resolve()).as_posix()].ids: bad.append(f'{name}: {ref}')
    return bad

def build(out, proc):
    cfg = stage(proc)
    made = proc/cfg['project']['output-dir']
    if shutil.which('quarto'): subprocess.run(['quarto', 'render', str(proc), '--no-cache'], check=True)
    else:
        from smalldocs.site import build as smalldocs
        for o in smalldocs(proc, quiet=True).warnings:
            if not re.search('html-math-method|grid', o): print(o, file=sys.stderr) # quarto's alone
        local(made)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(made, out)
    if bad := broken(out): raise SystemExit('these links and pictures lead nowhere:\n' + '\n'.join(bad))
    print(f'{len(list(out.glob("*.html")))} pages in {out}')

if __name__ == '__main__': build(Path(sys.argv[1] if len(sys.argv) > 1 else TOP/'_docs').resolve(), TOP/'_proc')
