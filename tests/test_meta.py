"""Steps that never ask the device for a value: they run on PyTorch's `meta` device, where there are none.
On a GPU such a question, hidden in a boolean index or an `if`, makes the host wait at every step."""
import pytest, torch
from contextlib import nullcontext
from types import SimpleNamespace
from ader.attacks import PGD, Threat, pgd, _OBJECTIVES
from ader.attention import add_attention
from ader.methods import make_method, methods
from ader.networks import small_resnet
from ader.weighting import AdaptiveWeight, AnnealedWeight, ConstantWeight

@pytest.fixture(autouse=True)
def no_autocast(monkeypatch): # which does not know the device
    monkeypatch.setattr(torch, 'autocast', lambda *args, **kwargs: nullcontext())

def net(): return add_attention(small_resnet(width=4)).eval().to('meta')
def batch(): return torch.empty(4, 1, 8, 8, device='meta'), torch.empty(4, dtype=torch.long, device='meta')

def on_meta(name, **kwargs):
    m = make_method(name, net(), net(), Threat(0.2), steps=2, **kwargs)
    m.learn = SimpleNamespace(model=net(), epoch=1, pct_train=0.5, iter=0)
    m.attack = m.training_attack(m.threat)
    return m

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('loss', _OBJECTIVES)
@pytest.mark.parametrize('start', ['uniform', 'gaussian', 'image'])
def test_attacks(norm, loss, start):
    x, y = batch()
    y = torch.empty(4, 10, device='meta') if loss == 'kl' else y
    a = PGD(Threat(0.2, norm), 2, start=start, loss=loss, restarts=1 if start == 'image' else 2)
    assert a.perturb(net(), x, y).shape == x.shape

SETTINGS = [('ADERPlus', dict(labels=0.5, igdm=1.)), ('AdaAD', dict(igdm=1.)), ('ADER', dict(inner_loss='kl')),
            *[('ADER', dict(weight=w)) for w in (AdaptiveWeight(2., 0.1), ConstantWeight(), AnnealedWeight())]]

@pytest.mark.parametrize('name,kwargs', [(k, {}) for k in methods] + SETTINGS, ids=str)
def test_methods(name, kwargs):
    "Two steps: the adversary, the loss with its logged terms, and the gradient."
    m, (x, y) = on_meta(name, **kwargs), batch()
    for _ in range(2):
        x_adv = m.adversary(x, y)
        loss = m.loss(x, x_adv, y)
        loss.backward()
        assert loss.shape == () and loss.is_meta
        assert all(p.grad is not None for p in m.net.parameters() if p.requires_grad)
        m._asked.clear()

def test_it_would_be_noticed():
    "An index by a mask is what the test is there for."
    x, _ = batch()
    with pytest.raises(Exception): x[x > 0]
    with pytest.raises(Exception): pgd(lambda z: z.flatten(1).sum(1) if z.max() > 0 else z, x, Threat())
