"The fast path on a GPU, where there is one; nothing is faked where there is none."
import pytest, torch
from torch import nn
from ader.data import digits
from ader.networks import mobilenet_v2, small_resnet
from ader.attention import add_attention
from ader.attacks import PGD_sat, Threat
from ader.speed import FrozenCopy, dtype_of
from ader.methods import ADER
from ader.teachers import train
from ader.evaluation import evaluate
from ader.bench import bench_epoch, bench_train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')


@pytest.mark.parametrize('make', [lambda: add_attention(small_resnet(1, 16, 3, stages=3)), mobilenet_v2])
@pytest.mark.parametrize('precision, tolerance', [('float32', 1e-3), ('bfloat16', 0.05)])
def test_the_copy_answers_as_the_network(make, precision, tolerance):
    net, x = make().cuda().eval(), torch.rand(8, 3, 32, 32, device='cuda')
    want = net(x)
    torch.testing.assert_close(FrozenCopy(net, x, precision)(x), want, rtol=0, atol=tolerance*want.abs().max().item())


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
    assert bench_train(['ResNet-8'], ['small'], 3, device='cuda')[0]['ratio'] > 0
    assert bench_epoch('ResNet-8', 'small', images=1000, device='cuda')['seconds'] > 0
