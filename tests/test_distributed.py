"Two processes do what one does: losses, ω, metrics, checkpoints; and only one of them writes."
import json, os, signal, subprocess, sys
from contextlib import redirect_stdout
from pathlib import Path
import pytest, torch
pytest.importorskip('accelerate')
import ader.checkpoints, ader.cli
from ader.attention import add_attention
from ader.checkpoints import load, save, _read_checkpoint
from ader.data import AderError, Batches, Images, RandomCrop, dataloaders, digits, _rank_and_world
from ader.methods import methods, _teachers_of
from ader.networks import small_resnet
from ader.teachers import train

ACCELERATE = ('-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 '
              '--mixed_precision no --dynamo_backend no --main_process_port 29531').split()
METHODS = 'ADER', 'TRADES', 'BMTARD'

def train_all(out):
    "A short training by each method; what is found of it goes to a file."
    rank, n = _rank_and_world()
    d = digits(augment=[], device='cpu')
    few = [o.dataset[:k] for o,k in ((d.train, 67), (d.valid, 41))]
    sets = [Images(x.double(), y, d.train.dataset.classes, 'few', 0.2) for x,y in few]
    for name in METHODS:
        torch.manual_seed(0)
        clean, robust, student = (add_attention(small_resnet(width=4)).double() for _ in range(3))
        dls = dataloaders(*sets, bs=20//n, val_bs=16//n, augment=[RandomCrop(1)], device='cpu')
        roles = dict(clean=clean.eval(), robust=robust.eval())
        m = methods[name](**{k: roles[k] for k in _teachers_of(methods[name])}, steps=2)
        loss = m.loss
        m.loss = lambda *a: loss(*a).float() # fastai records the loss in single precision
        resume = out/'x' if n > 1 and name == 'ADER' else None
        learn = train(m, student, dls, 2, lr=1e-3, progress=False, resume=resume)
        assert type(student.net.stem[1]) is torch.nn.BatchNorm2d and learn.model is student
        assert dls.train.rank_slice == (0, 1)
        r, weights = learn.recorder, {k: v.tolist() for k,v in student.state_dict().items()}
        values = [list(map(float, o)) for o in r.values]
        found = dict(terms=m.history().to_dict('list'), values=values, weights=weights,
                     loss=[o.item() for o in r.losses])
        (out/f'{name}-{n}-{rank}.json').write_text(json.dumps(found))

PROGRAM = '''
"All trainings, and then the command, in one of two processes."
import atexit, json, sys
from pathlib import Path
def at_end(): # called last of all, as it is registered first
    threads = [f.read_text().strip() for f in Path('/proc/self/task').glob('*/comm')]
    left = [torch.distributed.is_initialized(), [o for o in threads if 'gloo' in o]]
    (out/f'at-end-{rank}.json').write_text(json.dumps(left))
atexit.register(at_end)
import torch
torch.set_num_threads(1)
tests, out, *argv = sys.argv[1:]
sys.path.insert(0, tests)
import test_distributed as t
out, rank = Path(out), t._rank_and_world()[0]
t.train_all(out)
t.ader.cli.command(['ader_distill', *argv])
'''

def near(a, b, tol): # numbers in any nesting
    if isinstance(a, dict): return a.keys() == b.keys() and all(near(a[k], b[k], tol) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(near(x, y, tol) for x,y in zip(a, b))
    return abs(a - b) <= tol*(1 + abs(a))

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A folder, the arguments of the command but for the last, and what two processes printed."
    d = tmp_path_factory.mktemp('runs')
    torch.manual_seed(0)
    for k in ('clean', 'robust'): save(add_attention(small_resnet(width=4)), d/k)
    argv = ['--method', 'ADER:steps=2', '--clean', d/'clean', '--robust', d/'robust', '--images', 30, '--student',
            'small_resnet:width=4', '--bs', 125, '--epochs', 2, '--out']
    argv = list(map(str, argv))
    train_all(d)
    (d/'program.py').write_text(PROGRAM)
    command = [sys.executable, '-W', 'ignore', *ACCELERATE, d/'program.py', Path(__file__).parent, d]
    env = dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', PYTHONWARNINGS='ignore')
    r = subprocess.run([*map(str, command), *argv, str(d/'a')], capture_output=True, text=True,
                       timeout=240, env=os.environ | env)
    assert r.returncode == 0, r.stdout + r.stderr
    return d, argv, r.stdout

@pytest.mark.parametrize('method', METHODS)
def test_two_processes_are_one(runs, method):
    "67 training and 41 validation images, which two can't share evenly: the same everything."
    one, a, b = (json.loads((runs[0]/f'{method}-{k}.json').read_text()) for k in ('1-0', '2-0', '2-1'))
    assert near(a['weights'], b['weights'], 0) and near(a['values'], b['values'], 0)
    for k in one: assert near(one[k], a[k], 1e-5), k
    if method == 'ADER': assert len({round(o, 6) for o in one['terms']['ω']}) > 3

def test_one_of_them_writes(runs):
    d = runs[0]
    assert sorted(f.name for f in d.glob('x-*')) == ['x-0001.ckpt', 'x-0002.ckpt']
    assert len(_read_checkpoint(d/'x-0002.ckpt')['rows']) == 2

def test_nothing_runs_on(runs):
    "The threads of the process group end before Python does, which could abort it otherwise."
    for k in range(2): assert json.loads((runs[0]/f'at-end-{k}.json').read_text()) == [False, []]

def forked(port, out, f):
    "Call `f` in two forked processes, which print to files: their exit codes."
    def start(rank):
        if pid := os.fork(): return pid
        try:
            signal.alarm(200)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                              MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
            with open(out/f'printed-{rank}', 'w') as o, redirect_stdout(o): f()
        except BaseException as e: (out/f'printed-{rank}').write_text(repr(e))
        else: os._exit(0)
        finally: os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in [start(0), start(1)]]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='it forks')
def test_the_command_in_two_processes(runs, tmp_path, monkeypatch):
    "One report, one student, one line an epoch; killed and continued it ends the same."
    d, argv, out = runs
    assert out.count('epoch   1 of 2') == 1 and out.count('The student is in') == 1
    names = ['report.html', 'student.json', 'student.safetensors']
    assert sorted(f.name for f in (d/'a').iterdir()) == names
    before_epoch, b = ader.checkpoints.Resume.before_epoch, d/'b'
    def stop(self):
        if self.epoch == 1: os._exit(9)
        return before_epoch(self)
    command = lambda: ader.cli.command(['ader_distill', *argv, str(b)])
    with monkeypatch.context() as m:
        m.setattr(ader.checkpoints.Resume, 'before_epoch', stop)
        assert forked(29532, tmp_path, command) == [9, 9]
    assert [f.name for f in b.iterdir()] == ['student-0001.ckpt']
    codes, said = forked(29533, tmp_path, command), [(tmp_path/f'printed-{k}').read_text() for k in (0, 1)]
    assert codes == [0, 0], said
    assert ''.join(said).count('continuing after epoch 1 of 2') == 1 and load(b/'student')
    assert (d/'a'/names[2]).read_bytes() == (b/names[2]).read_bytes()

def images(n): return Images(torch.rand(n,1,2,2), torch.zeros(n, dtype=torch.long), ['a'])

@pytest.mark.parametrize('n', [3, 40, 67])
@pytest.mark.parametrize('world', [2, 3])
@pytest.mark.parametrize('bs', [1, 4, 50])
def test_slices_of_batches(n, world, bs):
    "Evaluation: every image once, none empty. Training: slices of equal size."
    ds = images(n)
    parts = [[x for x,_ in Batches(ds, bs).shared(i, world)] for i in range(world)]
    assert len(set(map(len, parts))) == 1 and all(len(x) for p in parts for x in p)
    got = torch.cat([x for p in parts for x in p]).flatten(1)
    assert sorted(got.tolist()) == sorted(ds.x.flatten(1).tolist())
    for last in (True, False):
        batches = lambda i: Batches(ds, bs, shuffle=True, drop_last=last).shared(i, world)
        parts = [[x for x,_ in batches(i)] for i in range(world)]
        assert len({tuple(map(len, p)) for p in parts}) == 1 and parts[0]
        got = torch.cat([x for p in parts for x in p])
        assert len(got.flatten(1).unique(dim=0)) == len(got)
        assert len(got) >= (n - world*bs if last else n - world + 1)

def test_fewer_images_than_processes():
    with pytest.raises(AderError, match='3 processes cannot share 2 images'):
        Batches(images(2)).shared(0, 3)
