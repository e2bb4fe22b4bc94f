"ADER+ and averaged weights: the loss in NumPy, teachers made equally sure."
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from hypothesis import given, strategies as st
from torch import nn
from ader.data import AderError
from ader.attention import forward_with_attention
from ader.weighting import ConstantWeight
from ader.training import AWP, SAT, WeightEMA
from ader.methods import ADER, TRADES
from ader.plus import ADERPlus, confidence, temperature_for_confidence

def log_softmax(z): z = z - z.max(1, keepdims=True); return z - np.log(np.exp(z).sum(1, keepdims=True))
def kl(t, s): p, q = log_softmax(t), log_softmax(s); return (np.exp(p)*(p-q)).sum(1).mean()
def att(s, t):
    p, q = (m.reshape(len(m), -1)/m.reshape(len(m), -1).sum(1, keepdims=True) for m in (s, t))
    return (p*np.log(p/q)).sum(1).mean()
def sure(z, tau=1.): return np.exp(log_softmax(z/tau)).max(1).mean()
def numpy(net, x):
    with torch.no_grad(): return [o.double().numpy() for o in forward_with_attention(net, x)]
def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.logger = lambda o: None
    return learn

# ---- equally sure

@given(seed=st.integers(0, 1000), classes=st.integers(2, 100), scale=st.floats(0.1, 20), share=st.floats(0.1, 0.9))
def test_any_sureness_is_found(seed, classes, scale, share):
    "Between chance and certainty each confidence has its temperature."
    z = scale*torch.randn(30, classes, generator=torch.Generator().manual_seed(seed))
    want = (1-share)/classes + share
    tau = temperature_for_confidence(z, want)
    if 0.011 < tau < 90: assert confidence(z/tau).item() == pytest.approx(want, abs=2e-3)
    assert 0.01 <= tau <= 100

def test_teachers_that_can_not_be_equal():
    "A teacher that knows nothing stays at that, with finite answers."
    z = torch.zeros(5, 10)
    assert torch.isfinite(z/temperature_for_confidence(z, 0.7)).all()

@pytest.mark.parametrize('kw', [{}, dict(branch_weight=0.), dict(attention='none'), dict(robust_input='x_adv'), dict(match_confidence=False), dict(weight=ConstantWeight(0.4))],
                         ids=lambda kw: ', '.join(f'{k}={v}' for k,v in kw.items()) or 'default')
def test_one_loss_by_hand(net, small, kw):
    "Every term in NumPy, with temperatures found by another way than bisection."
    c, r, s = net().double(), net().double(), net().double()
    for p in c.parameters(): p.data.mul_(1.1)
    m = ADERPlus(c, r, steps=1, **kw)
    learn = quiet(Learner(small(dtype=torch.double), s, cbs=m, lr=1e-2)); learn.fit(0)
    s.eval()
    x, y = learn.dls.train.one_batch()
    x_adv = (x + 0.1*torch.rand_like(x)).clamp(0, 1)
    (z, a, b), (za, aa, ba), (t, ta, _), (tr, tra, _) = numpy(s, x), numpy(s, x_adv), numpy(c, x), numpy(r, x_adv if kw.get('robust_input') == 'x_adv' else x)
    if kw.get('match_confidence', True):
        taus = np.exp(np.linspace(np.log(0.01), np.log(100), 200_001))
        def found(o, want): # the first temperature of a fine grid that is not too sure, by a search in sorted order
            i, j = 0, len(taus) - 1
            while j - i > 1: i, j = (i, (i+j)//2) if sure(o, taus[(i+j)//2]) <= want else ((i+j)//2, j)
            return taus[j]
        want = (sure(t) + sure(tr))/2
        t, tr = t/found(t, want), tr/found(tr, want)
    w, branch = 0.4 if 'weight' in kw else 1/6, kw.get('branch_weight', 1.)
    on = kw.get('attention') != 'none'
    want = w*(kl(t, z) + on*att(a, ta) + branch*kl(t, b)) + (1-w)*(kl(tr, za) + on*att(aa, tra) + branch*kl(tr, ba))
    assert m.loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-3)

def test_temperatures_are_recorded(net, small):
    m = ADERPlus(net(), net(), steps=1)
    quiet(Learner(small(), net(), cbs=m, lr=1e-2)).fit(1)
    assert (m.history()[['τ_clean', 'τ_adv']] > 0).all(axis=None) and set(m.history().columns) == set(m.logged_terms)

def test_what_the_adversary_climbs(net, small):
    "With 'kl' it inner_loss away from what the adversarial teacher is taught to say, temperature included."
    m, seen = ADERPlus(net(), net(), steps=1, inner_loss='kl'), []
    learn = quiet(Learner(small(), net(), cbs=m, lr=1e-2)); learn.fit(0)
    x, y = learn.dls.train.one_batch()
    m.attack_student = lambda x, target: seen.append(target) or x
    m.adversary(x, y)
    torch.testing.assert_close(seen[0], m.targets(x, x, y)[1].logits)
    assert m.attack.loss == 'kl'
    with pytest.raises(AderError, match="inner_loss must be one of 'ce', 'kl'"): ADERPlus(net(), net(), inner_loss='cw')

# ---- averaged weights

class Watch(Callback):
    "The weights after each step, and which network is validated."
    order = 100
    def before_fit(self): self.weights, self.validated = [], []
    def after_batch(self):
        if self.training: self.weights.append({k: v.clone() for k,v in self.model.state_dict().items()})
        else: self.validated.append({k: v.clone() for k,v in self.model.state_dict().items()})

def test_the_average_by_hand(net, small):
    "Weights and statistics of batch norm, step by step, the first of them with less of the past; validated, and left behind."
    w, decay = Watch(), 0.3
    learn = quiet(Learner(small(), net(), cbs=[SAT(steps=1), WeightEMA(decay), w], lr=1e-2)); learn.fit(2)
    mean = None
    for i,now in enumerate(w.weights):
        d = min(decay, (1+i)/(10+i))
        mean = {k: v.double() for k,v in now.items()} if mean is None else {k: d*mean[k] + (1-d)*v.double() for k,v in now.items()}
    for k,v in learn.model.state_dict().items():
        torch.testing.assert_close(w.validated[-1][k], v)
        if v.is_floating_point(): torch.testing.assert_close(v, mean[k].float(), rtol=1e-4, atol=1e-5)
    assert len(w.weights) == 6 and not learn.model.training

def test_training_itself_does_not_change(net, small):
    "The steps are those of a training without an average."
    def go(cbs):
        torch.manual_seed(3)
        w = Watch()
        quiet(Learner(small(), net(), cbs=[TRADES(steps=1), w, *cbs], lr=1e-2)).fit(2)
        return w.weights
    for a,b in zip(go([]), go([WeightEMA(0.9)])):
        for k in a: assert torch.equal(a[k], b[k])

def test_a_plain_learner(plain, small):
    "Without any method of ours."
    learn = quiet(Learner(small(), plain(), loss_func=nn.CrossEntropyLoss(), cbs=WeightEMA(0.9), lr=1e-2)); learn.fit(1)
    assert all(torch.isfinite(o).all() for o in learn.model.state_dict().values())

@pytest.mark.parametrize('decay', [-0.1, 1., 2.])
def test_bad_decay(decay):
    with pytest.raises(AderError, match='decay must be at least 0 and below 1'): WeightEMA(decay)


# ---- adversarial weight perturbation

def test_awp_moves_the_gradient_and_nothing_else(net, small):
    "Before its first epoch training is the same bit for bit; afterwards another."
    def weights(*cbs):
        torch.manual_seed(0)
        learn = quiet(Learner(small(), net(), cbs=[SAT(steps=1), *cbs], lr=1e-2))
        learn.fit(1)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    plain, moved = weights(), weights(AWP(0.05))
    assert torch.equal(weights(AWP(0.05, start=1)), plain)
    assert moved.isfinite().all() and not torch.allclose(moved, plain)

def test_awp_logs_a_step_once(net, small):
    "The second loss of a step is in no table, and the adaptive ω moves once a step."
    def history(*cbs):
        torch.manual_seed(0)
        m = ADER(net().eval(), net().eval(), steps=1)
        learn = quiet(Learner(small(), net(), cbs=[m, *cbs], lr=0.))
        learn.fit(1)
        return m.history()
    assert history().equals(history(AWP(0.05))) # at a learning rate of 0 nothing else can differ

def test_awp_refuses(net, small):
    with pytest.raises(AderError, match='above 0'): AWP(0)
    with pytest.raises(AderError, match='needs a method'): quiet(Learner(small(), net(), cbs=AWP())).fit(1)
