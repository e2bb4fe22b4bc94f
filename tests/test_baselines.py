"The methods that ADER is compared with: each loss against its paper's formula in NumPy, each adversary, each training."
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from hypothesis import given, strategies as st
from torch import nn
from types import SimpleNamespace
from ader.data import AderError
from ader.attention import AttentionOutput
from ader.attacks import PGD, Threat
from ader.training import Method
from ader.methods import (ADER, ARD, AdaAD, BMTARD, IAD, MART, METHODS, MTARD, RSLAD,
boosted_ce, make_method, methods, _settings_of, _teachers_of)

NEW = 'MART', 'ARD', 'IAD', 'RSLAD', 'AdaAD', 'MTARD', 'BMTARD'
B, K = 6, 5

# ---- the formulas, independently, in 64 bits

def log_p(z, t=1.):
    z = np.asarray(z)/t
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))
def ce(z, y): return -log_p(z)[np.arange(len(y)), y]
def kl(target, z, t=1.): return np.array([sum(np.exp(a)*(a - b) for a,b in zip(*rows)) for rows in zip(log_p(target, t), log_p(z, t))])
def entropy(z): return -(np.exp(log_p(z))*log_p(z)).sum(1).mean()
def p_right(z, y): return np.exp(log_p(z))[np.arange(len(y)), y]

def mart(s, s_adv, y, beta, floor=0.):
    loss = []
    for z, z_adv, k in zip(s, s_adv, y):
        p, q = np.exp(log_p(z[None])[0]), np.exp(log_p(z_adv[None])[0])
        wrong = max(q[j] for j in range(len(q)) if j != k)
        loss.append(-np.log(q[k]) - np.log(1 + floor - wrong) + beta*sum(p*np.log(p/q))*(1 - p[k]))
    return np.mean(loss)

# ---- fixed logits: a student that answers with the images, teachers that multiply them by a matrix

class Speaks(nn.Module):
    "Answers with the image times a matrix, or, as a student with a branch, with the image and its reverse."
    def __init__(self, branch=False, matrix=True): super().__init__(); self.w, self.branch = nn.Parameter(torch.randn(K, K, dtype=torch.double)) if matrix else None, branch
    def forward(self, x, attend=False):
        z = x.flatten(1)
        return z if self.w is None else z@self.w

def case(seed=0, scale=2.):
    "Student's logits on clean and attacked images as images, labels, two teachers."
    g = torch.Generator().manual_seed(seed); torch.manual_seed(seed)
    x, x_adv = (scale*torch.randn(B, K, 1, 1, dtype=torch.double, generator=g) for _ in range(2))
    return x, x_adv, torch.randint(0, K, (B,), generator=g), Speaks(), Speaks()

def on(method, epoch=0, epochs=10, student=None):
    "The method as in the middle of a fit."
    method.learn = SimpleNamespace(model=student or Speaks(matrix=False), epoch=epoch, pct_train=epoch/epochs)
    return method

def say(t, x):
    with torch.no_grad(): return t(x).numpy()

seeds = st.integers(0, 999)

@given(seeds, st.sampled_from([0., 1., 5., 6.]), st.sampled_from([0., 1e-4]))
def test_mart(seed, beta, floor):
    "Wang et al. 2020, Eqs. 8–11; with `floor` the constant of the public code."
    x, x_adv, y, *_ = case(seed)
    got = on(MART(beta=beta, floor=floor)).loss(x, x_adv, y).item()
    assert got == pytest.approx(mart(x.flatten(1).numpy(), x_adv.flatten(1).numpy(), y.numpy(), beta, floor), rel=1e-10)

@given(seeds, st.sampled_from([0., 0.3, 1.]), st.sampled_from([1., 5., 30.]), st.sampled_from(['batchmean', 'mean']))
def test_ard(seed, alpha, tau, average):
    "Goldblum et al. 2020, Eq. 2."
    x, x_adv, y, _, t = case(seed)
    s, s_adv, k = x.flatten(1).numpy(), x_adv.flatten(1).numpy(), K if average == 'mean' else 1
    want = (1-alpha)*ce(s, y).mean() + alpha*tau**2*kl(say(t, x), s_adv, tau).mean()/k
    assert on(ARD(t, alpha, tau, reduction=average)).loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)

@given(seeds, st.sampled_from([0., 0.4, 1.]), st.sampled_from([0., 0.1, 2.]), st.sampled_from([1., 4.]), st.booleans())
def test_iad(seed, alpha, beta, tau, whole):
    "Zhu et al. 2022, before and after introspection begins; with `whole` as in the public code of IAD-I."
    x, x_adv, y, _, t = case(seed)
    s, s_adv = x.flatten(1).numpy(), x_adv.flatten(1).numpy()
    c, soft, own = p_right(say(t, x_adv), y)**beta, tau**2*kl(say(t, x), s_adv, tau), kl(s, s_adv)
    late, early = ((1-alpha)*ce(s, y).mean() + alpha*o.mean() for o in ((1 if whole else c)*soft + (1-c)*own, soft))
    for begin,epoch,want in ((0, 0, late), (0.3, 2, early), (0.3, 3, late), (5, 4, early), (5, 5, late)):
        m = on(IAD(t, alpha, beta, tau, begin, whole), epoch)
        assert m.loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)
        assert m.terms['trust'][0].item() == pytest.approx(1 if want is early else c.mean())

@given(seeds, st.sampled_from([0., 5/6, 1.]), st.sampled_from(['batchmean', 'mean']))
def test_rslad(seed, alpha, average):
    "Zi et al. 2021, Eq. 5."
    x, x_adv, y, _, t = case(seed)
    s, s_adv, k = x.flatten(1).numpy(), x_adv.flatten(1).numpy(), K if average == 'mean' else 1
    want = (alpha*kl(say(t, x), s_adv) + (1-alpha)*kl(say(t, x), s)).mean()/k
    assert on(RSLAD(t, alpha, reduction=average)).loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)

@given(seeds, st.sampled_from([0., 0.5, 1.]), st.sampled_from(['batchmean', 'mean']))
def test_adaad(seed, alpha, average):
    "Huang et al. 2023: each image's target is the teacher's answer to the same image."
    x, x_adv, y, _, t = case(seed)
    s, s_adv, k = x.flatten(1).numpy(), x_adv.flatten(1).numpy(), K if average == 'mean' else 1
    want = (alpha*kl(say(t, x_adv), s_adv) + (1-alpha)*kl(say(t, x), s)).mean()/k
    assert on(AdaAD(t, alpha, reduction=average)).loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)

@given(seeds, st.sampled_from([0.025, 1.]), st.sampled_from([1., 2.]), st.sampled_from(['batchmean', 'mean']), st.sampled_from(['MTARD', 'BMTARD']))
def test_mtard_and_bmtard(seed, momentum, beta, average, name):
    "Zhao et al. 2022 and 2024, several steps long: weight and temperatures move as in the papers, and slow down where the learning rate does."
    *_, c, r = case(seed)
    m = on(methods[name](c, r, momentum=momentum, beta=beta, reduction=average, **(dict(rate=0.2) if name == 'BMTARD' else {})))
    omega, tau, first, k = 0.5, [1., 1.], None, K if average == 'mean' else 1
    for step in range(6):
        x, x_adv, y, *_ = case(seed + 1000*step)
        epoch = [0, 0, 0, 8, 9, 9.6][step]
        pace = 0.1**sum(epoch/10 >= o/300 for o in (215, 260, 285))
        zs = [say(c, x)/tau[0], say(r, x_adv)/tau[1]]
        l = np.array([kl(z, s.flatten(1).numpy()).mean()/k for z,s in zip(zs, (x, x_adv))])
        first = l if first is None else first
        rate = (l/first)**beta
        omega += momentum*pace*(rate[0]/rate.sum() - omega)
        assert on(m, epoch).loss(x, x_adv, y).item() == pytest.approx(omega*l[0] + (1-omega)*l[1], rel=1e-9)
        assert m.terms['ω'][-1].item() == pytest.approx(omega)
        if name == 'BMTARD':
            up = 0.2*pace*np.sign(entropy(zs[1]) - entropy(zs[0]))
            tau = [min(max(a + b, 1), 10) for a,b in zip(tau, (up, -up))]

@pytest.mark.parametrize('name', NEW)
def test_gradient_is_the_loss_s(name):
    "What the student gets back is the gradient of the loss, also through both answers where a formula has both."
    x, x_adv, y, c, r = case()
    w = torch.eye(K, dtype=torch.double) + 0.1
    def loss(w):
        student = lambda x: AttentionOutput(x.flatten(1)@w, None, None)
        m = on(make_method(name, c, r, **(dict(warmup=0) if name == 'IAD' else dict(momentum=1e-9) if 'MTARD' in name else {})))
        m.student = student
        return m.loss(x, x_adv, y)
    assert torch.autograd.gradcheck(loss, (w.requires_grad_(),))

@pytest.mark.parametrize('name', [*NEW, 'SAT', 'TRADES'])
def test_the_branch_gets_the_same_loss(name):
    "A student with a branch: the same again on its logits, against the teacher's own, weighted by `branch`."
    x, x_adv, y, c, r = case()
    def value(branch, student):
        m = on(make_method(name, c, r, branch_weight=branch, **(dict(momentum=1e-9) if 'MTARD' in name else {})))
        m.student = student
        return m.loss(x, x_adv, y).item()
    logits, side = (lambda x: x.flatten(1)), (lambda x: x.flatten(1).flip(1))
    both = lambda x: AttentionOutput(logits(x), None, side(x))
    main, branch = (value(1, lambda x, f=f: AttentionOutput(f(x), None, None)) for f in (logits, side))
    assert value(0, both) == pytest.approx(main) and value(0.3, both) == pytest.approx(main + 0.3*branch, rel=1e-6)

@pytest.mark.parametrize('right', [True, False])
def test_boosted_ce_of_a_very_sure_network(right):
    "Logits a hundred apart give a finite loss and a finite gradient, in single precision."
    z = torch.tensor([[100., 0., -50.]], requires_grad=True)
    loss = boosted_ce(z, torch.tensor([0 if right else 1])).sum()
    g, = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all() and (g.abs().max() < 1e-3) == right

# ---- adversaries

START = dict(MART=('gaussian', 'ce'), ARD=('uniform', 'ce'), IAD=('uniform', 'ce'), RSLAD=('gaussian', 'kl'), AdaAD=('gaussian', 'kl'),
             MTARD=('gaussian', 'ce'), BMTARD=('gaussian', 'ce'))

@pytest.fixture
def make(net):
    "A function that makes a method by name, with two steps of attack and two teachers."
    return lambda name, **kwargs: make_method(name, net().eval(), net().eval(), **{**dict(steps=2), **kwargs})

@pytest.fixture
def learner(small, net, tmp_path):
    "A function that makes a quiet `Learner`."
    def f(method, cbs=(), student=None, dls=None):
        learn = Learner(dls or small(), student or net(), cbs=[method, *cbs], path=tmp_path, lr=1e-2)
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
        learn.logger = lambda o: None
        return learn
    return f

def climbed(m, x, y, t):
    "What the method's adversary inner_loss, for each image, as a function of images."
    if m.inner_loss == 'ce': return lambda z: torch.tensor(ce(m.net(z).detach().numpy(), y.numpy()))
    target = t(x).detach().numpy()
    return lambda z: torch.tensor(kl(t(z).detach().numpy() if isinstance(m, AdaAD) else target, m.net(z).detach().numpy()))

@pytest.mark.parametrize('name', NEW)
def test_adversary(make, learner, name):
    "The method's own start and loss, inside the ball, and what is climbed is higher afterwards."
    m = make(name, steps=5)
    learn = learner(m); learn.fit(0)
    assert (m.attack.start, m.attack.loss) == START[name] and m.attack == PGD(Threat(0.2), 5, 0.05, *START[name])
    x, y = learn.dls.train.one_batch()
    z = m.adversary(x, y)
    assert (z - x).abs().max() <= 0.2 + 1e-6 and 0 <= z.min() and z.max() <= 1 and not z.requires_grad
    learn.model.eval()
    f = climbed(m, x, y, m.teachers.get('robust'))
    assert f(z).mean() > f(x).mean()

def test_adaad_s_gradient_goes_through_both(net):
    "One step from the image follows the gradient of the divergence of both answers, and not of the student's alone."
    s, t, x = net().eval().double(), net().eval().double(), torch.rand(4,1,8,8, dtype=torch.double)*0.5 + 0.25
    m = AdaAD(t, threat=Threat(1e-3), steps=1, step_size=1e-3)
    m.learn, m.attack = SimpleNamespace(model=s), PGD(Threat(1e-3), 1, 1e-3, 'image', 'kl')
    moved = m.adversary(x, None) - x
    z = x.clone().requires_grad_()
    f = lambda a, b: (b.softmax(1)*(b.log_softmax(1) - a.log_softmax(1))).sum()
    both, = torch.autograd.grad(f(s(z), t(z)), z)
    alone, = torch.autograd.grad(f(s(z), t(z).detach()), z)
    same = lambda g: (moved.sign() == g.sign()).double().mean().item()
    assert same(both) > 0.99 and same(alone) < 0.99

# ---- training

def weights(net): return {k: v.clone() for k,v in net.state_dict().items()}

@pytest.mark.parametrize('name', NEW)
def test_training(make, learner, name):
    "It runs, the loss falls, two passes of the student a step, teachers as before, and what is recorded is finite."
    m, passes = make(name), []
    before = {r: weights(t) for r,t in m.teachers.items()}
    class Count(Callback):
        order = 100
        def before_fit(self): self.hook = self.learn.model.register_forward_pre_hook(lambda net, x: passes.append(1) if net.training and self.training else None)
        def after_fit(self): self.hook.remove()
    learn = learner(m, [Count()])
    learn.fit(2)
    assert len(passes) == 2*2*3
    losses = [o[0] for o in learn.recorder.values]
    assert losses[1] < losses[0] and m.history().notna().all(axis=None)
    assert set(m.logged_terms) == set(m.history().columns) and set(learn.recorder.metric_names) >= {'clean', 'pgd-10', *m.logged_terms}
    for r,t in m.teachers.items(): assert all(torch.equal(v, before[r][k]) for k,v in t.state_dict().items()) and not any(o.training for o in t.modules())
    assert all(p.grad is None and p.requires_grad for t in m.teachers.values() for p in t.parameters())

@pytest.mark.parametrize('name', ['IAD', 'BMTARD'])
def test_plain_networks_will_do(plain, learner, name):
    "Neither student nor teachers need attention."
    learn = learner(make_method(name, plain().eval(), plain().eval(), steps=1), student=plain())
    learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1][0])

@pytest.mark.parametrize('name,asked', [('IAD', 2), ('RSLAD', 1), ('AdaAD', 4), ('ADER', 1)])
def test_a_teacher_answers_once(net, learner, name, asked):
    "About the same images a teacher is asked once a step, in the next step again."
    r, calls = net().eval(), []
    m = make_method(name, net().eval(), r, steps=2, **(dict(warmup=0) if name == 'IAD' else {}))
    learn = learner(m); learn.fit(0)
    r.register_forward_hook(lambda *a: calls.append(1))
    learn.fit(1)
    assert len(calls) == 1 + 3 + 3*asked, 'one question at the door, three for the fast copy, and those of three steps' # AdaAD: two of the attack, two of the loss
    assert m._asked == {}

def test_a_loader_that_repeats_itself(net, learner):
    "One and the same tensor in every step, its content changed in between: the teacher is asked anew."
    m = RSLAD(net().eval(), steps=1, precision='float32')
    learn = learner(m); learn.fit(0)
    x, y = learn.dls.train.one_batch()
    m.before_fit(), m.before_train()
    learn.training, learn.n_iter, learn.n_epoch = True, 1, 1
    learn.one_batch(0, (x, y))
    x.copy_(1 - x)
    with torch.no_grad(): want = m.teachers['robust'](x)
    learn.one_batch(0, (x, y))
    torch.testing.assert_close(m.teacher('robust', x).logits, want)

def test_a_second_fit_begins_anew(make, learner):
    "Weight and temperatures start again where they started."
    m = make('BMTARD', rate=0.1)
    learn = learner(m)
    for _ in range(2):
        learn.fit(1)
        h = m.history()
        assert len(h) == 3 and h['ω'][0] == 0.5 and h['τ_clean'][0] == h['τ_adv'][0] == 1 and max(h['τ_clean'][2], h['τ_adv'][2]) > 1.05

def test_temperatures_make_teachers_equally_sure():
    "Over many steps the entropies meet, and no temperature leaves its bounds."
    x, x_adv, y, c, r = case(3)
    with torch.no_grad(): c.w.mul_(3)
    m = on(BMTARD(c, r, rate=0.02))
    gap = lambda: abs(entropy(say(c, x)/m.tau[0].item()) - entropy(say(r, x_adv)/m.tau[1].item()))
    m.loss(x, x_adv, y); before = gap()
    for _ in range(400):
        m.loss(x, x_adv, y)
        assert 1 <= m.tau.min() and m.tau.max() <= 10
    assert gap() < 0.05 < before

# ---- by name

def test_the_table_is_true():
    "The table names the methods of the registry in its order, and each needs the teachers that it says."
    assert [o.method for o in METHODS] == list(methods)
    for o in METHODS:
        c = methods[o.method]
        assert _teachers_of(c) == [r for r in ('clean', 'robust') if getattr(o, r)]
        assert o.attention == issubclass(c, ADER) and bool(o.inner) == bool(o.gradient) == (o.method != 'Natural')
        assert ('CE' in o.inner) == (c.inner_loss == 'ce' and o.method != 'Natural') and c.__doc__

@pytest.mark.parametrize('name', [o.method for o in METHODS])
def test_each_by_name(net, name):
    "Every method is made from the same call; teachers it has no use for are left out."
    c, r = net(), net()
    m = make_method(name.lower(), c, r, Threat(0.1), steps=3)
    assert type(m) is methods[name] and m.threat == Threat(0.1) and m.steps == 3
    assert m.teachers == {k: v for k,v in dict(clean=c, robust=r).items() if k in _teachers_of(methods[name])}
    for role in _teachers_of(methods[name]):
        with pytest.raises(AderError, match=f'{name} needs a {role} teacher'): make_method(name, **{k: v for k,v in dict(clean=c, robust=r).items() if k != role})
    with pytest.raises(AderError, match=f"{name} has no setting 'setps'; it has .*steps"): make_method(name, c, r, setps=3)

def test_names_forgive_case_and_hyphens(net):
    "As people write them; what is unknown is answered with the list."
    for name in ('B-MTARD', 'bmtard', 'BMtard'): assert type(make_method(name, net(), net())) is BMTARD
    for name in ('RSLADD', '', None, 3):
        with pytest.raises(AderError, match='must be one of Natural, SAT, .*ADER'): make_method(name)

def test_a_method_of_one_s_own_joins(net, monkeypatch):
    "Once in the registry, it is made by name and asked for what it lacks."
    class Mine(Method):
        def __init__(self, robust, strength=2., **kwargs): super().__init__(teachers=dict(robust=robust), **kwargs); self.strength = strength
    monkeypatch.setitem(methods, 'Mine', Mine)
    assert make_method('mine', robust=net(), strength=3.).strength == 3
    assert _teachers_of(Mine) == ['robust'] and set(_settings_of(Mine)) == {'threat', 'precision', 'compile', 'joint', 'steps', 'step_size', 'branch_weight', 'strength'}
    with pytest.raises(AderError, match='Mine needs a robust teacher'): make_method('mine')

def test_settings():
    "The settings of a method with their defaults, its own and the base's, without the teachers."
    s = _settings_of(BMTARD)
    assert s['rate'] == 0.001 and s['momentum'] == 0.025 and s['reduction'] == 'batchmean' and s['steps'] == 10
    assert not {'clean', 'robust', 'teachers', 'kwargs', 'self'} & set(s)

# ---- doors

@pytest.mark.parametrize('bad', [
    lambda t: MART(beta=-1.), lambda t: MART(floor=-1e-4), lambda t: MART(floor=1.1), lambda t: ARD(t, alpha=1.1), lambda t: ARD(t, alpha=-0.1), lambda t: ARD(t, temperature=0.),
    lambda t: ARD(t, reduction='sum'), lambda t: IAD(t, alpha=2.), lambda t: IAD(t, beta=-1.), lambda t: IAD(t, warmup=-1), lambda t: IAD(t, temperature=-2.),
    lambda t: RSLAD(t, alpha=7.), lambda t: AdaAD(t, alpha=float('nan')), lambda t: MTARD(t, t, momentum=0.), lambda t: MTARD(t, t, beta=0.), lambda t: MTARD(t, t, decay=(215,)),
    lambda t: BMTARD(t, t, rate=-1.), lambda t: BMTARD(t, t, tau_min=0.), lambda t: BMTARD(t, t, tau_min=3., tau_max=2.), lambda t: RSLAD(t, steps=0), lambda t: ARD(t, branch_weight=-1.)])
def test_bad_settings(net, bad):
    "Refused in one sentence when the method is made."
    with pytest.raises(AderError) as e: bad(net())
    assert len(str(e.value)) > 20 and '\n' not in str(e.value)

@pytest.mark.parametrize('name', [o for o in NEW if o != 'MART'])
def test_teacher_that_does_not_fit(net, learner, name):
    "One sentence naming the role, before the first step."
    for teacher,match in ((net(classes=7), 'robust teacher has 7 classes and the student 10'), ('t.pt', 'robust teacher must be a network')):
        with pytest.raises(AderError, match=match): learner(make_method(name, net(), teacher, steps=1)).fit(1)
