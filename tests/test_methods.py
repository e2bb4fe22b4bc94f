import copy, numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.schedule import *
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F
from ader.data import AderError
from ader.networks import small_resnet
from ader.attention import forward_with_attention
from ader.attacks import PGD, Threat
from ader.weighting import AdaptiveWeight, ConstantWeight
from ader.training import AWP, Method, Natural, SAT
from ader.methods import ADER, TRADES

@pytest.fixture
def make(net):
    "A function that makes a method by name, with two steps of attack, and for ADER two teachers."
    def f(name, **kwargs):
        if name == 'ADER': kwargs = dict(clean=net().eval(), robust=net().eval(), **kwargs)
        return dict(Natural=Natural, SAT=SAT, TRADES=TRADES, ADER=ADER)[name](**{**dict(steps=2), **kwargs})
    return f

@pytest.fixture
def learner(small, net, tmp_path):
    "A function that makes a quiet `Learner`: `learner(method, cbs=..., dls=..., student=...)`."
    def f(method, cbs=(), dls=None, student=None, **kwargs):
        learn = Learner(dls or small(), student or net(), cbs=[method, *cbs], path=tmp_path, **{**dict(lr=1e-2), **kwargs})
        learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
        learn.logger = lambda o: None
        return learn
    return f

def weights(net): return {k: v.clone() for k,v in net.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def columns(learn): return list(learn.recorder.metric_names)
def last(learn, name): return learn.recorder.values[-1][columns(learn).index(name) - 1]

# ---- modes, teachers, batch norm

class Forwards(Callback):
    "The mode of every forward pass that the student makes in each training step."
    order = 100
    def before_fit(self):
        self.seen = []
        self.hook = self.learn.model.register_forward_pre_hook(lambda m, i: self.passed(m))
    def passed(self, m):
        if self.seen: self.seen[-1].append((m.training, torch.is_grad_enabled()))
    def before_batch(self):
        if self.training: self.seen.append([])
    def before_validate(self): self.hook.remove()

@pytest.mark.parametrize('name,joint,passes', [('Natural', False, 1), ('Natural', True, 1), ('SAT', False, 1), ('SAT', True, 1),
                                               ('TRADES', False, 2), ('TRADES', True, 1), ('ADER', False, 2), ('ADER', True, 1)])
def test_training_passes(make, learner, name, joint, passes):
    "Batch norm learns from the passes of the loss and from nothing else; a pass too many shifts its statistics."
    f = Forwards()
    learn = learner(make(name, joint=joint), [f])
    learn.fit(1)
    assert len(f.seen) == 3
    for step in f.seen: assert [o for o in step if o[0]] == [(True, True)]*passes
    n = {k: v.item() for k,v in learn.model.state_dict().items() if 'num_batches_tracked' in k}
    assert set(n.values()) == {3*passes}

def test_a_joint_batch_is_one_pass(learner):
    "Loss, gradients and statistics of batch norm are those of a single pass on both kinds of images."
    seen = []
    class Spy(TRADES):
        def adversary(self, x, y):
            self.before = copy.deepcopy(self.net)
            return super().adversary(x, y)
        def loss(self, x, x_adv, y):
            loss, out = super().loss(x, x_adv, y), forward_with_attention(self.before, torch.cat([x, x_adv]))
            f = lambda z, z_adv: F.cross_entropy(z, y) + 2.5*F.kl_div(z_adv.log_softmax(1), z.log_softmax(1), log_target=True, reduction='batchmean')
            want, nets = f(*out.logits.chunk(2)) + f(*out.branch_logits.chunk(2)), (self.net, self.before)
            grads = [torch.autograd.grad(l, [*n.parameters()], retain_graph=True) for l,n in zip((loss, want), nets)]
            buffers = [[b.float() for b in n.buffers()] for n in nets]
            for a,b in zip([loss, *grads[0], *buffers[0]], [want, *grads[1], *buffers[1]]): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
            seen.append(len(buffers[0]))
            return loss
    learner(Spy(beta=2.5, steps=2, joint=True, precision='float32')).fit(1)
    assert len(seen) == 3 and min(seen) > 0

def test_a_joint_batch_of_images_that_nobody_attacked(learner):
    "Where the adversary gives the images back, both halves of the pass are used all the same."
    f = Forwards()
    learner(Mixed(steps=1, joint=True), [f]).fit(1)
    assert [[o for o in step if o[0]] for step in f.seen] == [[(True, True)]]*3

def test_the_second_loss_of_awp_is_joint_too(make, learner):
    "One pass at the weights, one at the moved ones."
    f = Forwards()
    learner(make('TRADES', joint=True), [AWP(), f]).fit(1)
    assert [[o for o in step if o[0]] for step in f.seen] == [[(True, True)]*2]*3

def test_joint_or_not(make, learner, net):
    "Without batch norm an image doesn't depend on its batch; and SAT, whose student sees attacked images only, is as it was."
    def trained(name, joint, norm):
        torch.manual_seed(0)
        student = net()
        for k,m in list(student.named_modules()):
            if isinstance(m, nn.BatchNorm2d) and not norm: student.set_submodule(k, nn.Identity())
        learn = learner(make(name, joint=joint, precision='float32'), student=student, opt_func=SGD)
        learn.fit(1)
        return weights(learn.model)
    close = lambda a, b: all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    assert close(trained('TRADES', False, False), trained('TRADES', True, False))
    assert not close(trained('TRADES', False, True), trained('TRADES', True, True))
    assert same(trained('SAT', False, True), trained('SAT', True, True))

@pytest.mark.parametrize('name', ['SAT', 'TRADES', 'ADER'])
def test_attack_sees_the_student_in_evaluation_mode(make, learner, name):
    "What is attacked is the network as it would be used in this very step."
    m, seen = make(name, precision='float32'), []
    learn, climb = learner(m), m.attack_student
    def spy(x, target):
        with torch.no_grad(): seen.append((m.frozen_copy('student')(x) - copy.deepcopy(learn.model).eval()(x)).abs().max().item())
        return climb(x, target)
    m.attack_student = spy
    learn.fit(2)
    assert len(seen) == 6 and max(seen) < 1e-4

def test_teachers_never_change(learner, net):
    "Not a weight, not a running mean, not a mode, no gradients, and no graph is built through them."
    c, r, seen = net().eval(), net().train(), [] # the second comes straight from its own training
    before = [weights(t) for t in (c, r)]
    for t in (c, r): t.register_forward_hook(lambda m, i, o: seen.append((torch.is_grad_enabled(), any(p.training for p in m.modules()))))
    learner(ADER(c, r, steps=2)).fit(2)
    assert all(same(weights(t), b) for t,b in zip((c, r), before))
    assert all(not m.training for t in (c, r) for m in t.modules()) and all(p.grad is None and p.requires_grad for t in (c, r) for p in t.parameters())
    assert len(seen) >= 12 and set(seen) == {(False, False)}

def test_each_teacher_sees_its_images(learner, net):
    "The clean teacher the clean images, the adversarial one the attacked, or with `robust_input='x'` the clean."
    for sees in 'x_adv', 'x':
        c, r, log = net().eval(), net().eval(), dict(clean=[], robust=[], x=[], x_adv=[])
        for k,t in dict(clean=c, robust=r).items(): t.register_forward_pre_hook(lambda m, i, k=k: log[k].append(i[0].clone()))
        class Spy(ADER):
            def loss(self, x, x_adv, y):
                for v in log.values(): v.clear()
                log['x'].append(x.clone()); log['x_adv'].append(x_adv.clone())
                return super().loss(x, x_adv, y)
        learner(Spy(c, r, steps=2, robust_input=sees)).fit(1)
        assert torch.equal(log['clean'][0], log['x'][0]) and torch.equal(log['robust'][0], log[sees][0])
        assert (log['x_adv'][0] - log['x'][0]).abs().max() > 0.05 and len(log['clean']) == len(log['robust']) == 1

@pytest.mark.parametrize('name,start,loss', [('SAT', 'uniform', 'ce'), ('TRADES', 'gaussian', 'kl'), ('ADER', 'gaussian', 'ce')])
def test_training_attack(make, learner, name, start, loss):
    "The ε of the data, steps of a quarter of it, and the method's own start and loss."
    m = make(name, steps=7)
    learner(m).fit(0)
    assert m.attack == PGD(Threat(0.2), 7, 0.05, start, loss)
    m = make(name, threat=Threat(0.5, 2), step_size=0.3)
    learner(m).fit(0)
    assert m.attack == PGD(Threat(0.5, 'L2'), 2, 0.3, start, loss)

@pytest.mark.parametrize('name,eps', [('SAT', 0.2), ('TRADES', 0.2), ('ADER', 0.2)])
def test_adversary_is_in_the_ball(make, learner, name, eps):
    "What the loss is computed on keeps to the threat and raises what the method's attack inner_loss."
    m = make(name)
    learn = learner(m); learn.fit(0)
    x, y = learn.dls.train.one_batch()
    z = m.adversary(x, y)
    assert (z - x).abs().max() <= eps + 1e-6 and 0 <= z.min() and z.max() <= 1 and not z.requires_grad
    learn.model.eval()
    with torch.no_grad(): a, b = learn.model(x), learn.model(z)
    assert (F.cross_entropy(b, y) > F.cross_entropy(a, y)) if name != 'TRADES' else F.kl_div(b.log_softmax(1), a.softmax(1), reduction='batchmean') > 1e-3

# ---- what other callbacks and the user see

EVENTS = ('before_fit before_epoch before_train after_pred after_loss before_backward after_backward before_step after_step after_batch after_train '
          'before_validate after_validate after_epoch after_fit').split()

def spy(order):
    "A callback that looks at `learn.model` and `learn.loss_func` at each event."
    class Spy(Callback):
        def __init__(self): self.at = {}
        def before_fit(self): self.the_net = self.learn.model
    Spy.order = order
    def look_at(self, event): self.at[event, self.training] = self.at.get((event, self.training), True) and self.learn.model is self.the_net
    for e in EVENTS:
        if e != 'before_fit': setattr(Spy, e, lambda self, e=e: look_at(self, e))
    def before_batch(self):
        if not self.training or order < 40: look_at(self, 'before_batch')
    Spy.before_batch = before_batch
    return Spy()

@pytest.mark.parametrize('name', ['Natural', 'ADER'])
def test_everybody_else_sees_the_student(make, learner, name):
    "At every event of the fit, in callbacks before and after the method, `learn.model` is the network."
    a, b = spy(-100), spy(100)
    learn = learner(make(name), [a, b])
    loss_func = learn.loss_func
    learn.fit(2)
    for s in (a, b):
        assert all(s.at.values()), [k for k,v in s.at.items() if not v]
        assert {('after_pred', True), ('after_batch', True), ('after_pred', False), ('before_batch', False)} <= s.at.keys()
    assert learn.loss_func is loss_func and learn.model is a.the_net and list(learn.metrics) == []

class Fails(Callback):
    "Raises at one event of the second training step."
    def __init__(self, event, error, order):
        self.n, self.error = 0, error
        setattr(self, event, self.fail)
        type(self).order = order
    def fail(self):
        if self.training and self.iter == 1 and not self.n:
            self.n = 1
            raise self.error

@pytest.mark.parametrize('where,error', [('adversary', KeyboardInterrupt), ('adversary', CancelBatchException), ('loss', RuntimeError),
                                         ('student', CancelBatchException), ('teacher', KeyboardInterrupt)])
def test_after_an_interrupt_in_the_step(make, learner, where, error):
    "An error in the attack, in the loss, in a network: the learner is as before, and the next fit is an ordinary one."
    m, done = make('ADER'), []
    learn = learner(m)
    net, func = learn.model, learn.loss_func
    def breaks(*args):
        if learn.training and learn.iter == 1 and not done:
            done.append(1)
            raise error('broken')
    if where in ('student', 'teacher'): (net if where == 'student' else m.teachers['robust']).register_forward_hook(breaks)
    else:
        f = getattr(m, where)
        setattr(m, where, lambda *args: breaks() or f(*args))
    if error is CancelBatchException: learn.fit(1)
    else:
        with pytest.raises(error): learn.fit(1)
    assert done and learn.model is net and getattr(learn.loss_func, 'plain', learn.loss_func) is func and all(p.requires_grad for p in net.parameters())
    learn.fit(1)
    assert columns(learn).count('clean') == 1 and columns(learn).count('pgd-10') == 1 and list(learn.metrics) == []

@pytest.mark.parametrize('event,order,error', [
    ('before_batch', 100, CancelBatchException()), ('after_pred', 0, KeyboardInterrupt()), ('after_pred', 100, CancelBatchException()),
    ('after_loss', 0, CancelBatchException()), ('after_step', 100, KeyboardInterrupt())], ids=lambda o: type(o).__name__ if isinstance(o, BaseException) else o)
def test_when_another_callback_breaks_off(make, learner, event, order, error):
    """A callback that skips a batch leaves model and loss function as they were, for the rest of the fit and afterwards;
    an interrupt inside another callback does no harm to what is called next."""
    learn = learner(make('SAT'), [Fails(event, error, order)])
    net, func = learn.model, learn.loss_func
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt): learn.fit(1)
    else:
        learn.fit(1)
        assert learn.model is net and getattr(learn.loss_func, 'plain', learn.loss_func) is func
    with torch.no_grad(): want = F.cross_entropy(net.eval()(learn.dls.valid.dataset.x), learn.dls.valid.dataset.y).item()
    if not isinstance(error, KeyboardInterrupt): assert last(learn, 'valid_loss') == pytest.approx(want, rel=1e-4)
    assert learn.validate()[0] == pytest.approx(want, rel=1e-4)
    learn.fit(1)
    assert learn.model is net and getattr(learn.loss_func, 'plain', learn.loss_func) is func
    assert columns(learn).count('clean') == 1

# ---- metrics

@pytest.mark.parametrize('name', ['Natural', 'ADER'])
def test_columns_are_what_they_say(make, learner, small, name):
    "'clean' and 'pgd-10' against a direct computation, over validation batches of different size; the loss column is the learner's own."
    class Mood(Callback):
        def before_validate(self): self.state = torch.get_rng_state()
    mood = Mood()
    dls = small(valid=40)
    dls.valid.bs = 25
    learn = learner(make(name, precision='float32'), [mood], dls=dls)
    learn.fit(1)
    assert columns(learn)[:5] == ['epoch', 'train_loss', 'valid_loss', 'clean', 'pgd-10']
    torch.set_rng_state(mood.state)
    net, right, attacked, losses = learn.model.eval(), 0, 0, []
    for x,y in dls.valid:
        x_adv = PGD(Threat(0.2), 10)(net, x, y)
        with torch.no_grad():
            right += (net(x).argmax(1) == y).sum().item(); attacked += (net(x_adv).argmax(1) == y).sum().item()
            losses.append(F.cross_entropy(net(x), y, reduction='sum').item())
    assert last(learn, 'clean') == pytest.approx(right/40) and last(learn, 'pgd-10') == pytest.approx(attacked/40)
    assert last(learn, 'valid_loss') == pytest.approx(sum(losses)/40, rel=1e-4)

def test_metrics_of_the_user_stay(make, learner):
    "They come first, are computed on clean answers, and are all that is left afterwards."
    def error(pred, y): return (pred.argmax(-1) != y).float().mean()
    learn = learner(make('ADER'), metrics=[error])
    learn.fit(1)
    assert columns(learn) == ['epoch', 'train_loss', 'valid_loss', 'error', 'clean', 'pgd-10', 'ω', 'L_clean', 'L_adv', 'att_clean', 'att_adv', 'time']
    assert last(learn, 'error') == pytest.approx(1 - last(learn, 'clean'))
    assert [m.name for m in learn.metrics] == ['error']

def test_columns_of_ader_are_means_of_the_epoch(make, learner):
    "Each shown term is its mean over the steps of that epoch alone."
    learn = learner(make('ADER')); learn.fit(2)
    h = learn.ader.history()
    assert len(h) == 6
    for epoch in 0, 1:
        row = dict(zip(columns(learn)[1:], learn.recorder.values[epoch]))
        for k in h: assert row[k] == pytest.approx(h[k][3*epoch:3*epoch+3].mean(), rel=1e-5)

def test_train_loss_is_the_method_s(make, learner):
    "What the learner logs, and what other callbacks see as `learn.loss`, is the loss of the method."
    class Losses(Callback):
        order = 100
        def before_fit(self): self.all = []
        def after_loss(self): self.all.append(self.learn.loss.item()) if self.training else None
    class Seven(Natural):
        def loss(self, x, x_adv, y): return 0*super().loss(x, x_adv, y) + 7
    l = Losses()
    learn = learner(Seven(), [l]); learn.fit(1)
    assert l.all == [7.]*3 and last(learn, 'train_loss') == pytest.approx(7)

# ---- the equations

def outputs(net, x): return [o.detach().double().numpy() for o in forward_with_attention(net, x)]
def np_log_softmax(z): z = z - z.max(1, keepdims=True); return z - np.log(np.exp(z).sum(1, keepdims=True))
def np_kl(p, q): p, q = np_log_softmax(p), np_log_softmax(q); return (np.exp(p)*(p-q)).sum(1).mean()
def np_ce(z, y): return -np_log_softmax(z)[np.arange(len(y)), y].mean()
def np_att(s, t):
    p, q = (m.reshape(len(m), -1)/m.reshape(len(m), -1).sum(1, keepdims=True) for m in (s, t))
    return (p*np.log(p/q)).sum(1).mean()

@pytest.fixture
def fixed(small, net, learner):
    "A function that makes a method ready, its student in evaluation mode, and images: `fixed(method) -> student, x, x_adv, y`."
    def f(method, student=None):
        learn = learner(method, dls=small(dtype=torch.double), student=(student or net()).double())
        learn.fit(0)
        x, y = learn.dls.train.one_batch()
        return learn.model.eval(), x, (x + 0.1*torch.rand_like(x)).clamp(0, 1), y
    return f

@pytest.mark.parametrize('branch', [0., 1., 0.3])
@pytest.mark.parametrize('name', ['Natural', 'SAT', 'TRADES'])
def test_one_loss_by_hand(make, fixed, name, branch):
    "Natural, SAT and TRADES written out in NumPy, in double precision, with the branch's share."
    m = make(name, branch_weight=branch, **(dict(beta=2.5) if name == 'TRADES' else {}))
    net, x, x_adv, y = fixed(m)
    (z, _, b), (z_adv, _, b_adv) = outputs(net, x), outputs(net, x_adv)
    f = dict(Natural=lambda z, z_adv: np_ce(z, y.numpy()), SAT=lambda z, z_adv: np_ce(z_adv, y.numpy()),
             TRADES=lambda z, z_adv: np_ce(z, y.numpy()) + 2.5*np_kl(z, z_adv))[name]
    assert m.loss(x, x_adv, y).item() == pytest.approx(f(z, z_adv) + branch*f(b, b_adv), rel=1e-10)

@pytest.mark.parametrize('kw', [{}, dict(branch_weight=0.), dict(branch_weight=0.3), dict(attention='none'), dict(attention='clean'), dict(attention='robust'), dict(robust_input='x')],
                         ids=lambda kw: ', '.join(f'{k}={v}' for k,v in kw.items()) or 'default')
def test_one_ader_loss_by_hand(make, fixed, kw):
    "Eqs. 5, 6 and 8 with ω = 0.3, in NumPy and double precision, for each way to leave something out; and every term where it belongs."
    m = make('ADER', weight=ConstantWeight(0.3), **kw)
    for t in m.teachers.values(): t.double()
    net, x, x_adv, y = fixed(m)
    c, r = m.teachers['clean'], m.teachers['robust']
    (z, a, b), (z_adv, a_adv, b_adv) = outputs(net, x), outputs(net, x_adv)
    (tz, ta, _), (tz_adv, ta_adv, _) = outputs(c, x), outputs(r, x if kw.get('robust_input') == 'x' else x_adv)
    which = kw.get('attention', 'both')
    att, att_adv = np_att(a, ta)*(which in ('both', 'clean')), np_att(a_adv, ta_adv)*(which in ('both', 'robust'))
    clean, adv = np_kl(tz, z) + att, np_kl(tz_adv, z_adv) + att_adv
    want = 0.3*clean + 0.7*adv + kw.get('branch_weight', 1.)*(0.3*np_kl(tz, b) + 0.7*np_kl(tz_adv, b_adv))
    assert m.loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)
    got = {k: v[-1].item() for k,v in m.terms.items()}
    assert got == pytest.approx({'ω': 0.3, 'L_clean': clean, 'L_adv': adv, 'att_clean': att, 'att_adv': att_adv}, rel=1e-10)

def test_settings_of_the_lesson_reach_it(make, fixed):
    "Temperature and directions given to ADER act on logits, branch and maps alike."
    kw = dict(temperature=3., direction='S||T', att_direction='T||S')
    m = make('ADER', weight=ConstantWeight(1.), **kw)
    for t in m.teachers.values(): t.double()
    net, x, x_adv, y = fixed(m)
    (z, a, b), (tz, ta, _) = outputs(net, x), outputs(m.teachers['clean'], x)
    want = 9*np_kl(z/3, tz/3) + np_att(ta, a) + 9*np_kl(b/3, tz/3)
    assert m.loss(x, x_adv, y).item() == pytest.approx(want, rel=1e-10)

def test_recorded_terms_satisfy_the_equations(make, learner):
    "Over a real training: ω from the recorded losses by Eqs. 9 and 10, the learner's loss by Eq. 8."
    beta, momentum = 2., 0.1
    class Losses(Callback):
        def before_fit(self): self.all = []
        def after_loss(self): self.all.append(self.learn.loss.item()) if self.training else None
    l = Losses()
    learn = learner(make('ADER', branch_weight=0., weight=AdaptiveWeight(beta, momentum)), [l]); learn.fit(2)
    h = learn.ader.history()
    L, omega = h[['L_clean', 'L_adv']].to_numpy(np.float64), 0.5
    for i,now in enumerate(L):
        r = (now/L[0])**beta
        omega += momentum*(r[0]/r.sum() - omega)
        assert h['ω'][i] == pytest.approx(omega, rel=1e-4)
        assert l.all[i] == pytest.approx(omega*now[0] + (1-omega)*now[1], rel=1e-4)
    assert h['ω'].std() > 0 and (h.att_clean > 0).all() and (h.att_clean < h.L_clean).all()

def test_without_branch_the_class_scores_learn_nothing(make, learner):
    "`branch_weight=0` is the letter of the paper: the branch's class scores get no gradient; otherwise they do."
    for branch in 0., 1.:
        learn = learner(make('ADER', branch_weight=branch), wd=0.)
        before = weights(learn.model.block.to_scores)
        learn.fit(1)
        assert same(weights(learn.model.block.to_scores), before) == (branch == 0)

def test_networks_without_attention(learner, plain):
    "With attention='none' neither student nor teachers need a block."
    learn = learner(ADER(plain().eval(), plain().eval(), attention='none', steps=2), student=plain())
    learn.fit(1)
    assert learn.ader.history().L_clean.gt(0).all()

def test_progress_reaches_the_weighting(learner, net):
    "A weighting is asked once a step with both losses and the share of the training that is done."
    class Asked:
        def __init__(self): self.pct, self.resets = [], 0
        def __call__(self, c, a, pct): self.pct.append(pct); return torch.full_like(c.detach(), 0.5)
        def reset(self): self.resets += 1
    w = Asked()
    learner(ADER(net().eval(), net().eval(), weight=w, steps=2)).fit(2)
    assert w.pct == pytest.approx([i/6 for i in range(6)]) and w.resets == 1

# ---- with the rest of fastai

def test_same_seed_same_weights(make, learner):
    "Bit for bit, twice in one process; and another seed gives others."
    got = []
    for seed in 1, 1, 2:
        torch.manual_seed(seed)
        learn = learner(make('ADER')); learn.fit(1)
        got.append(weights(learn.model))
    assert same(got[0], got[1]) and not same(got[0], got[2])

def test_training_teaches(make, learner, small):
    "A student of SAT reads attacked digits of its training set better than before."
    learn = learner(make('SAT'), dls=small(train=100, bs=25), lr=2e-2)
    def loss():
        x, y = learn.dls.train.dataset[:]
        net, x = learn.model.eval(), PGD(Threat(0.2), 5, start='image')(learn.model, x, y)
        with torch.no_grad(): return F.cross_entropy(net(x), y).item()
    before = loss()
    learn.fit(6)
    assert loss() < before - 0.2

def test_fit_twice(make, learner):
    "A second fit begins its own record and goes on with the weights; columns don't double."
    learn = learner(make('ADER'))
    learn.fit(1); first, w = learn.ader.history(), weights(learn.model)
    learn.fit(1); second = learn.ader.history()
    assert len(first) == len(second) == 3 and not same(weights(learn.model), w)
    assert second['ω'][0] == 0.5 and columns(learn).count('clean') == 1

def test_one_cycle_and_gradient_clip(make, learner):
    "`fit_one_cycle` schedules, `GradientClip` clips what the method's loss gave."
    class Norm(Callback):
        order = 100
        def before_fit(self): self.all = []
        def before_step(self): self.all.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters() if p.grad is not None]).norm().item())
    n = Norm()
    learn = learner(make('ADER'), [GradientClip(1e-2), n])
    learn.fit_one_cycle(2, 1e-2)
    assert len(n.all) == 6 and max(n.all) <= 1.01e-2 and len(set(learn.recorder.hps['lr'])) > 3

def test_lr_find(make, learner):
    "The finder runs through the method's own loss and puts the weights back."
    learn = learner(make('ADER'))
    before = weights(learn.model)
    lr = learn.lr_find(num_it=12, show_plot=False)
    assert 1e-7 < lr.valley < 10 and same(weights(learn.model), before) and list(learn.metrics) == []
    learn.fit(1)
    assert columns(learn).count('clean') == 1

def test_lr_find_when_the_loss_overflows(make, learner):
    "A finder that drives the loss to infinity stops there; weights, model and metrics come back as they were."
    learn = learner(make('Natural'), opt_func=SGD)
    before, net = weights(learn.model), learn.model
    learn.lr_find(end_lr=1e30, num_it=20, show_plot=False, stop_div=False)
    assert learn.model is net and same(weights(learn.model), before) and list(learn.metrics) == []

@pytest.mark.parametrize('name', ['Natural', 'ADER'])
def test_validate_and_get_preds(make, learner, name):
    "Before and after a fit, `validate` and `get_preds` say what the student says as it is, without an attack, and the record of the fit stays."
    learn = learner(m := make(name))
    for i in range(2):
        net, (x, y), record = learn.model.eval(), learn.dls.valid.dataset[:], i and m.history()
        with torch.no_grad(): want = net(x)
        loss, = learn.validate()
        preds, targs = learn.get_preds()
        assert loss == pytest.approx(F.cross_entropy(want, y).item(), rel=1e-4)
        torch.testing.assert_close(preds, want.softmax(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(targs, y) and learn.model is net and list(learn.metrics) == []
        if i: assert m.history().equals(record)
        else: learn.fit(1)

def test_a_term_not_yet_recorded(learner):
    "A term shown but recorded only from the second epoch on is NaN before, and stops nothing."
    class Late(Natural):
        logged_terms = 'late',
        def loss(self, x, x_adv, y):
            if self.epoch: self.log(late=torch.tensor(2.))
            return super().loss(x, x_adv, y)
    learn = learner(Late()); learn.fit(2)
    assert np.isnan(learn.recorder.values[0][-1]) and last(learn, 'late') == 2

def test_best_model_by_robust_accuracy(make, learner):
    "fastai's trackers can watch the method's columns."
    learn = learner(make('SAT'), [SaveModelCallback(monitor='pgd-10')])
    learn.fit(2)
    assert (learn.path/learn.model_dir/'model.pth').exists()

@pytest.mark.parametrize('name', ['SAT', 'ADER'])
def test_ordinary_data_loaders(make, learner, all_digits, name):
    "fastai and torch loaders of tuples do as well as ours; without a customary ε the threat is 8/255."
    sets = [torch.utils.data.TensorDataset(*d.dataset[:n]) for d,n in ((all_digits.train, 40), (all_digits.valid, 20))]
    for dl in (lambda d, s: DataLoader(d, bs=20, shuffle=s, num_workers=0), lambda d, s: torch.utils.data.DataLoader(d, batch_size=20, shuffle=s)):
        learn = learner(make(name), dls=DataLoaders(dl(sets[0], True), dl(sets[1], False), device=torch.device('cpu')), loss_func=nn.CrossEntropyLoss())
        learn.fit(1)
        assert 0 <= last(learn, 'pgd-10') <= last(learn, 'clean') + 0.2 <= 1.2
        assert learn.model.training is False and getattr(learn, name.lower()).attack.threat == Threat(8/255)

def test_float_images_beyond_the_range(make, learner, all_digits):
    "Images that a loader has normalised are refused before the first step can be wrong, with what to do."
    x, y = all_digits.train.dataset[:40]
    dl = torch.utils.data.DataLoader(torch.utils.data.TensorDataset((x - 0.3)/0.35, y), batch_size=20)
    learn = learner(make('SAT'), dls=DataLoaders(dl, dl, device=torch.device('cpu')), loss_func=nn.CrossEntropyLoss())
    with pytest.raises(AderError, match='leave normalisation to the network'): learn.fit(1)

@pytest.mark.skipif(torch.cuda.is_available(), reason='here DataParallel would leave the CPU')
def test_student_behind_data_parallel(make, learner, net):
    "The wrapper hides nothing that a method needs."
    for joint in False, True:
        learn = learner(make('ADER', joint=joint), student=nn.DataParallel(net()))
        learn.fit(1)
        assert (learn.ader.history().att_adv > 0).all()

# ---- a method of one's own

class Mixed(Method):
    "Half clean, half attacked."
    start, inner_loss, logged_terms = 'image', 'cw', ('gap',)
    def adversary(self, x, y): return super().adversary(x, y) if self.epoch else x
    def loss(self, x, x_adv, y):
        a, b = (self.both_heads(lambda z: F.cross_entropy(z, y), self.student(o)) for o in (x, x_adv))
        self.log(gap=b - a)
        return (a + b)/2

def test_a_method_of_ones_own(learner):
    "A subclass that says adversary and loss trains, records and shows what it likes."
    m = Mixed(steps=3)
    learn = learner(m); learn.fit(2)
    assert columns(learn)[-2:] == ['gap', 'time'] and m.attack.loss == 'cw' and m.attack.start == 'image'
    h = m.history()
    assert list(h) == ['gap'] and len(h) == 6 and abs(h.gap[:3]).max() < 1e-5 and (h.gap[3:] > 0).all()

def test_own_teachers_by_role(learner, net):
    "Teachers of a new method are named by role, checked, moved and asked like those of ADER."
    class One(Method):
        first_input = 'x_adv'
        def loss(self, x, x_adv, y): return F.mse_loss(self.student(x_adv).logits, self.teacher('wise', x).logits)
    learner(One(steps=2, teachers=dict(wise=net().train()))).fit(1)
    with pytest.raises(AderError, match='wise teacher'): learner(One(steps=2, teachers=dict(wise=net(classes=9)))).fit(1)

def test_a_joint_loss_uses_both(learner):
    "A method that asks for the pass on both and uses one half is told so."
    class Half(Method):
        def loss(self, x, x_adv, y): return F.cross_entropy(self.student(x).logits, y)
    learner(Half(steps=1)).fit(1)
    with pytest.raises(AderError, match='leave `joint` away'): learner(Half(steps=1, joint=True)).fit(1)

def test_a_method_without_a_loss(learner):
    "The message names the method and what it lacks."
    class Nothing(Method): pass
    with pytest.raises(NotImplementedError, match='Nothing must define `loss'): learner(Nothing(steps=1)).fit(1)

# ---- doors

@pytest.mark.parametrize('bad,match', [
    (lambda net, plain: net(classes=7), 'robust teacher has 7 classes and the student 10'), (lambda net, plain: net(stages=5), 'robust teacher does not accept images of shape .* at least 16×16'),
    (lambda net, plain: plain(), 'robust teacher has no attention'), (lambda net, plain: 'teacher.pt', 'robust teacher must be a network, got str'),
    (lambda net, plain: None, 'robust teacher must be a network, got NoneType'), (lambda net, plain: small_resnet, 'robust teacher must be a network, got function'),
    (lambda net, plain: {'weight': torch.ones(1)}, 'robust teacher must be a network, got dict')],
    ids=['classes', 'size', 'no attention', 'path', 'nothing', 'constructor', 'state dict'])
def test_teacher_that_does_not_fit(learner, net, plain, bad, match):
    "One sentence naming the role, before the first step; the learner is usable afterwards."
    learn = learner(ADER(net().eval(), bad(net, plain), steps=2))
    before = weights(learn.model)
    with pytest.raises(AderError, match=match): learn.fit(1)
    assert same(weights(learn.model), before) and list(learn.metrics) == []

def test_student_without_attention(learner, net, plain):
    "Said of the student, with what to do."
    with pytest.raises(AderError, match=r'student has no attention map; call add_attention\(net\)'):
        learner(ADER(net().eval(), net().eval(), steps=2), student=plain()).fit(1)

def test_attention_is_needed_only_where_it_teaches(learner, net, plain):
    "attention='clean' asks nothing of the adversarial teacher, and the other way round."
    learner(ADER(net().eval(), plain().eval(), attention='clean', steps=2)).fit(1)
    learner(ADER(plain().eval(), net().eval(), attention='robust', steps=2)).fit(1)

@pytest.mark.parametrize('kw', [dict(branch_weight=-1.), dict(attention='all'), dict(robust_input='both'), dict(steps=0), dict(step_size=-1.),
                                dict(temperature=0.), dict(direction='ts'), dict(att_direction='ts'), dict(att_normalize='max'), dict(att_temperature=0.)], ids=str)
def test_bad_settings_of_ader(net, kw):
    "Refused when the method is made, not in the first step of a training."
    with pytest.raises(AderError): ADER(net(), net(), **kw)

def test_misspelt_setting(net):
    "A setting that does not exist is refused at once."
    with pytest.raises((TypeError, AderError)): ADER(net(), net(), temprature=2.)

def test_bad_settings_of_the_others():
    "Refused when the method is made."
    for f in (lambda: TRADES(beta=-1.), lambda: SAT(branch_weight=-0.1), lambda: SAT(steps=0), lambda: Natural(step_size=0.)):
        with pytest.raises(AderError): f()

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_loss_that_is_not_finite(learner, bad):
    "Training stops, naming method, epoch and step, before the weights are spoilt."
    class Explodes(Natural):
        def loss(self, x, x_adv, y): return super().loss(x, x_adv, y)*(bad if (self.epoch, self.iter) == (1, 2) else 1)
    learn = learner(Explodes())
    net, func = learn.model, learn.loss_func
    with pytest.raises(AderError, match='Explodes became (nan|inf) in epoch 1, step 2'): learn.fit(3)
    assert all(p.isfinite().all() for p in net.parameters()) and learn.model is net and getattr(learn.loss_func, 'plain', learn.loss_func) is func


@pytest.mark.parametrize('size, ends', [(0.0125, True), (0.005, False)])
def test_catastrophic_overfitting_ends_the_training(learner, natural, monkeypatch, size, ends):
    "Correct under its own step, and under ten no longer; a step that is too short to tell is left alone."
    run, strong = PGD.perturb, []
    def perturb(self, *args): # ten steps find everything from the second epoch on
        if self.steps == 10 and strong: self = PGD(Threat(0.4), 10, start='image')
        return run(self, *args)
    monkeypatch.setattr(PGD, 'perturb', perturb)
    class Collapse(Callback):
        def before_epoch(self): strong[:] = [1]*self.epoch
    learn = learner(SAT(Threat(0.01), 1, size), [Collapse()], student=copy.deepcopy(natural), lr=1e-4)
    if not ends:
        learn.fit(2)
        assert learn.sat._watched is None and '_best' in learn.sat.state_dict()['tensors']
        return
    with pytest.raises(AderError, match='catastrophic overfitting in epoch 1: .* under ten steps, after'): learn.fit(2)
