"The robustness table: what it counts, and what it leaves alone."
import copy
import pytest, torch
from torch import nn
from ader.data import AderError, Batches, Images, digits
from ader.networks import small_resnet
from ader.attention import add_attention
from ader.attacks import FGSM, PGD, PGD_sat, Threat, paper_attacks
from ader.teachers import teach
from ader.evaluation import accuracy_curves, evaluate, plot_robustness, wilson


@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return teach('natural', small_resnet(width=8), digits(), epochs=4, progress=False)


def run(net, dl=None, **kw): return evaluate(net, digits().test if dl is None else dl, progress=False, **kw).drop(columns=['seconds', 'forward', 'backward'])


def test_the_size_of_batches_does_not_matter(net):
    ds = digits().test.dataset
    a, b = (run(net, Batches(ds, bs), attacks=[FGSM(Threat(0.1))]) for bs in (33, 500))
    assert a.equals(b)


def test_the_network_is_left_as_it_was(net):
    net = copy.deepcopy(net).train()
    net.net.stem.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    run(net)
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_train_mode_is_judged_like_eval_mode(net):
    assert run(copy.deepcopy(net).train()).equals(run(net))


def test_half_precision_is_judged_in_float32(net):
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert run(half).equals(run(copy.deepcopy(half).float()))
    assert next(half.parameters()).dtype == torch.bfloat16


def test_the_global_random_state_is_not_used(net):
    torch.manual_seed(1); a = run(net, attacks=[PGD_sat(Threat(0.05))]); after = torch.rand(1)
    torch.manual_seed(1); assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2); assert run(net, attacks=[PGD_sat(Threat(0.05))]).equals(a)


def test_images_that_are_wrong_already_count_as_not_robust():
    class Wrong(nn.Module): # right only for what is not an original image
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x): return torch.stack([x.flatten(1).std(1) + self.p, 1 - x.flatten(1).std(1)], 1)
    ds = Images(torch.full((10,1,4,4), 0.5), torch.zeros(10, dtype=torch.long), 'ab')
    assert run(Wrong(), Batches(ds, 4), attacks=[PGD(Threat(0.4))]).accuracy.tolist() == [0, 0]


@pytest.mark.parametrize('n', [1, 255, 256, 257, 500, 900])
def test_the_first_images_across_batches(net, n):
    d = run(net, images=n, attacks=[])
    x, y = digits().test.dataset[:n]
    with torch.no_grad(): right = (net(x).argmax(1) == y).sum().item()
    assert d.images[0] == len(x) and d.accuracy[0] == pytest.approx(right/len(x))


def test_no_images(net):
    with pytest.raises(AderError, match='at least 1 image'): run(net, images=0)
    with pytest.raises(AderError, match='no images'): run(net, dl=[])


@pytest.mark.parametrize('k, n', [(0, 1), (1, 1), (0, 10_000), (5000, 10_000)])
def test_intervals_hold_their_centre(k, n):
    lo, hi = wilson(k, n)
    assert 0 <= lo <= k/n <= hi <= 1 and hi > lo


def test_curves_start_clean_and_respect_the_pixel_range(net):
    c = accuracy_curves({'a': net}, digits().test, PGD_sat(Threat(0.6), 3), [0.5, 1, 2], images=50, progress=False)
    assert c.eps.tolist() == [0, 0.3, 0.6] # 1.2 would leave the pixel range
    assert c.accuracy[0] == run(net, images=50, attacks=[]).accuracy[0]


def test_the_bars_show_the_table(net):
    d = evaluate(net, digits().test, paper_attacks(Threat(0.1)), images=50, progress=False)
    ax = plot_robustness({'a': d, 'b': d})
    heights = [[b.get_height() for b in c] for c in ax.containers if hasattr(c[0], 'get_height')]
    assert heights == [pytest.approx(d.accuracy.tolist())]*2
