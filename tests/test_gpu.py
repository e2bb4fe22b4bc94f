"The fast path on a GPU, where there is one; nothing is faked where there is none."
import pytest, torch
from contextlib import contextmanager
from torch import nn
from ader.data import digits
from ader.networks import mobilenet_v2, small_resnet
from ader.attention import add_attention
from ader.attacks import PGD, PGD_sat, Threat
from ader.speed import FrozenCopy, dtype_of
from ader.methods import ADER, make_method, methods
from ader.teachers import train
from ader.evaluation import evaluate
from ader.bench import _bench_epoch, _bench_train
from fastai.callback.core import Callback
from fastai.learner import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


@pytest.mark.parametrize('make', [lambda: add_attention(small_resnet(1, 16, 3, stages=3)), mobilenet_v2])
@pytest.mark.parametrize('precision, tolerance', [('float32', 1e-3), ('bfloat16', 0.05)])
def test_the_copy_answers_as_the_network(make, precision, tolerance):
    net, x = make().cuda().eval(), torch.rand(8, 3, 32, 32, device='cuda')
    want = net(x)
    torch.testing.assert_close(FrozenCopy(net, x, precision)(x), want, rtol=0, atol=tolerance*want.abs().max().item())


@pytest.mark.parametrize('attack', [PGD(Threat(0.1), start='image'), PGD(Threat(0.1), start='image', loss='cw'),
                                    PGD(Threat(1., 'L2'), start='image')], ids=repr)
def test_an_attack_finds_what_it_finds_on_the_cpu(attack):
    "From the image itself, so that nothing is random; cuDNN adds in another order, so not bit by bit."
    net = small_resnet().eval()
    x = torch.rand(64, 1, 8, 8)
    y = net(x).argmax(1)
    found = [(net.to(d)(attack(net, x.to(d), y.to(d))).argmax(1).cpu() == y).float().mean() for d in ('cpu', 'cuda')]
    assert abs(found[0] - found[1]) < 0.1


@contextmanager
def no_waiting():
    "Whatever makes the host wait for the GPU raises an error in here."
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')

class StepsDontWait(Callback):
    "From the second step on, from `Method.before_batch` to the gradient, nothing may wait."
    order = 30 # before `Method`
    steps = 0
    def before_batch(self):
        if self.training and self.iter % 20: torch.cuda.set_sync_debug_mode('error')
    def before_step(self):
        self.steps += torch.cuda.get_sync_debug_mode() > 0
        torch.cuda.set_sync_debug_mode('default')

@pytest.mark.parametrize('joint', [False, True])
@pytest.mark.parametrize('name', methods)
def test_steps_do_not_wait(name, joint):
    dls, nets = digits(device='cuda'), [add_attention(small_resnet()).cuda().eval() for _ in range(3)]
    learn = Learner(dls, nets[0], cbs=[make_method(name, *nets[1:], steps=2, joint=joint), stop := StepsDontWait()])
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert stop.steps >= 10

def test_it_would_be_noticed():
    x = torch.rand(4, device='cuda')
    with pytest.raises(RuntimeError), no_waiting(): x[x > 0.5]


@pytest.mark.parametrize('precision, tolerance', [('float32', 1e-3), ('bfloat16', 0.05)])
def test_compiled(precision, tolerance):
    "The copy as CUDA graphs: the same answers, also of two batches in turn, and the same attack."
    net, (a, b) = add_attention(small_resnet(1, 16, 3, stages=3)).cuda().eval(), torch.rand(2, 8, 3, 32, 32, device='cuda')
    fast = FrozenCopy(net, a, precision, compile=True)
    for _ in range(3):
        got = [fast(o, attend=True) for o in (a, b)]
        for o,x in zip(got, (a, b)):
            want = net(x, attend=True)
            for i,j in zip(o, want): torch.testing.assert_close(i, j, rtol=0, atol=tolerance*j.abs().max().item())
    y = net(a).argmax(1)
    z = PGD(Threat(0.1), 5)(fast, a, y)
    assert (z - a).abs().max() <= 0.1 + 1e-6 and (fast(z).argmax(1) != y).any()


@pytest.mark.parametrize('compile', [False, True])
def test_a_method_trains_compiled(compile):
    dls = digits(device='cuda')
    nets = [add_attention(small_resnet()).cuda().eval() for _ in range(3)]
    learn = train(make_method('ADERPlus', *nets[1:], steps=2, compile=compile), nets[0], dls, 2, progress=False)
    assert learn.recorder.losses[-1] < learn.recorder.losses[0]


def test_one_process_of_a_distributed_training(monkeypatch, tmp_path):
    from ader.distributed import distributed, _shutdown
    for k,v in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1', MASTER_PORT=29533).items():
        monkeypatch.setenv(k, str(v))
    torch.distributed.init_process_group('nccl')
    try:
        dls, net = digits(), add_attention(small_resnet()).cuda()
        learn = Learner(dls, net, cbs=make_method('SAT', steps=1))
        with learn.no_bar(), learn.no_logging(), distributed(learn): learn.fit(1)
        assert learn.recorder.losses[-1] < learn.recorder.losses[0]
    finally: _shutdown()


def test_an_attack_repeats_and_stays_in_the_ball():
    net, x, y = small_resnet().cuda().eval(), torch.rand(16, 1, 8, 8, device='cuda'), torch.randint(0, 10, (16,), device='cuda')
    a, b = (PGD_sat(Threat(0.2))(net, x, y, torch.Generator('cuda').manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and (a - x).abs().max() <= 0.2 + 1e-6 and a.min() >= 0 and a.max() <= 1


@pytest.mark.parametrize('precision', ['auto', 'float32'])
def test_ader_learns(precision):
    dls = digits(device='cuda')
    net, teachers = add_attention(small_resnet()), [add_attention(small_resnet()).cuda() for _ in range(2)]
    train(ADER(*teachers, precision=precision), net, dls, 1, progress=False)
    assert next(net.parameters()).is_cuda and dtype_of('auto', nn.Linear(1, 1).cuda()) in (torch.bfloat16, torch.float32)
    d = evaluate(net, dls.test, images=100, progress=False)
    assert d.accuracy.between(0, 1).all()


def test_the_benchmark_runs():
    assert _bench_train(['ResNet-8'], ['small'], 3, device='cuda')[0]['ratio'] > 0
    assert _bench_epoch('ResNet-8', 'small', images=1000, device='cuda')['seconds'] > 0
