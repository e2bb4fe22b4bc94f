"Two processes do what one does: losses, ω, metrics, checkpoints; and only one of them writes."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn

pytest.importorskip('accelerate')
from ader.data import AderError, Batches, Images
from ader.teachers import read_checkpoint

PORT = 29530

def launch(n, file, *args, ok=True, **env):
    "Run a program in `n` processes; what it printed."
    global PORT
    PORT += 1
    how = ['-m', 'torch.distributed.run', '--nproc_per_node', str(n), '--master_port', str(PORT)] if n > 1 else []
    r = subprocess.run([sys.executable, '-W', 'ignore', *how, str(file), *map(str, args)], capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **env})
    if ok: assert r.returncode == 0, r.stdout + r.stderr
    return r

PROGRAM = '''
import atexit, json, os, sys, torch
from pathlib import Path
from ader.all import *
from ader.data import Batches, dataloaders, processes
from ader.teachers import train
torch.set_num_threads(1)
out, (rank, n) = Path(sys.argv[1]), processes()
def at_end(): # called last of all, as it is registered first
    left = [o.read_text().strip() for o in Path('/proc/self/task').glob('*/comm')]
    (out/f'at-end-{n}-{rank}.json').write_text(json.dumps([torch.distributed.is_initialized(), [o for o in left if 'gloo' in o]]))
atexit.register(at_end)
d = digits(augment=[], device='cpu')
sets = [Images(o.dataset.x[:k].double(), o.dataset.y[:k], o.dataset.classes, 'few', 0.2) for o,k in ((d.train, 67), (d.valid, 41))]
def go(method, resume=None, epochs=2, cbs=None):
    torch.manual_seed(0)
    clean, robust, student = (attend(small_resnet(width=4)).double() for _ in range(3))
    dls = dataloaders(*sets, bs=20//n, val_bs=16//n, augment=[RandomCrop(1)], device='cpu')
    m = method(**{k: v.eval() for k,v in dict(clean=clean, robust=robust).items() if k in teachers_of(method)}, steps=2)
    loss = m.loss
    m.loss = lambda *a: loss(*a).float() # fastai records the loss in single precision
    learn = train(m, student, dls, epochs, lr=1e-3, progress=False, resume=resume, cbs=cbs)
    assert type(student.net.stem[1]) is torch.nn.BatchNorm2d and learn.model is student and dls.train.share == (0, 1)
    return m, learn
found = {}
for name in sys.argv[2].split(','):
    m, learn = go(methods[name])
    weights = {k: v.tolist() for k,v in learn.model.state_dict().items()}
    (out/f'{name}-{n}-{rank}.json').write_text(json.dumps(dict(terms=m.history().to_dict('list'), values=[list(map(float, o)) for o in learn.recorder.values], loss=[o.item() for o in learn.recorder.losses], weights=weights)))
if len(sys.argv) > 3: go(ADER, resume=out/'x')
'''

def near(a, b, tol): # numbers in any nesting
    if isinstance(a, dict): return a.keys() == b.keys() and all(near(a[k], b[k], tol) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(near(x, y, tol) for x,y in zip(a, b))
    return abs(a - b) <= tol*(1 + abs(a))

METHODS = 'ADER,TRADES,IAD,BMTARD'

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs')
    (d/'program.py').write_text(PROGRAM)
    for n in (1, 2): launch(n, d/'program.py', d, METHODS, *['x']*(n == 2))
    return d

@pytest.mark.parametrize('method', METHODS.split(','))
def test_two_processes_are_one(runs, method):
    "67 training and 41 validation images, which two cannot share evenly: the same losses, records, metrics and weights, in both of them."
    one, *two = (json.loads((runs/f'{method}-{o}.json').read_text()) for o in ('1-0', '2-0', '2-1'))
    assert near(two[0]['weights'], two[1]['weights'], 0) and near(two[0]['values'], two[1]['values'], 0)
    for k in one: assert near(one[k], two[0][k], 1e-5), k
    if method == 'ADER': assert len({round(o, 6) for o in one['terms']['ω']}) > 3

def test_one_of_them_writes(runs):
    assert sorted(o.name for o in runs.glob('x-*')) == ['x-0001.ckpt', 'x-0002.ckpt'] and read_checkpoint(runs/'x-0002.ckpt')['done'] == 2

def test_nothing_runs_on(runs):
    "The threads that talk to the other processes are gone before Python goes, which could abort it otherwise."
    for k in ('1-0', '2-0', '2-1'): assert json.loads((runs/f'at-end-{k}.json').read_text()) == [False, []]

def test_the_command_in_two_processes(tmp_path):
    "One report, one student, one line an epoch; killed and continued it ends the same."
    from ader.attention import attend
    from ader.networks import small_resnet
    from ader.teachers import load, save
    torch.manual_seed(0)
    for k in ('clean', 'robust'): save(attend(small_resnet(width=4)), tmp_path/k)
    main = tmp_path/'main.py'
    main.write_text("import os, ader.teachers, ader.recipes\\n"
                    "if os.environ.get('STOP'):\\n"
                    "    f = ader.teachers.Resumable.before_epoch\\n"
                    "    def stop(self):\\n"
                    "        if self.epoch == 1: os._exit(9)\\n"
                    "        return f(self)\\n"
                    "    ader.teachers.Resumable.before_epoch = stop\\n"
                    "ader.recipes.ader_distill_cli()\\n".replace('\\n', '\n'))
    argv = ['--clean', tmp_path/'clean', '--robust', tmp_path/'robust', '--student', 'small_resnet:width=4', '--bs', 125, '--epochs', 2, '--images', 30, '--out']
    r = launch(2, main, *argv, tmp_path/'a')
    assert r.stdout.count('epoch   1 of 2') == 1 and r.stdout.count('The student is in') == 1
    assert sorted(o.name for o in (tmp_path/'a').iterdir()) == ['report.html', 'student.json', 'student.safetensors']
    launch(2, main, *argv, tmp_path/'b', ok=False, STOP='1')
    assert [o.name for o in (tmp_path/'b').iterdir()] == ['student-0001.ckpt']
    r = launch(2, main, *argv, tmp_path/'b')
    assert r.stdout.count('continuing after epoch 1 of 2') == 1
    assert (tmp_path/'a'/'student.safetensors').read_bytes() == (tmp_path/'b'/'student.safetensors').read_bytes() and load(tmp_path/'b'/'student')

def test_launched_by_accelerate(tmp_path):
    "`accelerate launch` with the launcher that it uses for GPUs, on CPUs."
    (tmp_path/'program.py').write_text(PROGRAM)
    r = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no', '--dynamo_backend', 'no',
                        '--main_process_port', '29599', str(tmp_path/'program.py'), str(tmp_path), 'ADER'], capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'})
    assert r.returncode == 0, r.stderr
    assert {o.name for o in tmp_path.glob('ADER-*')} == {'ADER-2-0.json', 'ADER-2-1.json'}

def images(n): return Images(torch.rand(n,1,2,2), torch.zeros(n, dtype=torch.long), ['a'])

@pytest.mark.parametrize('n', [3, 7, 40, 41, 67])
@pytest.mark.parametrize('of', [2, 3])
@pytest.mark.parametrize('bs', [1, 4, 50])
def test_shares(n, of, bs):
    "Evaluation: every image once, as many batches everywhere, none empty. Training: equal shares. Both with `drop_last` too."
    ds = images(n)
    parts = [[x for x,_ in Batches(ds, bs).shared(i, of)] for i in range(of)]
    assert len({len(o) for o in parts}) == 1 and all(len(x) for o in parts for x in o)
    assert sorted(torch.cat([x for o in parts for x in o]).flatten(1).tolist()) == sorted(ds.x.flatten(1).tolist())
    for last in (True, False):
        parts = [[x for x,_ in Batches(ds, bs, shuffle=True, drop_last=last).shared(i, of)] for i in range(of)]
        assert len({tuple(map(len, o)) for o in parts}) == 1 and parts[0]
        got = torch.cat([x for o in parts for x in o])
        assert len(got.flatten(1).unique(dim=0)) == len(got) and len(got) >= (n - of*bs if last else n - of + 1)

def test_fewer_images_than_processes():
    with pytest.raises(AderError, match='3 processes cannot share 2 images'): Batches(images(2)).shared(0, 3)

def test_ray_with_two_workers(tmp_path):
    "The example of the page: the runs of a list by Ray, each once."
    ray, reproduce = pytest.importorskip('ray'), pytest.importorskip('ader.reproduce')
    one = reproduce.one_cycle(1, 1e-2, bs=250)
    few = dict(PGD_sat=dict(images=20))
    teachers = dict(robust=reproduce.a_run('TRADES', 'small_resnet:width=4', schedule=one, evaluate={}))
    todo = [reproduce.a_run(m, 'small_resnet:width=4', teachers=teachers, schedule=one, evaluate=few) for m in ('ARD', 'RSLAD')]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=dict(env_vars=dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(sys.path))))
    try: records = ray.get([ray.remote(num_cpus=1, max_retries=3)(reproduce.do).remote(run, folder=str(tmp_path)) for run in todo])
    finally: ray.shutdown()
    assert [r['run']['method'] for r in records] == ['ARD', 'RSLAD'] and len(reproduce.read_records(tmp_path/'results')) >= 2
    assert len(list(tmp_path.glob('*TRADES*'))) == 1
