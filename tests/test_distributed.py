"Two processes do what one does: losses, ω, metrics, checkpoints; and only one of them writes."
import json, os, subprocess, sys
import pytest, torch
pytest.importorskip('accelerate')
from ader.attention import add_attention
from ader.checkpoints import _read_checkpoint, load, save
from ader.data import AderError, Batches, Images
from ader.networks import small_resnet

TORCHRUN = '-m torch.distributed.run --nproc_per_node 2 --master_port'.split()
ACCELERATE = ('-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 '
              '--mixed_precision no --dynamo_backend no --main_process_port').split()

def launch(launcher, port, file, *args, ok=True, **env):
    "Run a program; what it printed."
    command = [sys.executable, '-W', 'ignore', *launcher, *[port]*bool(launcher), file, *args]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true',
           'PYTHONWARNINGS': 'ignore', **env}
    r = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, env=env)
    if ok: assert r.returncode == 0, r.stdout + r.stderr
    return r

PROGRAM = '''
import atexit, json, sys, torch
from pathlib import Path
from ader.attention import add_attention
from ader.data import Images, RandomCrop, dataloaders, digits, rank_and_world
from ader.methods import ADER, methods, teachers_of
from ader.networks import small_resnet
from ader.teachers import train
torch.set_num_threads(1)
out, (rank, n) = Path(sys.argv[1]), rank_and_world()
def at_end(): # called last of all, as it is registered first
    threads = [f.read_text().strip() for f in Path('/proc/self/task').glob('*/comm')]
    left = [torch.distributed.is_initialized(), [o for o in threads if 'gloo' in o]]
    (out/f'at-end-{n}-{rank}.json').write_text(json.dumps(left))
atexit.register(at_end)
d = digits(augment=[], device='cpu')
few = [o.dataset[:k] for o,k in ((d.train, 67), (d.valid, 41))]
sets = [Images(x.double(), y, d.train.dataset.classes, 'few', 0.2) for x,y in few]
def go(method, resume=None):
    torch.manual_seed(0)
    clean, robust, student = (add_attention(small_resnet(width=4)).double() for _ in range(3))
    crop = dict(augment=[RandomCrop(1)], device='cpu')
    dls = dataloaders(*sets, bs=20//n, val_bs=16//n, **crop)
    roles = {k: v.eval() for k,v in dict(clean=clean, robust=robust).items() if k in teachers_of(method)}
    m = method(**roles, steps=2)
    loss = m.loss
    m.loss = lambda *a: loss(*a).float() # fastai records the loss in single precision
    learn = train(m, student, dls, 2, lr=1e-3, progress=False, resume=resume)
    assert type(student.net.stem[1]) is torch.nn.BatchNorm2d and learn.model is student
    assert dls.train.rank_slice == (0, 1)
    return m, learn
for name in sys.argv[2].split(','):
    m, learn = go(methods[name], out/'x' if n > 1 and name == 'ADER' else None)
    r, weights = learn.recorder, {k: v.tolist() for k,v in learn.model.state_dict().items()}
    found = dict(terms=m.history().to_dict('list'), values=[list(map(float, o)) for o in r.values],
                 loss=[o.item() for o in r.losses], weights=weights)
    (out/f'{name}-{n}-{rank}.json').write_text(json.dumps(found))
'''

def near(a, b, tol): # numbers in any nesting
    if isinstance(a, dict): return a.keys() == b.keys() and all(near(a[k], b[k], tol) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(near(x, y, tol) for x,y in zip(a, b))
    return abs(a - b) <= tol*(1 + abs(a))

METHODS = 'ADER', 'TRADES', 'IAD', 'BMTARD'

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs')
    (d/'program.py').write_text(PROGRAM)
    for launcher in ([], ACCELERATE): launch(launcher, 29531, d/'program.py', d, ','.join(METHODS))
    return d

@pytest.mark.parametrize('method', METHODS)
def test_two_processes_are_one(runs, method):
    "67 training and 41 validation images, which two can't share evenly: the same everything."
    one, a, b = (json.loads((runs/f'{method}-{k}.json').read_text()) for k in ('1-0', '2-0', '2-1'))
    assert near(a['weights'], b['weights'], 0) and near(a['values'], b['values'], 0)
    for k in one: assert near(one[k], a[k], 1e-5), k
    if method == 'ADER': assert len({round(o, 6) for o in one['terms']['ω']}) > 3

def test_one_of_them_writes(runs):
    assert sorted(f.name for f in runs.glob('x-*')) == ['x-0001.ckpt', 'x-0002.ckpt']
    assert len(_read_checkpoint(runs/'x-0002.ckpt')['rows']) == 2

def test_nothing_runs_on(runs):
    "The threads of the process group end before Python does, which could abort it otherwise."
    for k in ('1-0', '2-0', '2-1'):
        assert json.loads((runs/f'at-end-{k}.json').read_text()) == [False, []]

MAIN = '''
import os, ader.checkpoints, ader.cli
before_epoch = ader.checkpoints.Resume.before_epoch
def stop(self):
    if self.epoch == 1: os._exit(9)
    return before_epoch(self)
if os.environ.get('STOP'): ader.checkpoints.Resume.before_epoch = stop
ader.cli.ader_distill_cli()
'''

def test_the_command_in_two_processes(tmp_path):
    "One report, one student, one line an epoch; killed and continued it ends the same."
    torch.manual_seed(0)
    for k in ('clean', 'robust'): save(add_attention(small_resnet(width=4)), tmp_path/k)
    main, a, b = (tmp_path/k for k in ('main.py', 'a', 'b'))
    main.write_text(MAIN)
    argv = ['--clean', tmp_path/'clean', '--robust', tmp_path/'robust', '--images', 30,
            '--student', 'small_resnet:width=4', '--bs', 125, '--epochs', 2, '--out']
    out = launch(TORCHRUN, 29532, main, *argv, a).stdout
    assert out.count('epoch   1 of 2') == 1 and out.count('The student is in') == 1
    assert sorted(f.name for f in a.iterdir()) == ['report.html', 'student.json', 'student.safetensors']
    launch(TORCHRUN, 29533, main, *argv, b, ok=False, STOP='1')
    assert [f.name for f in b.iterdir()] == ['student-0001.ckpt']
    out = launch(TORCHRUN, 29534, main, *argv, b).stdout
    assert out.count('continuing after epoch 1 of 2') == 1 and load(b/'student')
    weights = 'student.safetensors'
    assert (a/weights).read_bytes() == (b/weights).read_bytes()

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
