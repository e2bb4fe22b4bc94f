import copy, sys
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from torch.nn import functional as F
from ader.attacks import margin, _length
from ader.data import AderError
from ader.networks import small_resnet
from ader.attacks import (AutoAttack, CW_inf, FGSM, PGD, PGD_sat, PGD_trades, Square, Threat,
                          Transfer, ce, frozen, kl, paper_attacks, _count_passes)

K = 4

class Scale(nn.Module):
    def __init__(self, by): super().__init__(); self.by = by
    def forward(self, z): return z*self.by

class NaN(nn.Module):
    "NaN logits for the images whose first pixel is above one half."
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return torch.where(x[:,:1,0,0] > 0.5, torch.nan, self.net(x))

class Breaks(nn.Module):
    "Raises at its call number `at`."
    def __init__(self, net, at, error): super().__init__(); self.net, self.at, self.error, self.calls = net, at, error, 0
    def forward(self, x):
        self.calls += 1
        if self.calls == self.at: raise self.error
        return self.net(x)

def conv(c): return nn.Sequential(nn.Conv2d(c, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten(), nn.Linear(3, K))
def linear(c, h, w): return nn.Sequential(nn.Flatten(), nn.Linear(c*h*w, K))

KINDS = dict(linear=linear, conv=lambda c,h,w: conv(c),
             huge=lambda c,h,w: nn.Sequential(conv(c), Scale(1e20)), wild=lambda c,h,w: nn.Sequential(linear(c, h, w), Scale(1e38)),
             flat=lambda c,h,w: nn.Sequential(linear(c, h, w), Scale(0.)), nan=lambda c,h,w: NaN(conv(c)))

def rng(seed=0): return torch.Generator().manual_seed(seed)

def state(model):
    "Everything an attack must leave alone."
    return ({k: v.clone() for k,v in model.state_dict().items()}, [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()], [None if p.grad is None else p.grad.clone() for p in model.parameters()])

def same(a, b):
    (sa, *ra, ga), (sb, *rb, gb) = a, b
    grads = all((p is None and q is None) or torch.equal(p, q) for p,q in zip(ga, gb))
    return sa.keys() == sb.keys() and all(torch.equal(sa[k], sb[k]) for k in sa) and ra == rb and grads

@st.composite
def cases(draw):
    "A network in some mixed state, images with black and white pixels among them, labels, an attack."
    torch.manual_seed(draw(st.integers(0, 99)))
    b, c, h, w = (draw(st.integers(1, n)) for n in (4, 3, 5, 5))
    norm = draw(st.sampled_from(['Linf', 'L2']))
    lo, hi = draw(st.sampled_from([(0., 1.), (-1., 1.), (0., 255.)]))
    threat = Threat(draw(st.floats(1e-4, 1.))*(hi-lo), norm, lo, hi)
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    attack = PGD(threat, draw(st.integers(1, 4)), draw(st.none() | st.floats(1e-5, 10.)), draw(st.sampled_from(['uniform', 'gaussian', 'image'])),
                 draw(st.sampled_from(['ce', 'cw', 'kl'])))
    net = KINDS[draw(st.sampled_from(sorted(KINDS)))](c, h, w).to(dtype)
    for m in net.modules(): m.training = draw(st.booleans())
    for p in net.parameters():
        if draw(st.booleans()): p.grad = torch.randn_like(p)
        p.requires_grad_(draw(st.booleans()))
    x = (torch.rand(b, c, h, w, dtype=dtype)*1.5 - 0.25).clamp(0, 1)*(hi-lo) + lo
    y = torch.randn(b, K, dtype=dtype) if attack.loss == 'kl' else torch.randint(0, K, (b,))
    return net, x, y, attack

@given(cases())
def test_attack_keeps_every_promise(case):
    "In the ball and the range, finite, no gradient, nothing left behind, decided by the generator alone."
    net, x, y, attack = case
    t, before, x0, y0, mood = attack.threat, state(net), x.clone(), y.clone(), torch.get_rng_state()
    z = attack(net, x, y, rng(1))
    assert z.shape == x.shape and z.dtype == x.dtype and not z.requires_grad and z.isfinite().all()
    assert t.lo <= z.min() and z.max() <= t.hi
    d = z - x
    size = d.abs().amax((1,2,3)) if t.norm == 'Linf' else _length(d).flatten()
    assert size.max() <= t.eps + 4*torch.finfo(x.dtype).eps*max(t.hi, t.eps)*d[0].numel()**0.5
    assert same(state(net), before) and torch.equal(x, x0) and torch.equal(y, y0)
    assert torch.equal(torch.get_rng_state(), mood), 'the global random state has moved although a generator was given'
    assert torch.equal(attack(net, x, y, rng(1)), z)

@given(cases(), st.integers(1, 4), st.sampled_from([RuntimeError('broken'), KeyboardInterrupt()]))
def test_model_as_before_after_an_error(case, at, error):
    "A model that raises, at whichever call, is left in its modes and with its flags."
    net, x, y, attack = case
    model = Breaks(net, at, error)
    model.training = True
    before = state(model)
    try: attack(model, x, y, rng())
    except AderError: pass # NaN is refused at the door
    except (RuntimeError, KeyboardInterrupt) as e: assert e is error
    assert same(state(model), before)

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
@pytest.mark.parametrize('start', ['uniform', 'gaussian'])
def test_another_seed_another_start(norm, start):
    "The generator is really used, and without one the global random state is."
    net, x, y = linear(1, 6, 6).eval(), torch.rand(3,1,6,6)*0.5 + 0.25, torch.zeros(3).long()
    attack = PGD(Threat(0.1, norm), 1, 1e-3, start)
    assert not torch.equal(attack(net, x, y, rng(1)), attack(net, x, y, rng(2)))
    a, b = attack(net, x, y), attack(net, x, y)
    torch.manual_seed(3); c = attack(net, x, y)
    torch.manual_seed(3); d = attack(net, x, y)
    assert not torch.equal(a, b) and torch.equal(c, d)

@given(st.integers(0, 99), st.sampled_from(['ce', 'cw']), st.floats(0.01, 0.5))
def test_fgsm_is_optimal_on_a_linear_net(seed, loss, eps):
    "Two classes: the result is the corner of the box that closed form names, clamping included."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 2)).double()
    x, y = torch.rand(5,2,3,3, dtype=torch.double), torch.randint(0, 2, (5,))
    z = PGD(Threat(eps), 1, eps, 'image', loss)(net, x, y)
    w = net[1].weight.detach()
    away = (w[1-y] - w[y]).view_as(x)  # the margin's gradient
    np.testing.assert_allclose(z.numpy(), np.clip(x.numpy() + eps*np.sign(away.numpy()), 0, 1), rtol=0, atol=1e-12)
    if loss == 'ce': assert torch.equal(z, FGSM(Threat(eps))(net, x, y))

@given(st.integers(0, 99), st.sampled_from(['ce', 'cw']), st.floats(0.01, 0.24))
def test_one_l2_step_is_optimal_on_a_linear_net(seed, loss, eps):
    "Two classes, away from black and white: one step of length ε ends at x + ε·w/|w|."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 2)).double()
    x, y = torch.rand(5,2,3,3, dtype=torch.double)*0.5 + 0.25, torch.randint(0, 2, (5,))
    z = PGD(Threat(eps, 'L2'), 1, eps, 'image', loss)(net, x, y)
    w = net[1].weight.detach().numpy()
    away = (w[1-y.numpy()] - w[y.numpy()]).reshape(x.shape)
    away /= np.sqrt((away**2).sum((1,2,3), keepdims=True))
    np.testing.assert_allclose(z.numpy(), x.numpy() + eps*away, rtol=0, atol=1e-12)

@given(st.integers(0, 99), st.sampled_from(['ce', 'cw']), st.sampled_from(['Linf', 'L2']), st.floats(0.01, 1.), st.integers(2, 6))
def test_one_step_never_helps_a_linear_net(seed, loss, norm, eps, classes):
    "Both losses are convex there, so a step from the image can't lower them, with clamping and any number of classes."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, classes)).double()
    x, y = torch.rand(5,2,3,3, dtype=torch.double), torch.randint(0, classes, (5,))
    z = PGD(Threat(eps, norm), 1, eps, 'image', loss)(net, x, y)
    f = dict(ce=ce, cw=margin)[loss]
    with torch.no_grad(): assert (f(net(z), y) >= f(net(x), y) - 1e-12).all()

@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e-13, 1., 1e13, 1e20, 1e30])
@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_direction_is_a_unit_step_whatever_the_gradient_s_size(norm, scale):
    "A tiny or huge gradient still says where to go; otherwise attacks on very sure networks quietly stand still."
    g = torch.randn(3,1,4,4)
    d, want = Threat(0.1, norm).direction(g*scale), Threat(0.1, norm).direction(g)
    torch.testing.assert_close(d, want, rtol=1e-4, atol=1e-5)

@given(st.integers(0, 999), st.sampled_from(['Linf', 'L2']), st.floats(0.01, 1.))
def test_projection(seed, norm, eps):
    "Projecting twice changes nothing, and without the range's edges the projected point is the nearest one of the ball."
    torch.manual_seed(seed)
    t, x = Threat(eps, norm, -10., 10.), torch.rand(4,2,3,3, dtype=torch.double)
    z = x + torch.randn_like(x)
    p = t.project(z, x)
    torch.testing.assert_close(t.project(p, x), p, rtol=0, atol=1e-12)
    for _ in range(5): assert (_length(z - p) <= _length(z - t.random(x)) + 1e-12).all()

def test_uniform_l2_start_fills_the_ball():
    "In n dimensions a uniform point of the ball has (length/ε)^n uniform; a missing root crowds the centre or the shell."
    x = torch.zeros(4000,1,2,2, dtype=torch.double)
    u = (_length(Threat(0.5, 'L2', -1., 1.).random(x, rng()))/0.5).flatten()**4
    assert np.abs(np.quantile(u.numpy(), [0.1, 0.5, 0.9]) - [0.1, 0.5, 0.9]).max() < 0.03

@pytest.mark.parametrize('loss', ['ce', 'cw', 'kl'])
def test_works_where_gradients_are_off(loss):
    "Inside `torch.no_grad()`, as in validation, the result is the same as outside."
    net, x = conv(1).eval(), torch.rand(3,1,5,5)
    y = torch.randn(3, K) if loss == 'kl' else torch.tensor([0,1,2])
    attack = PGD(Threat(0.1), 3, loss=loss)
    with torch.no_grad(): z = attack(net, x, y, rng())
    assert torch.equal(z, attack(net, x, y, rng())) and (z - x).abs().max() > 0.09

def test_nothing_reaches_images_and_target():
    "Images and target logits that ask for gradients get none, and their graph survives."
    net = conv(1).eval()
    x, w = torch.rand(3,1,5,5, requires_grad=True), torch.randn(3, K, requires_grad=True)
    target = w**2
    z = PGD(Threat(0.1), 3, loss='kl')(net, x, target, rng())
    assert not z.requires_grad and x.grad is None and w.grad is None
    target.sum().backward()
    assert w.grad is not None

def test_frozen_in_frozen_and_one_network_twice():
    "Nested and repeated freezing ends where it began."
    net = conv(1).train()
    net[1].eval(); net[0].bias.requires_grad_(False)
    before = state(net)
    with frozen(net, net), frozen(net[0]): assert not any(m.training for m in net.modules()) and not any(p.requires_grad for p in net.parameters())
    assert same(state(net), before)

@pytest.fixture(scope='module')
def trained(all_digits):
    "A small net that reads digits, some of them, their labels."
    torch.manual_seed(0)
    x, y = all_digits.train.dataset[:]
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    opt = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(40): opt.zero_grad(); F.cross_entropy(net(x), y).backward(); opt.step()
    return net, *all_digits.valid.dataset[:120]

@pytest.mark.parametrize('norm,eps', [('Linf', 0.1), ('L2', 0.7)])
@pytest.mark.parametrize('loss', ['ce', 'cw', 'kl'])
def test_more_steps_find_more(trained, norm, eps, loss):
    "On a trained net the mean loss inner_loss with the steps, from no attack over one step to many."
    net, x, y = trained
    with torch.no_grad():
        target = net(x) if loss == 'kl' else y
        f = lambda z: dict(ce=ce, cw=margin, kl=kl)[loss](net(z), target).mean().item()
        means = [f(x)] + [f(PGD(Threat(eps, norm), n, eps/4, 'gaussian', loss)(net, x, target, rng())) for n in (1, 3, 10, 30)]
    assert all(b >= a - 1e-3 for a,b in zip(means, means[1:])) and means[-1] > means[0] + 0.1

@pytest.mark.parametrize('attack', paper_attacks(Threat(0.1)), ids=repr)
def test_the_four_attacks_fool_a_trained_net(trained, attack):
    "Each does far more harm than random noise of the same size, and more with a larger ε."
    net, x, y = trained
    with torch.no_grad(): acc = lambda z: (net(z).argmax(1) == y).float().mean().item()
    accs = [acc(a(net, x, y, rng())) for a in (attack.with_eps(0.02), attack, attack.with_eps(0.3))]
    assert accs[0] > accs[1] + 0.1 and accs[1] >= accs[2] and acc(attack.threat.random(x, rng())) > accs[1] + 0.2

@given(st.integers(0, 999), st.floats(1e-3, 1e4))
def test_margin_is_positive_exactly_where_wrong(seed, scale):
    "The sign of the CW loss is the decision, and it equals the margin written out in NumPy."
    torch.manual_seed(seed)
    z, y = torch.randn(20, K, dtype=torch.double)*scale, torch.randint(0, K, (20,))
    m = margin(z, y)
    assert torch.equal(m > 0, z.argmax(1) != y)
    want = [max(v for k,v in enumerate(row) if k != t) - row[t] for row,t in zip(z.tolist(), y.tolist())]
    np.testing.assert_allclose(m.numpy(), want, rtol=1e-12)

def test_losses_of_images_do_not_mix():
    "An image's adversarial example doesn't depend on what else is in the batch."
    net, x, y = conv(1).train(), torch.rand(4,1,5,5), torch.tensor([0,1,2,3])
    attack = PGD(Threat(0.1), 4, start='image')
    torch.testing.assert_close(attack(net, x, y), torch.cat([attack(net, x[i:i+1], y[i:i+1]) for i in range(4)]), rtol=0, atol=1e-6)

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_a_very_sure_network_is_no_refuge(norm):
    "With logits so far apart that the gradient is about 1e-16 the attack still uses its whole ball."
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    with torch.no_grad(): net[1].weight.copy_(torch.linspace(1, 2, 16)*torch.tensor([[1.], [-1.]]))
    x, t = torch.full((1,1,4,4), 0.8), Threat(0.1, norm)
    d = PGD(t, 10, start='image')(net, x, torch.tensor([0])) - x
    assert (d.abs().max() if norm == 'Linf' else _length(d)).item() == pytest.approx(0.1, rel=1e-3)

def test_settings_can_be_kept_and_compared():
    "Attacks are values: hashable, equal when their settings are, and `at` keeps the name and scales the step."
    t = Threat(0.1, 2)
    assert len({PGD_sat(t), PGD_sat(Threat(0.1, 'L2')), PGD_trades(t)}) == 2
    a = PGD(t, 7, 0.03, name='mine').with_eps(0.2)
    assert repr(a) == 'mine' and a.threat == Threat(0.2, 'L2') and a.steps == 7 and a.step_size == pytest.approx(0.06)
    with pytest.raises(Exception): CW_inf().steps = 3
    assert copy.deepcopy(a) == a

@pytest.mark.parametrize('make', [
    lambda: Threat(0), lambda: Threat(-0.1), lambda: Threat(float('nan')), lambda: Threat(float('inf')), lambda: Threat(8), lambda: Threat(0.1, 1),
    lambda: Threat(0.1, lo=1., hi=0.), lambda: Threat(0.1, lo=0., hi=float('nan')),
    lambda: PGD(steps=0), lambda: PGD(steps=-1), lambda: PGD(steps=2.5), lambda: PGD(step_size=0), lambda: PGD(step_size=float('nan')),
    lambda: PGD(step_size=float('inf')), lambda: PGD(start='random'), lambda: PGD(loss='margin')])
def test_bad_settings(make):
    "What can't be an attack is refused when it is made."
    with pytest.raises(AderError): make()

def test_steps_may_be_numpy_s():
    "A number of steps from a NumPy array or a data frame is a number of steps."
    assert PGD(steps=np.int64(3)).steps == 3

X, Y = torch.rand(3,1,5,5), torch.tensor([0,1,2])
@pytest.mark.parametrize('x,y,loss', [
    (X[0], Y, 'ce'), (X[:0], Y[:0], 'ce'), (X + 1, Y, 'ce'), (X - 1, Y, 'ce'), (X*torch.nan, Y, 'ce'), (X*torch.inf, Y, 'ce'), (X.long(), Y, 'ce'),
    ((X*255).byte(), Y, 'ce'), (X, Y[:2], 'ce'), (X, Y[:,None], 'ce'), (X, Y + K, 'ce'), (X, Y - 1, 'ce'), (X, Y.float(), 'ce'), (X, Y, 'kl'), (X, torch.randn(3, K+1), 'kl')],
    ids=['no batch', 'empty', 'above', 'below', 'nan', 'inf', 'integers', 'bytes', 'few labels', 'label column', 'label too large', 'label negative',
         'float labels', 'labels for kl', 'kl of other classes'])
def test_bad_input(x, y, loss):
    "What can't be attacked is refused with one sentence, and the model is left in its mode."
    net = conv(1).train()
    with pytest.raises(AderError) as e: PGD(steps=2, loss=loss)(net, x, y)
    assert len(str(e.value)) > 20 and '\n' not in str(e.value)
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())

# ---- restarts, transfer, Square, AutoAttack

BOTH = Threat(0.1), Threat(0.7, 'L2')

@pytest.mark.parametrize('loss', ['ce', 'cw', 'kl'])
@pytest.mark.parametrize('threat', BOTH, ids=lambda t: t.norm)
def test_restarts(trained, threat, loss):
    "One climb is the first of several, and more of them never make any image safer, by the measure that chooses."
    net, x, y = trained
    with torch.no_grad(): target, judge = (net(x), kl) if loss == 'kl' else (y, margin)
    make = lambda n: PGD(threat, 2, loss=loss, restarts=n)
    with torch.no_grad(): a, b, c = (judge(net(make(n)(net, x, target, rng())), target) for n in (1, 3, 6))
    assert (b >= a - 1e-5).all() and (c >= b - 1e-5).all() and c.mean() > a.mean()
    assert repr(make(3)) == ('CW' if loss == 'cw' else 'PGD') + '-2×3' and make(3).with_eps(0.3).restarts == 3

def test_transfer(trained):
    "The images are those made on the surrogate, whatever network they are for."
    net, x, y = trained
    other = linear(1, 8, 8)
    other[1] = nn.Linear(64, 10)
    a = Transfer(other, PGD_sat(Threat(0.1)))
    before = state(other)
    assert torch.equal(a(net, x, y, rng()), a.attack(other, x, y, rng())) and same(state(other), before)
    assert a.threat == Threat(0.1) and a.with_eps(0.2) == Transfer(other, PGD_sat(Threat(0.2))) and repr(a) == 'PGD_sat (transfer)' and repr(Transfer(other, name='from a friend')) == 'from a friend'
    with pytest.raises(AderError, match='surrogate has 4 classes and the attacked network 10'): Transfer(linear(1, 8, 8))(net, x, y)
    for bad in (lambda: Transfer('net.pt'), lambda: Transfer(other, 'pgd')):
        with pytest.raises(AderError): bad()

BORROWED = Square(Threat(0.15), 200), Square(Threat(1., 'L2'), 200), AutoAttack(Threat(0.15)), AutoAttack(Threat(1.2, 'L2')) # few withstand these; that saves time
ids = lambda a: f'{a!r} {a.threat.norm}'

@pytest.mark.parametrize('attack', BORROWED, ids=ids)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_borrowed_attacks_keep_every_promise(attack, dtype, capfd):
    "In the ball and the range, nothing left behind, nothing printed, decided by the generator alone; a network that may be of any kind."
    torch.manual_seed(1)
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), linear(1, 6, 6)).to(dtype)
    net[1].eval(); net[0].bias.requires_grad_(False)
    x = (torch.rand(5,1,6,6, dtype=dtype)*1.5 - 0.25).clamp(0, 1)
    with frozen(net): y = net(x).argmax(1)
    y[0] = (y[0] + 1) % K # one is wrong already
    before, x0, mood, trace = state(net), x.clone(), torch.get_rng_state(), sys.gettrace()
    z = attack(net, x, y, rng(1))
    assert z.shape == x.shape and z.dtype == dtype and not z.requires_grad and z.isfinite().all() and 0 <= z.min() and z.max() <= 1
    d = z - x
    assert (d.abs().amax() if attack.threat.norm == 'Linf' else _length(d).amax()) <= attack.threat.eps + 1e-6
    assert same(state(net), before) and torch.equal(x, x0) and torch.equal(torch.get_rng_state(), mood) and sys.gettrace() is trace
    assert torch.equal(attack(net, x, y, rng(1)), z)
    assert capfd.readouterr() == ('', '')

@pytest.mark.parametrize('attack', BORROWED, ids=ids)
def test_borrowed_attacks_fool_a_trained_net(trained, attack):
    "Far more than noise of the same size, more with a larger ε; AutoAttack as much as PGD at least."
    net, x, y = trained
    x, y = x[:40], y[:40]
    with torch.no_grad(): acc = lambda z: (net(z).argmax(1) == y).float().mean().item()
    a, b = acc(attack(net, x, y, rng())), acc(attack.with_eps(2*attack.threat.eps)(net, x, y, rng()))
    assert acc(attack.threat.random(x, rng())) > a + 0.15 and b <= a
    if isinstance(attack, AutoAttack): assert a <= acc(PGD_sat(attack.threat)(net, x, y, rng()))

def test_square_follows_its_seed_and_its_queries(trained):
    "Another seed, other squares; more queries, more images fooled; never more passes than queries allow."
    net, x, y = trained
    with torch.no_grad(): right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    few, many = Square(Threat(0.1), 20), Square(Threat(0.1), 400)
    assert not torch.equal(few(net, x, y, rng(1)), few(net, x, y, rng(2)))
    with _count_passes(net) as n: z = many(net, x, y, rng())
    with torch.no_grad(): acc = lambda z: (net(z).argmax(1) == y).float().mean().item()
    assert acc(z) < acc(few(net, x, y, rng())) - 0.1 and len(x) < n.forward <= 403*len(x) + 1 and n.backward == 0
    torch.manual_seed(3); a = few(net, x, y)
    b = few(net, x, y)
    torch.manual_seed(3); assert torch.equal(few(net, x, y), a) and not torch.equal(a, b)

@pytest.mark.parametrize('k,threat', [(2, Threat(0.06)), (3, Threat(0.02))])
def test_autoattack_of_few_classes(k, threat):
    "Networks of few classes are attacked with what is defined for them, and it finds what PGD finds."
    torch.manual_seed(k)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(36, k)), torch.rand(12,1,6,6)
    with torch.no_grad(): y = net(x).argmax(1)
    with _count_passes(net) as n: a = AutoAttack(threat)(net, x, y, rng())
    b = PGD_sat(threat)(net, x, y, rng())
    with torch.no_grad(): a, b = (net(o).argmax(1) != y for o in (a, b))
    assert (a | ~b).all() and a.any() and not a.all() and n.forward > 5000, 'every part has run, for some withstand'

def test_counting(trained):
    "Passes in images, forward and back; nothing left on the model."
    net, x, y = trained
    for attack,forward,backward in ((FGSM(Threat(0.1)), 1, 1), (PGD(Threat(0.1), 7), 7, 7), (PGD(Threat(0.1), 7, restarts=3), 25, 21)):
        with _count_passes(net) as n: attack(net, x, y)
        assert (n.forward, n.backward) == (forward*len(x) + 2, backward*len(x)) # two images are asked for the classes
    with pytest.raises(KeyError):
        with _count_passes(net): raise KeyError
    assert not net._forward_hooks

def test_borrowed_settings():
    "Values like the others: frozen, hashable, with a name for tables; what they can't do is refused when they are made."
    assert len({Square(), Square(Threat(8/255)), Square(queries=10), AutoAttack(), AutoAttack()}) == 3 and Square().queries == 5000
    assert repr(Square(name='sq')) == 'sq' and repr(AutoAttack().with_eps(0.2)) == 'AutoAttack' and copy.deepcopy(Square()) == Square()
    for f in (lambda: Square(queries=0), lambda: Square(queries=1.5), lambda: Square(Threat(0.1, lo=-1)), lambda: AutoAttack(Threat(0.1, hi=2)), lambda: PGD(restarts=0), lambda: PGD(restarts=2, start='image')):
        with pytest.raises(AderError): f()
    with pytest.raises(AderError, match='at least 5×5 pixels'): Square(Threat(1, 'L2'))(linear(1, 4, 4), torch.rand(2,1,4,4), Y[:2])
    for bad in (X + 1, X.long(), X[:0]):
        with pytest.raises(AderError): Square()(conv(1), bad, Y[:len(bad)])
    with pytest.raises(AderError): AutoAttack()(conv(1), X, Y + K)

@pytest.mark.parametrize('restarts', [1, 2])
def test_a_batch_that_climbs_in_pieces_ends_where_it_would_as_a_whole(monkeypatch, restarts):
    torch.manual_seed(0)
    net, x, y = small_resnet(width=4).double().eval(), torch.rand(20, 1, 8, 8, dtype=torch.double), torch.randint(0, 10, (20,))
    def climb(piece):
        monkeypatch.setattr('ader.attacks._CHUNK', piece)
        return PGD(Threat(0.2), 5, restarts=restarts)(net, x, y, torch.Generator().manual_seed(1))
    whole = climb(20)
    assert (whole - x).abs().max() > 0.19
    for piece in (1, 7): torch.testing.assert_close(climb(piece), whole)
