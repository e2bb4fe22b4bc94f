"Killed, damaged or out of space: what was saved stays, a training goes on with the same bits."
import hashlib, io, json, os, random, resource, signal, subprocess, time
from contextlib import redirect_stdout
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
import ader.checkpoints
from ader.attention import add_attention
from ader.checkpoints import (Resume, load, save, _read_checkpoint, _write_checkpoint,
                              _atomic_write, _read_json, _remove_temp_files)
from ader.data import AderError
from ader.methods import ADER, TRADES, make_method, methods
from ader.networks import mobilenet_v2, resnet18, small_resnet
from ader.teachers import train
from ader.training import SAT, Method, Natural, WeightEMA
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.learner import Learner

def same(a, b):
    "Equal to the last bit, whatever the nesting."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b

def names(folder): return sorted(f.name for f in folder.iterdir())

def contents(folder): return {f.name: f.read_bytes() for f in folder.iterdir()}

class Stop(Exception): pass

class StopAt(Callback):
    "An exception that nobody expects, at one event of one step."
    def __init__(self, event, epoch, step, order=70):
        def f():
            if self.epoch == epoch and self.iter == step: raise Stop('here')
        setattr(self, event, f)
        self.run_valid, self.order = event == 'after_pred', order

def fit(learn, epochs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 1e-2)
    return learn

def records(learn):
    "All that a training leaves, but for times."
    method, r = next(c for c in learn.cbs if isinstance(c, Method)), learn.recorder
    terms = {k: torch.stack(v) for k,v in method.terms.items()}
    return dict(weights=learn.model.state_dict(), terms=terms, values=r.values, iters=r.iters,
                lrs=r.lrs, losses=[o.item() for o in r.losses])

# ---- trainings that continue -----------------------------------------------------------------

@pytest.fixture(scope='module')
def pair():
    "A clean and an adversarial teacher, untrained."
    torch.manual_seed(5)
    return [add_attention(small_resnet(width=4)).eval() for _ in range(2)]

@pytest.fixture
def distil(pair, small):
    "A function that distils a student for three epochs of three steps."
    def f(resume=None, cbs=None, seed=0, epochs=3):
        torch.manual_seed(9)
        net, method = add_attention(small_resnet(width=4)), ADER(*pair, steps=2)
        more = dict(seed=seed, progress=False, cbs=cbs, resume=resume)
        return train(method, net, small(), epochs, **more)
    return f

WHOLE = {}

@pytest.fixture
def whole(distil):
    "The records of the training that was never stopped."
    if not WHOLE: WHOLE.update(records(distil()))
    return WHOLE

EVENTS = 'before_batch', 'after_pred', 'after_backward', 'after_step', 'after_batch'

@settings(max_examples=5)
@given(event=st.sampled_from(EVENTS), epoch=st.integers(0, 2), step=st.integers(0, 2))
def test_stopped_at_any_moment_and_continued(distil, whole, tmp_path_factory, event, epoch, step):
    path = tmp_path_factory.mktemp('ckpt')/'x'
    with pytest.raises(Stop): distil(path, StopAt(event, epoch, step))
    torch.rand(7)
    random.random()
    assert same(records(distil(path)), whole)
    assert names(path.parent) == ['x-0002.ckpt', 'x-0003.ckpt']

@pytest.mark.parametrize('name', methods)
def test_every_method_continues(pair, small, tmp_path, name):
    "Whatever a method, or an average of the weights, remembers from step to step."
    def go(resume=None, cbs=None):
        torch.manual_seed(3)
        method = make_method(name, *pair, steps=1)
        net = add_attention(small_resnet(width=4))
        return records(train(method, net, small(40, 10), 2, seed=1, progress=False, resume=resume,
                             cbs=[WeightEMA(0.9, 'clean'), *(cbs or [])]))
    with pytest.raises(Stop): go(tmp_path/'x', [StopAt('before_batch', 1, 1)])
    assert same(go(), go(tmp_path/'x'))

@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_loaders_with_a_generator_of_their_own(all_digits, plain, tmp_path, kind):
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    x, y = all_digits.train.dataset[:60]
    class Rows(torch.utils.data.Dataset):
        loss_func = nn.CrossEntropyLoss()
        def __len__(self): return 60
        def __getitem__(self, i): return x[i], y[i]
    def go(path, *cbs):
        torch.manual_seed(0)
        random.seed(0)
        make = DataLoader if kind == 'fastai' else torch.utils.data.DataLoader
        loaders = make(Rows(), batch_size=20, shuffle=True), make(Rows(), batch_size=20)
        dls = DataLoaders(*loaders, device='cpu')
        return records(fit(Learner(dls, plain(), cbs=[Natural(), Resume(path), *cbs]), 3))
    with pytest.raises(Stop): go(tmp_path/'x', StopAt('before_batch', 2, 1))
    assert same(go(tmp_path/'x'), go(tmp_path/'y'))

class OnCPU(MixedPrecision):
    "fastai's callback with torch's scaler for the CPU."
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=64., growth_interval=2)

def test_the_scaler_of_mixed_precision_continues(small, net, tmp_path):
    def go(path, *cbs):
        torch.manual_seed(0)
        keep = lambda self: setattr(self, 'seen', self.scaler.state_dict())
        scales = type('Scales', (Callback,), dict(after_epoch=keep))()
        cbs = [SAT(steps=1), OnCPU(), Resume(path), scales, *cbs]
        learn = fit(Learner(small(), net(), cbs=cbs), 3)
        return learn.model.state_dict(), scales.seen
    with pytest.raises(Stop): go(tmp_path/'x', StopAt('before_batch', 2, 1, order=5))
    a, b = go(tmp_path/'x'), go(tmp_path/'y')
    assert same(a, b)
    assert a[1]['scale'] == 64*2**4 and a[1]['_growth_tracker'] == 1 # 9 steps, doubled every two

def test_validation_between(small, plain, tmp_path):
    def go(*cbs):
        torch.manual_seed(0)
        cbs = [Natural(), Resume(tmp_path/'x'), *cbs]
        return fit(Learner(small(), plain(), cbs=cbs), 5)
    with pytest.raises(Stop): go(StopAt('before_batch', 3, 1))
    a = go()
    found, before, weights = records(a), contents(tmp_path), a.model.state_dict()
    with a.no_bar():
        a.validate()
        a.get_preds()
    assert contents(tmp_path) == before and same(a.model.state_dict(), weights)
    a.resume.clear()
    assert same(found, records(go()))

def test_only_its_own_files_are_removed(small, plain, tmp_path):
    others = ['x-0001.ckpt.bak', 'x-y-0001.ckpt', 'x.ckpt', 'xx-0001.ckpt']
    for n in others: (tmp_path/n).write_text('')
    (tmp_path/'.x-0007.ckpt.123').write_text('half written')
    learn = train(Natural(), plain(), small(), 1, progress=False, resume=tmp_path/'x')
    assert [f.name for f in learn.resume.files()] == ['x-0001.ckpt']
    learn.resume.clear()
    assert names(tmp_path) == others

# ---- checkpoints that are not used -----------------------------------------------------------

@pytest.mark.parametrize('cut', [0, 32, -1])
def test_instead_of_a_damaged_checkpoint_the_one_before(distil, whole, tmp_path, capsys, cut):
    with pytest.raises(Stop): distil(tmp_path/'x', StopAt('before_batch', 2, 1))
    f = tmp_path/'x-0002.ckpt'
    f.write_bytes(f.read_bytes()[:cut])
    if cut == 0: (tmp_path/'x-0001.ckpt').write_bytes(b'nothing') # then from the start
    capsys.readouterr()
    assert same(records(distil(tmp_path/'x')), whole)
    out = capsys.readouterr().out
    assert 'x-0002.ckpt is damaged' in out
    assert ('continuing after epoch 1 of 3' in out) == (cut != 0)

@given(at=st.floats(0, 1, exclude_max=True))
def test_any_flipped_bit_is_noticed(tmp_path_factory, at):
    f = tmp_path_factory.mktemp('bit')/'c'
    _write_checkpoint(f, dict(a=torch.arange(5)))
    data = bytearray(f.read_bytes())
    data[int(at*len(data))] ^= 1
    f.write_bytes(bytes(data))
    assert _read_checkpoint(f) is None

def test_another_training_is_refused(distil, small, plain, tmp_path):
    with pytest.raises(Stop): distil(tmp_path/'x', StopAt('before_batch', 1, 1))
    before = contents(tmp_path)
    for change in (dict(epochs=4), dict(seed=1)):
        word = next(iter(change))
        with pytest.raises(AderError, match=f'another training .*{word} was'):
            distil(tmp_path/'x', **change)
    assert contents(tmp_path) == before
    def go(method, **kw):
        train(method, plain(**kw), small(), 1, progress=False, resume=tmp_path/'y')
    go(TRADES(steps=1))
    for other in (SAT(steps=1), TRADES(steps=2), TRADES(5., steps=1)):
        with pytest.raises(AderError, match='another training'): go(other)
    with pytest.raises(AderError, match='net was'): go(TRADES(steps=1), blocks=2)

class Evil:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)

def forge(f, d):
    buf = io.BytesIO()
    torch.save(d, buf)
    f.write_bytes(hashlib.sha256(buf.getvalue()).digest() + buf.getvalue())

@pytest.mark.parametrize('what', ['code', 'list', 'empty', 'no model', 'other model', 'folder'])
def test_checkpoints_that_only_look_right(small, plain, tmp_path, what):
    "Whole by their checksum, and yet not ours: one sentence, and no code runs."
    f = tmp_path/'x-0001.ckpt'
    def go(): train(Natural(), plain(), small(), 2, progress=False, resume=tmp_path/'x')
    go()
    d = _read_checkpoint(f)
    for o in tmp_path.iterdir(): o.unlink()
    objects = d['objects']
    forged = {'code': Evil(tmp_path/'evil'), 'list': [1], 'empty': {},
              'no model': d | dict(objects={k: v for k,v in objects.items() if k != 'model'}),
              'other model': d | dict(objects=objects | dict(model={'w': torch.ones(1)}))}
    f.mkdir() if what == 'folder' else forge(f, forged[what])
    with pytest.raises(AderError, match="remove|can't read"): go()
    assert names(tmp_path) == ['x-0001.ckpt']

@pytest.mark.parametrize('after', ['an explosion', 'a last step'])
def test_what_is_not_finite_is_not_kept(small, net, tmp_path, after):
    "The last good checkpoint is there, and the training that is mended continues from it."
    class Bad(Natural):
        mended = False
        def loss(self, *args):
            bad = not self.mended and after == 'an explosion' and (self.epoch, self.iter) == (1, 1)
            return super().loss(*args)*(float('nan') if bad else 1)
        def after_train(self):
            if not self.mended and after == 'a last step' and self.epoch == 1:
                next(self.model.parameters()).data[0] = torch.nan
    def go(): fit(Learner(small(), net(), cbs=[Bad(), Resume(tmp_path/'x')]), 3)
    message = 'became nan in epoch 1' if after == 'an explosion' else 'not finite after epoch 1'
    with pytest.raises(AderError, match=message): go()
    assert names(tmp_path) == ['x-0001.ckpt']
    Bad.mended = True
    go()

# ---- killed ----------------------------------------------------------------------------------

def training(folder, dls):
    torch.manual_seed(5)
    teachers = [add_attention(small_resnet(width=4)).eval() for _ in range(2)]
    student = add_attention(small_resnet(width=4))
    learn = train(ADER(*teachers, steps=1), student, dls, 3, progress=False, resume=folder/'x')
    save(learn.model, folder/'x')

def slow_open(path, *args):
    "Writes piece by piece, with time for a kill in between."
    f = open(path, *args)
    if 'w' not in ''.join(args): return f
    class Slow:
        def __enter__(self): return self
        def __exit__(self, *e): f.close()
        def __getattr__(self, k): return getattr(f, k)
        def write(self, data):
            for i in range(0, len(data), 4096):
                f.write(data[i:i+4096])
                f.flush()
                time.sleep(0.002)
    return Slow()

def start(folder, dls, log, slow): # a training in a forked process
    pid = os.fork()
    if pid: return pid
    try:
        if slow: ader.checkpoints.open = slow_open
        with open(log, 'a', buffering=1) as o, redirect_stdout(o): training(folder, dls)
        os._exit(0)
    except BaseException as e: log.write_text(f'FAILED {e!r}')
    finally: os._exit(1)

def ended(pid): # has it, by itself?
    done, status = os.waitpid(pid, os.WNOHANG)
    assert not (done and status), 'it failed by itself'
    return bool(done)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='it forks')
def test_killed_at_5_moments(few_digits, tmp_path):
    "By SIGKILL, every other time while a file is being written; all that is saved is the same."
    log, rng, begin = tmp_path/'log', random.Random(0), time.time()
    training(tmp_path/'whole', few_digits())
    took, made, n, writing = time.time() - begin, 0, 0, 0
    while made < 5:
        folder = tmp_path/f'killed-{n}'
        while made < 5:
            slow, before = made % 2 == 1, set(folder.glob('.*'))
            until, gone = time.time() + rng.random()*took*0.8, False
            pid = start(folder, few_digits(), log, slow)
            if slow: # wait for a file that is being written, and then for some of it
                while not (gone := ended(pid)) and not set(folder.glob('.*')) - before:
                    time.sleep(0.001)
                until = time.time() + rng.random()*0.05
            while not gone and time.time() < until and not (gone := ended(pid)): time.sleep(0.001)
            if gone: break # finished first; the next kills are of another training
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            made += 1
            writing += any(o.stat().st_size for o in folder.glob('.*'))
        n += 1
    with redirect_stdout(io.StringIO()) as out:
        for i in range(n): training(tmp_path/f'killed-{i}', few_digits())
    said = log.read_text() + out.getvalue()
    assert writing >= 2 and 'continuing after epoch' in said and 'FAILED' not in said
    assert 'damaged' not in said
    for folder in tmp_path.glob('killed-*'):
        for name in ('x-0002.ckpt', 'x-0003.ckpt'):
            got, want = (_read_checkpoint(d/name) for d in (folder, tmp_path/'whole'))
            for k in want.keys() - {'seconds'}: assert same(got[k], want[k]), (folder.name, name, k)
        for name in ('x.safetensors', 'x.json'):
            assert (folder/name).read_bytes() == (tmp_path/'whole'/name).read_bytes()
        Resume(folder/'x').clear()
        _remove_temp_files(folder)
        assert names(folder) == ['x.json', 'x.safetensors']

# ---- whole files -----------------------------------------------------------------------------

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    _atomic_write(tmp_path/'f', b'whole')
    def full(*_): raise OSError(28, 'No space left on device')
    for broken in ('fsync', 'replace'):
        with monkeypatch.context() as m:
            m.setattr(os, broken, full)
            with pytest.raises(AderError, match='No space left'): _atomic_write(tmp_path/'f', b'new')
        assert contents(tmp_path) == {'f': b'whole'}

@pytest.fixture
def disk(tmp_path):
    "A disk of 2 MB in memory."
    d = tmp_path/'disk'
    d.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', d]
    if subprocess.run(mount, capture_output=True).returncode: pytest.skip('tmpfs is not allowed')
    yield d
    subprocess.run(['umount', '-l', str(d)], check=True)

def test_a_full_disk_loses_nothing(distil, whole, disk):
    "Neither checkpoints nor a saved network, and with room the training continues."
    class Fill(Callback):
        order = 64
        def after_epoch(self):
            if self.epoch == 1: (disk/'filler').write_bytes(bytes(room))
    save(small_resnet(width=4), disk/'net')
    distil(disk/'x', epochs=1)
    used = os.statvfs(disk)
    Resume(disk/'x').clear()
    room = used.f_bavail*used.f_frsize
    with pytest.raises(AderError, match='x-0002.ckpt: No space left on device; what was there'):
        distil(disk/'x', Fill())
    assert names(disk) == ['filler', 'net.json', 'net.safetensors', 'x-0001.ckpt']
    before = contents(disk)
    with pytest.raises(AderError, match="can't write .*net.safetensors and .*net.json: No space"):
        save(small_resnet(width=32), disk/'net')
    assert contents(disk) == before and load(disk/'net')
    (disk/'filler').unlink()
    assert same(records(distil(disk/'x')), whole)

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='it forks')
def test_a_limit_on_the_size_of_files(tmp_path):
    old = {tmp_path/'a': b'old', tmp_path/'b': b'old'}
    _atomic_write(old)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try: _atomic_write({tmp_path/'a': bytes(10), tmp_path/'b': bytes(2000)})
        except AderError as e: os._exit(0 if 'File too large' in str(e) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert contents(tmp_path) == dict(a=b'old', b=b'old')

# ---- saved networks --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A small network in files, and the bytes of both."
    path = tmp_path_factory.mktemp('saved')/'net'
    save(add_attention(small_resnet(width=4)), path)
    return path, *(path.with_suffix(s).read_bytes() for s in ('.safetensors', '.json'))

NETS = [small_resnet, lambda: mobilenet_v2(1, 3), lambda: resnet18(classes=100),
        lambda: small_resnet(2, 8, 3, 5, 3, mean=[.1,.2,.3], std=[.4,.5,.6])]

@pytest.mark.parametrize('make', NETS)
@pytest.mark.parametrize('wrap', [lambda n: n, add_attention])
def test_round_trip(make, wrap, tmp_path):
    net = wrap(make()).eval()
    save(net, tmp_path/'a.b'/'eps0.2', note='ε') # a dot in a name is no suffix
    assert names(tmp_path/'a.b') == ['eps0.2.json', 'eps0.2.safetensors']
    twin, x = load(tmp_path/'a.b'/'eps0.2.json'), torch.rand(2, net.in_channels, 32, 32)
    with torch.no_grad(): assert torch.equal(net(x), twin(x))
    assert twin.metadata == {'note': 'ε'} and twin.config == net.config and not twin.training

@given(at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_damaged_weights_are_refused(saved, at, cut):
    path, weights, _ = saved
    i, f = int(at*len(weights)), path.with_suffix('.safetensors')
    f.write_bytes(weights[:i] + (b'' if cut else bytes([weights[i] ^ 1]) + weights[i+1:]))
    try:
        with pytest.raises(AderError, match='damaged'): load(path)
    finally: f.write_bytes(weights)

ATOMS = st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=8)
JSON = st.recursive(ATOMS, lambda s: st.lists(s, max_size=3)
                    | st.dictionaries(st.text(max_size=8), s, max_size=3), max_leaves=8)
KEYS = ['arch', 'blocks', 'width', 'in_channels', 'classes', 'stages', 'mean', 'std', 'other']

@given(key=st.sampled_from([None, *KEYS]), value=JSON)
def test_another_description_is_refused_or_fits(saved, key, value):
    path, _, about = saved
    d = json.loads(about)
    if key: d['config']['net'][key] = value
    f = path.with_suffix('.json')
    f.write_text(json.dumps(d if key else value))
    try: assert load(path)(torch.rand(2,1,8,8)).shape == (2,10) and key
    except AderError: pass
    finally: f.write_bytes(about)

def test_what_cannot_be_saved_or_loaded(saved, tmp_path):
    path = saved[0]
    save(nn.Linear(2, 2), tmp_path/'x') # which doesn't say how it is built
    with pytest.raises(AderError, match='into=net'): load(tmp_path/'x')
    with pytest.raises(AderError, match='there is no file'): load(tmp_path/'nobody')
    with pytest.raises(AderError, match='do not make a network'):
        load(path, into=add_attention(small_resnet(width=8)))
    (tmp_path/'file.json').write_text('[1]')
    with pytest.raises(AderError, match='holds a list'): _read_json(tmp_path/'file.json')
    with pytest.raises(AderError, match="can't write"):
        save(load(path), tmp_path/'file.json'/'net')
    save(load(path), tmp_path/'net')
    before = contents(tmp_path)
    with pytest.raises(TypeError): save(load(path), tmp_path/'net', fact=object())
    assert contents(tmp_path) == before
