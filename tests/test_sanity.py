"Sanity checks: broken defences are caught, networks without a defence pass, and the page says so."
import copy
import pytest, torch
from torch import nn
from ader.attacks import FGSM, PGD_sat, Square, Threat, Transfer, PGD as Attack
from ader.attention import add_attention
from ader.networks import small_resnet
from ader.sanity import by_class, report_page, robustness_report
from ader.teachers import train
from ader.training import SAT

PGD = PGD_sat(Threat(0.2))


@pytest.fixture(scope='module')
def nets(all_digits, natural):
    torch.manual_seed(0)
    net = add_attention(small_resnet(width=8))
    train(SAT(steps=3, step_size=0.1), net, all_digits, 5, progress=False)
    return dict(natural=natural, sat=net)

@pytest.fixture
def report(all_digits):
    def f(net, **kw):
        kw = dict(attacks=[PGD], images=100, checks=30, progress=False) | kw
        return robustness_report(net, all_digits.test, **kw)
    return f


class Wrapped(nn.Module):
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
    def forward(self, x): return self.after(self.net(self.before(x)))


@pytest.mark.parametrize('name, other', [('natural', 'sat'), ('sat', 'natural')])
def test_networks_without_masking_pass(nets, report, name, other):
    "With black boxes beside the white one: nine checks."
    black = [Transfer(nets[other], PGD), Square(Threat(0.2), 100)]
    r = report(nets[name], black_box=black, precision='float32')
    assert r.ok and len(r.checks) == 9, r.verdict


@pytest.mark.parametrize('broken, sign', [
    (dict(before=lambda x: x.detach()), 'gradients exist'),
    (dict(before=lambda x: x + 0.02*torch.sin(500*x)), 'no accuracy at a large ε'),
    (dict(after=lambda z: z + torch.randn_like(z)), 'same logits twice'),
    (dict(before=lambda x: x - 0.2*x.mean(0, keepdim=True)), 'alone or in a batch')])
def test_broken_defences_are_caught(nets, report, broken, sign):
    r = report(Wrapped(nets['sat'], **broken).eval())
    assert r.verdict.startswith('Do not trust these numbers') and sign in r.verdict, r.verdict
    html = report_page(r)
    assert html.index('Do not trust') < html.index('<table')


@pytest.mark.parametrize('mode', [lambda n: n.train(), lambda n: n.eval().net.stem.train()])
def test_training_mode_is_caught(nets, report, mode):
    "Of the whole network, or of a part of it; and it is left as it was."
    net = copy.deepcopy(nets['sat'])
    mode(net)
    modes = [m.training for m in net.modules()]
    assert 'evaluation mode' in report(net, images=20, checks=20).verdict
    assert modes == [m.training for m in net.modules()]


def test_l2(nets, report):
    t = Threat(0.6, 'L2')
    r = report(nets['sat'], threat=t, attacks=[FGSM(t), PGD_sat(t)], images=50)
    assert r.ok and r.settings['threat'] == 'L2, ε = 0.6', r.verdict


def test_a_report_without_checks(nets, report):
    r = report(nets['sat'], attacks=None, checks=0)
    assert r.verdict == 'No sanity checks were made.' and not r.checks
    correct = torch.stack(list(r.masks.values())).all(0).float().mean().item()
    assert r['worst case'] == pytest.approx(correct)
    share = torch.bincount(r.y, minlength=10)/len(r.y)
    for a in r.masks: assert (by_class(r)[a].values*share.numpy()).sum() == pytest.approx(r[a], abs=1e-6)
    html = report_page(r, '<script>alert(1)</script>')
    assert '<script' not in html and html.count('data:image/png') == 2


def test_first_steps_in_bfloat16_are_audited(nets, report):
    r = report(nets['sat'], images=100, precision='bfloat16', checks=10)
    assert r.checks[0].name == 'bfloat16 misses little' and r.ok
    exact = report(nets['sat'], images=100, precision='float32', checks=10)
    assert abs(r['PGD_sat'] - exact['PGD_sat']) <= 0.02
    assert len(exact.checks) == len(r.checks) - 1

def test_where_bfloat16_misses_much_all_is_done_in_float32(nets, report, monkeypatch):
    run = Attack._run_until_fooled
    def lost(self, net, x, y, z, steps, bs): # first steps that find nothing, and end the attack
        z, fooled = run(self, net, x, y, z, steps, bs)
        return (x.clone(), fooled) if net.dtype == torch.bfloat16 else (z, fooled)
    settings = dict(attacks=[Attack(Threat(0.2), 8, name='mine')], images=100, checks=10)
    exact = report(nets['sat'], precision='float32', **settings)
    monkeypatch.setattr(Attack, '_run_until_fooled', lost)
    monkeypatch.setattr('ader.attacks._LOW', 0.99)
    r = report(nets['sat'], precision='bfloat16', **settings)
    assert r.settings['precision'] == 'float32' and r['mine'] == exact['mine']


def test_settings_of_the_evaluation_are_passed_on(nets, report):
    r = report(nets['sat'], images=20, seed=3, precision='bfloat16', checks=0)
    assert (r.settings['images'], r.settings['seed']) == (20, 3)
    assert r.settings['precision'] == 'bfloat16, finished in float32'
    with pytest.raises(TypeError): report(nets['sat'], epsilon=0.1)
