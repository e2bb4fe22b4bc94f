"Killed, out of space, or blown up: what was saved stays, and the same command goes on from there."
import json, os, random, re, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from ader.attention import attend
from ader.data import AderError
from ader.methods import ADER, Natural, SAT
from ader.networks import small_resnet
from ader.recipes import ader_distill, ader_distill_cli
from ader.teachers import Resumable, load, read_checkpoint, save, sweep, train, write_all, write_checkpoint
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.learner import Learner

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='these tests fork')

def same(a, b):
    "Equal to the last bit, whatever the nesting."
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Killed

KILLER = '''
"Starts a training in processes of its own, kills them, and says when; the libraries are imported once."
import os, random, signal, sys, time, torch
from pathlib import Path
import ader.teachers
from ader.attention import attend
from ader.data import digits
from ader.methods import ADER
from ader.networks import small_resnet
torch.set_num_threads(1)
out, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))

def teachers():
    torch.manual_seed(5)
    return [attend(small_resnet(width=4)).eval() for _ in range(2)]

def training(folder):
    dls = digits(bs=250, device='cpu')
    torch.manual_seed(9)
    learn = ader.teachers.train(ADER(*teachers(), steps=1), attend(small_resnet(width=4)), dls, 6, progress=False, resume=folder/'x')
    ader.teachers.save(learn.model, folder/'x')

def slow_open(path, *args):
    "Writes piece by piece, with time for a kill in between."
    f = open(path, *args)
    if 'w' not in ''.join(args): return f
    write = f.write
    class Slow:
        def __enter__(self): return self
        def __exit__(self, *e): f.close()
        def __getattr__(self, k): return getattr(f, k)
        def write(self, data):
            for i in range(0, len(data), 4096): write(data[i:i+4096]), f.flush(), time.sleep(0.002)
    return Slow()

def start(folder, slow):
    pid = os.fork()
    if pid: return pid
    if slow: ader.teachers.open = slow_open
    try: training(folder)
    except BaseException as e:
        print('FAILED', repr(e), flush=True)
        os._exit(1)
    os._exit(0)

def ended(pid): # has it, by itself?
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and status: sys.exit('it failed by itself')
    return bool(done)

def halves(folder): return [o for o in folder.glob('.*') if o.stat().st_size] # half-written files

begin = time.time()
training(out/'whole')
took, made, n = time.time() - begin, 0, 0
while made < kills:
    folder = out/f'killed-{n}'
    while made < kills:
        slow, before, until = made % 2 == 1, set(folder.glob('.*')), time.time() + rng.random()*took*0.8
        pid = start(folder, slow)
        if slow: # wait for a file that is being written, and then for some of it
            while not (gone := ended(pid)) and not set(folder.glob('.*')) - before: time.sleep(0.001)
            until = time.time() + rng.random()*0.05
        else: gone = False
        while not gone and time.time() < until and not (gone := ended(pid)): time.sleep(0.001)
        if gone: break # finished first; the next kills are of another training
        os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
        made += 1
        print('killed', folder.name, [o.name for o in sorted(folder.glob('*.ckpt'))], 'writing' if halves(folder) else '', flush=True)
    n += 1
for i in range(n): training(out/f'killed-{i}')
'''

@pytest.mark.parametrize('seed', [0])
def test_killed_at_20_moments(tmp_path, seed):
    "SIGKILL, every other time while a file is being written; model, optimiser, ω with its first losses, random states and records end as if nothing had been."
    (tmp_path/'killer.py').write_text(KILLER)
    r = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'killer.py', tmp_path, '20', str(seed)], capture_output=True, text=True, timeout=500)
    print(r.stdout, r.stderr)
    assert r.returncode == 0 and not r.stderr
    kills = re.findall('^killed .*', r.stdout, re.M)
    assert len(kills) == 20 and sum('writing' in o for o in kills) >= 5 and 'continuing after epoch' in r.stdout and 'damaged' not in r.stdout
    want = {f.name: read_checkpoint(f) for f in (tmp_path/'whole').glob('*.ckpt')}
    assert sorted(want) == ['x-0005.ckpt', 'x-0006.ckpt'] and want['x-0006.ckpt']['cbs']['ader']['weight']['first'] is not None
    folders = sorted(tmp_path.glob('killed-*'))
    for folder in folders:
        for name,w in want.items():
            got = read_checkpoint(folder/name)
            for k in w.keys() - {'seconds'}: assert same(got[k], w[k]), (folder.name, name, k)
        for f in ('x.safetensors', 'x.json'): assert (folder/f).read_bytes() == (tmp_path/'whole'/f).read_bytes()
        Resumable(folder/'x').clear(), sweep(folder)
        assert sorted(o.name for o in folder.iterdir()) == ['x.json', 'x.safetensors']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Two teachers in files."
    folder = tmp_path_factory.mktemp('teachers')
    torch.manual_seed(5)
    return [save(attend(small_resnet(width=4)), folder/k) for k in ('clean', 'robust')]

def distil(saved, out, *more):
    return ['--clean', saved[0], '--robust', saved[1], '--student', 'small_resnet:width=4', '--bs', 250, '--epochs', 3, '--images', 30, '--out', out, *more]

def run(cli, *argv):
    try: return cli(list(map(str, argv))) or 0
    except SystemExit as e: return e.code

@pytest.mark.parametrize('where', ['ader.teachers.write_checkpoint', 'ader.recipes.robustness', 'ader.recipes.report_page', 'ader.recipes.save', 'ader.teachers.os.replace'])
def test_ader_distill_goes_on(saved, tmp_path, monkeypatch, capsys, where):
    "Whatever it was doing when it stopped; afterwards nothing but the results is there, and a third call has nothing to do."
    module, _, name = where.rpartition('.')
    calls, f = [], __import__('pkgutil').resolve_name(where)
    class Killed(BaseException): pass
    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == (2 if 'ader.recipes' not in where else 1): raise Killed
        return f(*args, **kwargs)
    assert run(ader_distill_cli, *distil(saved, tmp_path/'whole')) == 0
    with monkeypatch.context() as m:
        m.setattr(where, stops)
        with pytest.raises(Killed): ader_distill_cli(list(map(str, distil(saved, tmp_path/'x'))))
    capsys.readouterr()
    assert run(ader_distill_cli, *distil(saved, tmp_path/'x')) == 0
    assert 'continuing after epoch' in capsys.readouterr().out
    assert sorted(o.name for o in (tmp_path/'x').iterdir()) == ['report.html', 'student.json', 'student.safetensors']
    for o in ('student.safetensors', 'student.json'): assert (tmp_path/'x'/o).read_bytes() == (tmp_path/'whole'/o).read_bytes()
    before = {o: o.read_bytes() for o in (tmp_path/'x').iterdir()}
    assert run(ader_distill_cli, *distil(saved, tmp_path/'x')) == 0 and 'is there already' in capsys.readouterr().out
    assert run(ader_distill_cli, *distil(saved, tmp_path/'x', '--seed', 1)) == 2 and 'is another student (seed 0, not 1)' in capsys.readouterr().err
    assert run(ader_distill_cli, *distil(saved[::-1], tmp_path/'x')) == 2 and 'is another student (clean ' in capsys.readouterr().err
    assert {o: o.read_bytes() for o in (tmp_path/'x').iterdir()} == before

def test_killed_between_weights_and_description(saved, tmp_path, capsys):
    "The weights are new and the description is old: made again, and not an error."
    assert run(ader_distill_cli, *distil(saved, tmp_path)) == 0
    want, f = (tmp_path/'student.safetensors').read_bytes(), tmp_path/'student.safetensors'
    f.write_bytes(want[:-1])
    assert run(ader_distill_cli, *distil(saved, tmp_path)) == 0 and 'it is made again' in capsys.readouterr().out and f.read_bytes() == want

def test_fresh_starts_anew(saved, tmp_path, capsys):
    assert run(ader_distill_cli, *distil(saved, tmp_path)) == 0
    assert run(ader_distill_cli, *distil(saved, tmp_path, '--fresh', '--seed', 1)) == 0
    assert 'continuing' not in capsys.readouterr().out and load(tmp_path/'student').card['seed'] == 1


# Mixed precision

class OnCPU(MixedPrecision):
    "fastai's callback with torch's scaler for the CPU, since that of a GPU does nothing here."
    def before_fit(self):
        super().before_fit()
        self.autocast, self.learn.scaler = torch.autocast('cpu', torch.bfloat16), torch.amp.GradScaler('cpu', init_scale=64., growth_interval=2)

def test_the_scaler_of_mixed_precision_goes_on(small, net, tmp_path):
    "Its scale and its count of good steps; the weights are those of the training that was never stopped."
    class Stop(Exception): pass
    class StopAt(Callback):
        order = 5 # before autocast begins
        def before_batch(self):
            if (self.epoch, self.iter) == (2, 1): raise Stop('here')
    def go(path, *cbs):
        torch.manual_seed(0)
        scales = type('Scales', (Callback,), dict(after_epoch=lambda self: setattr(self, 'seen', self.scaler.state_dict())))()
        learn = Learner(small(), net(), cbs=[SAT(steps=1), OnCPU(), Resumable(path), scales, *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        return learn.model.state_dict(), scales.seen
    with pytest.raises(Stop): go(tmp_path/'x', StopAt())
    a, b = go(tmp_path/'x'), go(tmp_path/'y')
    assert same(a, b) and a[1]['scale'] == 64*2**4 and a[1]['_growth_tracker'] == 1 # 9 steps, twice the scale every two


# Blown up

@pytest.mark.parametrize('factor, word', [(float('nan'), 'nan'), (float('inf'), 'inf'), (1e7, r'\d(\.\d+)?e\+0\d')])
def test_a_loss_that_explodes(small, net, tmp_path, factor, word):
    "The message has the step, the last good numbers and what to try; the last good checkpoint is there, and the training that is mended goes on from it."
    class Bad(Natural):
        mended = False
        def loss(self, x, x_adv, y): return super().loss(x, x_adv, y)*(1 if self.mended or (self.epoch, self.iter) != (2, 1) else factor)
    def go():
        torch.manual_seed(0)
        learn = Learner(small(), net(), cbs=[Bad(), Resumable(tmp_path/'x')])
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 1e-2)
        return learn
    with pytest.raises(AderError, match=rf'Bad became {word} in epoch 2, step 1; the training loss was \d.* before; epoch 1 ended with train_loss \d.*clean \d.*; try a lower learning rate'): go()
    assert [o.name for o in Resumable(tmp_path/'x').files()] == ['x-0001.ckpt', 'x-0002.ckpt']
    Bad.mended = True
    go()

def test_weights_that_are_spoilt_are_not_kept(small, net, tmp_path):
    "By the last step of an epoch, whose loss was good."
    class Spoils(Callback):
        order = 60
        def after_train(self):
            if self.epoch == 1: next(self.model.parameters()).data[0] = torch.nan
    learn = Learner(small(), net(), cbs=[Natural(), Resumable(tmp_path/'x'), Spoils()])
    with learn.no_bar(), learn.no_logging(), pytest.raises(AderError, match='is not finite after epoch 1'): learn.fit(3)
    assert [o.name for o in Resumable(tmp_path/'x').files()] == ['x-0001.ckpt'] and read_checkpoint(tmp_path/'x-0001.ckpt')

def test_a_small_loss_may_grow(small, net):
    "From nearly nothing to something ordinary is no explosion."
    class Grows(Natural):
        def loss(self, x, x_adv, y): return super().loss(x, x_adv, y)*(1e-9 if self.iter == 0 else 1)
    learn = Learner(small(), net(), cbs=Grows())
    with learn.no_bar(), learn.no_logging(): learn.fit(2)


# A full disk

@pytest.fixture
def disk(tmp_path):
    "A disk of 2 MB in memory."
    d = tmp_path/'disk'
    d.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(d)], capture_output=True).returncode: pytest.skip('this process may not mount a tmpfs')
    yield d
    subprocess.run(['umount', '-l', str(d)], check=True)

def full(d):
    "Fill the disk; a function that makes room again."
    f = os.open(d/'filler', os.O_CREAT | os.O_WRONLY)
    try:
        while True: os.write(f, bytes(1024))
    except OSError: os.close(f)
    return (d/'filler').unlink

def test_a_full_disk_loses_nothing(saved, disk, tmp_path, capsys, monkeypatch):
    "The command says so in a line, the checkpoints are there and whole, and with room it goes on to the same end."
    write = write_checkpoint
    def fills(path, d):
        if d['done'] == 2: full(disk)
        write(path, d)
    assert run(ader_distill_cli, *distil(saved, tmp_path/'whole')) == 0
    with monkeypatch.context() as m:
        m.setattr('ader.teachers.write_checkpoint', fills)
        capsys.readouterr()
        assert run(ader_distill_cli, *distil(saved, disk/'x')) == 2
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and 'No space left on device' in err and 'x/student-0002.ckpt' in err
    assert sorted(o.name for o in (disk/'x').iterdir()) == ['student-0001.ckpt'] and read_checkpoint(disk/'x'/'student-0001.ckpt')['done'] == 1
    (disk/'filler').unlink()
    assert run(ader_distill_cli, *distil(saved, disk/'x')) == 0 and 'continuing after epoch 1 of 3' in capsys.readouterr().out
    assert (disk/'x'/'student.safetensors').read_bytes() == (tmp_path/'whole'/'student.safetensors').read_bytes()

def test_a_full_disk_keeps_a_saved_network(disk):
    "Both files are the old ones."
    torch.manual_seed(0)
    net = lambda w: attend(small_resnet(width=w))
    save(net(4), disk/'t')
    before = {o: o.read_bytes() for o in disk.iterdir()}
    room = full(disk)
    with pytest.raises(AderError, match="can't write .*t.safetensors and .*t.json: No space left on device; what was there before is unchanged"): save(net(5), disk/'t')
    room()
    assert {o: o.read_bytes() for o in disk.iterdir()} == before and load(disk/'t')

def test_a_limit_on_the_size_of_files(tmp_path):
    "The other way in which writing fails half way; in a process of its own."
    old = tmp_path/'a'
    write_all({old: b'old', tmp_path/'b': b'old'})
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try: write_all({old: bytes(10), tmp_path/'b': bytes(2000)})
        except AderError as e: os._exit(0 if 'File too large' in str(e) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(o.name for o in tmp_path.iterdir()) == ['a', 'b'] and old.read_bytes() == (tmp_path/'b').read_bytes() == b'old'


# Checkpoints of others

def forge(f, d):
    import hashlib, io
    buf = io.BytesIO()
    torch.save(d, buf)
    f.write_bytes(hashlib.sha256(buf.getvalue()).digest() + buf.getvalue())

@pytest.mark.parametrize('what', ['code', 'list', 'empty', 'no model', 'other model', 'other callback', 'no place in the loader', 'folder'])
def test_checkpoints_that_only_look_right(small, plain, tmp_path, what):
    "Whole by their checksum, and yet not ours: a sentence, no code, no traceback from the depths."
    f, make = tmp_path/'x-0001.ckpt', lambda: train(Natural(), plain(), small(), 2, progress=False, resume=tmp_path/'x')
    make()
    d = read_checkpoint(f)
    for o in tmp_path.iterdir(): o.unlink()
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    if what == 'folder': f.mkdir()
    else: forge(f, {'code': Evil(), 'list': [1], 'empty': {}, 'no model': {k: v for k,v in d.items() if k != 'model'}, 'other model': d | dict(model={'w': torch.ones(1)}),
                    'other callback': d | dict(cbs={}), 'no place in the loader': d | dict(random={})}[what])
    with pytest.raises(AderError, match='remove|read the checkpoint'): make()
    assert not (tmp_path/'evil').exists() and f.exists()
