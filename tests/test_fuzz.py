"Whatever is typed, given or lies in a file: success, or one sentence of `AderError`; no traceback from the depths, no hang, no half-written file, no code from elsewhere."
import copy, hashlib, io, json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from ader import attacks, attention, data, evaluation, checkpoints, cli, losses, methods, networks, teachers, weighting
from ader.data import AderError

pytestmark = pytest.mark.filterwarnings('ignore')

numbers = st.one_of(st.sampled_from([0, 1, -1, 2, 0.5, -0.5, 1e-30, 1e30, float('nan'), float('inf'), -float('inf'), 2**40, -2**40]), st.integers(-5, 70), st.floats(-3, 3))
words = st.one_of(st.sampled_from(['', 'Linf', 'L2', 'x_adv', 'T||S', 'sum', 'softmax', 'both', 'uniform', 'ce', 'kl', 'batchmean', 'branch', 'trades', 'ä/\0', '../x']), st.text(max_size=6))
whatever = st.one_of(numbers, words, st.none(), st.booleans(), st.lists(numbers, max_size=3), st.dictionaries(words, numbers, max_size=2))
sentence = lambda e: str(e).strip() and '\nTraceback' not in str(e) and len(str(e)) > 8

def fits(f, *args, **kwargs):
    "The result, or None for a refusal."
    try: return f(*args, **kwargs)
    except AderError as e: assert sentence(e)


# Constructors

Net = lambda: attention.add_attention(networks.small_resnet(width=2))
def threat(v): return fits(attacks.Threat, *v)
some_threat = st.tuples(numbers, st.sampled_from(['Linf', 'L2'])).map(threat).map(lambda o: o or attacks.Threat())

CONSTRUCTORS = { # name -> (function of the drawn numbers and words, how many of each)
    'Threat': (attacks.Threat, 'nwnn'), 'FGSM': (lambda t: attacks.FGSM(t), 't'), 'PGD_sat': (attacks.PGD_sat, 'tn'), 'PGD_trades': (attacks.PGD_trades, 'tn'), 'CW_inf': (attacks.CW_inf, 'tn'),
    'PGD': (lambda t, n, s, a, b, r: attacks.PGD(t, n, s, a, b, restarts=r), 'tnnwwn'), 'Square': (attacks.Square, 'tn'), 'AutoAttack': (attacks.AutoAttack, 'tw'), 'Transfer': (lambda w: attacks.Transfer(w), 'w'),
    'AdaptiveWeight': (weighting.AdaptiveWeight, 'nn'), 'ConstantWeight': (weighting.ConstantWeight, 'n'), 'AnnealedWeight': (weighting.AnnealedWeight, 'nn'),
    'AttentionBlock': (attention.AttentionBlock, 'sss'), 'attend': (lambda n: attention.add_attention(networks.small_resnet(width=2), n), 's'), 'InputAdapter': (lambda c, s, m, d: attention.InputAdapter(Net(), c, s, m, d), 'ssnn'),
    'AttachedAttention': (lambda w: teachers.AttachedAttention(networks.small_resnet(width=2), w), 'w'),
    'Resume': (checkpoints.Resume, 'w'), 'teacher_loss': (lambda *a: losses.teacher_loss(some, some, *a), 'nnwwnw'), 'soft_kl': (lambda t, d: losses.soft_kl(some.logits, some.logits, t, d), 'nw'),
    'distillation_loss': (lambda a, t, d: losses.distillation_loss(some.logits, some.logits, torch.tensor([0]), a, t, d), 'nnw'),
}
some = attention.AttentionOutput(torch.zeros(1, 2), torch.ones(1, 1, 2, 2), None)
KINDS = dict(n=numbers, w=words, t=some_threat, s=st.one_of(st.integers(-2, 5), st.sampled_from([0.5, 2**40, float('nan')])), m=st.floats(-1, 0.3))

@pytest.mark.parametrize('name', CONSTRUCTORS)
@settings(max_examples=25)
@given(d=st.data())
def test_constructors(name, d):
    f, kinds = CONSTRUCTORS[name]
    fits(f, *[d.draw(KINDS[k]) for k in kinds])

@pytest.mark.parametrize('name', methods.methods)
@settings(max_examples=25)
@given(d=st.data())
def test_methods(name, d):
    known = methods._settings_of(methods.methods[name])
    pool = {k: words if isinstance(v, str) else st.lists(numbers, max_size=3).map(tuple) if isinstance(v, tuple) else st.none() if k in ('weight', 'threat') else numbers for k,v in known.items()}
    names = d.draw(st.lists(st.sampled_from([*known, 'nonsense']), unique=True, max_size=4))
    fits(methods.make_method, name, Net(), d.draw(st.sampled_from([Net(), None])), **{k: d.draw(pool.get(k, numbers)) for k in names})


# Command lines

class Reached(Exception): "The command got past its doors."

VALUES = st.one_of(numbers.map(str), st.sampled_from(['', '8/255', '1/0', 'nan', '1e999', '--', 'small_resnet', 'small_resnet:width=', 'small_resnet:width=[1]', 'small_resnet:width=99999999999', 'wide_resnet:depth=[', 'resnet18:x=y',
                                                      'mobilenet_v2:width_mult=nan', 'digits', '/dev/null', '/', '.', 'ADER', 'RSLAD', 'natural', 'nobody.json', '/proc/1/mem', ',', 'a' * 300]), st.text(max_size=5).filter(lambda s: '\ud800' > s[:1] or True))
OPTIONS = dict(teach='data net method epochs lr bs eps seed images', distill='method student clean robust data epochs lr bs eps seed images', evaluate='data eps norm images transfer queries seed', demo='eps epochs seed workers')

@pytest.fixture
def doors(monkeypatch, tmp_path):
    "Everything that takes long stops the command instead: it got in."
    def reached(*args, **kwargs): raise Reached
    for f in ('train', 'robustness_report', '_demo_nets'): monkeypatch.setattr(cli, f, reached)
    monkeypatch.chdir(tmp_path)
    checkpoints.save(Net(), tmp_path/'t')
    return tmp_path

def call(cli, argv):
    "Exit code, or 'in', and what it says."
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try: code = cli(argv) or 0
        except Reached: code = 'in'
        except SystemExit as e: code = e.code
    return code, out.getvalue(), err.getvalue()

@pytest.mark.parametrize('name', OPTIONS)
@settings(max_examples=25)
@given(d=st.data())
def test_command_lines(name, doors, d):
    "Past the door, or exit code 2 and a line that begins with the command's name; in the folder nothing was left."
    names = d.draw(st.lists(st.sampled_from(OPTIONS[name].split()), unique=True, max_size=3))
    argv = [o for k in names for o in (f'--{k}', d.draw(VALUES))] + ['--out', str(doors/'out')]
    if name == 'evaluate': argv.insert(0, d.draw(st.one_of(VALUES, st.just('t.json'))))
    before = {o: o.read_bytes() for o in doors.iterdir() if o.is_file()}
    code, out, err = call(cli.command, [f'ader_{name}', *argv])
    assert code in ('in', 2), (argv, code)
    if code == 2: assert err.strip().splitlines()[-1].startswith(f'ader_{name}: ') and 'Traceback' not in err, err
    assert {o: o.read_bytes() for o in doors.iterdir() if o.is_file()} == before
    assert not (doors/'out').exists() or [o for o in (doors/'out').rglob('*') if o.is_file()] == []


# Files from elsewhere

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    d = tmp_path_factory.mktemp('saved')
    t = attention.InputAdapter(Net(), 1, 8)
    t.metadata = dict(classes=list('ab'), image=[1,8,8], threat=dict(eps=0.2, norm='Linf'))
    checkpoints.save(t, d/'t')
    return json.loads((d/'t.json').read_text()), (d/'t.safetensors').read_bytes()

def places(o, path=()):
    "The way to everything inside."
    yield path
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o) if isinstance(o, list) else ()): yield from places(v, (*path, k))

def put(o, path, value):
    "A copy with `value` at that place; at the top, `value` itself."
    if not path: return value
    o = copy.copy(o)
    o[path[0]] = put(o[path[0]], path[1:], value)
    return o

evil = st.one_of(whatever, st.sampled_from([10**9, 10**20, [10**9]*2, 'add_attention', 'input_adapter', 'robustbench', '__import__', dict(arch='small_resnet', width=10**5), dict(arch='wide_resnet', depth=994, widen=1000)]))

@settings(max_examples=25)
@given(d=st.data())
def test_descriptions(saved, tmp_path, d):
    "Something else at any place of the JSON file."
    about, weights = saved
    changed = put(about, d.draw(st.sampled_from(list(places(about)))), d.draw(evil))
    (tmp_path/'t.json').write_text(json.dumps(changed)), (tmp_path/'t.safetensors').write_bytes(weights)
    net = fits(checkpoints.load, tmp_path/'t')
    if net is not None: assert isinstance(net.metadata, dict) and isinstance(fits(net, torch.rand(1,1,8,8)), (torch.Tensor, type(None)))

@settings(max_examples=25)
@given(at=st.integers(0, 10**6), new=st.binary(max_size=4), cut=st.integers(0, 4000))
def test_weights(saved, tmp_path, at, new, cut):
    "Other bytes anywhere, with a checksum that fits them."
    about, weights = saved
    at %= len(weights) if cut % 2 else 600 # the header is at the beginning
    weights = (weights[:at] + new + weights[at+len(new):])[:len(weights) - (cut if cut > 2000 else 0)]
    (tmp_path/'t.json').write_text(json.dumps(about | dict(sha256=hashlib.sha256(weights).hexdigest()))), (tmp_path/'t.safetensors').write_bytes(weights)
    fits(checkpoints.load, tmp_path/'t')

def test_deep_json(tmp_path):
    (tmp_path/'t.json').write_text('{"config":'*100_000)
    with pytest.raises(AderError, match='is not JSON'): checkpoints.load(tmp_path/'t')
    config = dict(arch='small_resnet')
    for _ in range(400): config = dict(arch='input_adapter', net=config)
    (tmp_path/'t.json').write_text(json.dumps(dict(config=config, sha256=hashlib.sha256(b'').hexdigest()))), (tmp_path/'t.safetensors').write_bytes(b'')
    with pytest.raises(AderError): checkpoints.load(tmp_path/'t')


def test_names_lead_nowhere_else(doors):
    "What is written by ader_evaluate is named after what it judges, and stays in its folder."
    sub = doors/'..evil'
    sub.mkdir()
    for n in ('..', '.x'): fits(checkpoints.save, Net(), sub/f'{n}t')
    code, out, err = call(cli.command, ['ader_evaluate', f'{sub}/..t,{sub}/.xt', '--out', str(doors/'out')])
    assert code in ('in', 2) and {o.name for o in doors.iterdir()} == {'t.json', 't.safetensors', '..evil', 'out'}
