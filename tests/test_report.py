"The report: frauds are flagged, honest networks pass, and a killed evaluation goes on."
import copy, json
import pytest, torch
from torch import nn
from ader.data import AderError, Batches, digits
from ader.networks import small_resnet
from ader.attention import add_attention
from ader.attacks import FGSM, PGD_sat, Square, Threat, Transfer
from ader.training import Natural, SAT
from ader.methods import TRADES
from ader.teachers import train
from ader.evaluation import _tabulate, compare, evaluate, robust_mask
from ader.sanity import by_class, report_page, robustness_report


def trained(method, epochs=6):
    torch.manual_seed(0)
    return train(method, add_attention(small_resnet(width=12)), digits(), epochs, progress=False).model

@pytest.fixture(scope='module')
def nets(): return dict(natural=trained(Natural(), 4), sat=trained(SAT(), 8), trades=trained(TRADES()))


class Fraud(nn.Module):
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after
    def forward(self, x): return self.after(self.net(self.before(x)))

def judged(net, **kw): return robustness_report(net, digits().test, images=150, progress=False, **{**dict(attacks=[PGD_sat(Threat(0.2))], checks=60), **kw})


@pytest.mark.parametrize('name', ['sat', 'trades', 'natural'])
def test_honest_networks_pass(nets, name):
    "With a black box beside the white one: all nine signs, none of them bad."
    other = nets['natural' if name != 'natural' else 'sat']
    r = judged(nets[name], black_box=[Transfer(other, PGD_sat(Threat(0.2))), Square(Threat(0.2), 100)])
    assert r.ok and len(r.checks) == 9, r.verdict


@pytest.mark.parametrize('base', ['natural', 'sat'])
@pytest.mark.parametrize('name, fraud, sign', [
    ('scaled', dict(after=lambda z: 1e4*z), 'gradients are there'),
    ('rounded input', dict(before=lambda x: (x*16).round()/16), 'gradients are there'),
    ('detached', dict(before=lambda x: x.detach()), 'gradients are there'),
    ('random input', dict(before=lambda x: x + 0.1*torch.randn_like(x)), 'same answer twice'),
    ('random logits', dict(after=lambda z: z + torch.randn_like(z)), 'same answer twice'),
    ('by its neighbours', dict(before=lambda x: x - 0.2*x.mean(0, keepdim=True)), 'alone or in a batch')])
def test_frauds_are_flagged(nets, base, name, fraud, sign):
    r = judged(Fraud(nets[base], **fraud).eval())
    assert not r.ok and sign in r.verdict and r.verdict.startswith('Do not trust these numbers'), r.verdict


@pytest.mark.parametrize('mode', [lambda n: n.train(), lambda n: n.eval().net.stem.train()])
def test_training_mode_is_flagged(nets, mode):
    "Of the whole network, or of a part of it; and it is given back as it was."
    net = copy.deepcopy(nets['sat'])
    mode(net)
    modes = [m.training for m in net.modules()]
    assert 'evaluation mode' in judged(net).verdict
    assert modes == [m.training for m in net.modules()]


def test_l2(nets):
    r = judged(nets['sat'], threat=Threat(0.6, 2), attacks=[FGSM(Threat(0.6, 2)), PGD_sat(Threat(0.6, 2))])
    assert r.ok and r.facts['threat'] == 'L2, ε = 0.6', r.verdict


def test_the_worst_case_is_image_by_image(nets):
    r = judged(nets['sat'], attacks=None, checks=0)
    all_right = torch.stack(list(r.right.values())).all(0)
    assert r['worst case'] == pytest.approx(all_right.float().mean().item()) and r['worst case'] <= min(r.table.accuracy[:-1])
    assert r.verdict == 'No sanity checks were made.'


def test_progress_of_another_evaluation_is_not_used(nets, tmp_path):
    "Other weights, other images, another seed or a damaged file: the work is done anew."
    dl, a = Batches(digits().test.dataset, 50), [PGD_sat(Threat(0.2))]
    run = lambda net, **kw: evaluate(net, dl, a, images=100, progress=False, **kw).drop(columns='seconds')
    want = run(nets['sat'])
    run(nets['natural'], folder=tmp_path)
    assert run(nets['sat'], folder=tmp_path).equals(want)
    for f in tmp_path.iterdir(): f.write_text(f.read_text()[:40])
    assert run(nets['sat'], folder=tmp_path).equals(want)
    for f in tmp_path.iterdir(): f.write_text('[]')
    assert run(nets['sat'], folder=tmp_path).equals(want)
    assert all(json.loads(f.read_text()) for f in tmp_path.iterdir())


def test_two_attacks_of_one_name_are_refused(nets):
    with pytest.raises(AderError, match='name of its own'): evaluate(nets['sat'], digits().test, [FGSM(Threat(0.1)), FGSM(Threat(0.2))], progress=False)


def test_a_star_needs_a_clear_lead():
    ok = lambda k: (torch.arange(500) < k, dict(seconds=0., forward=0, backward=0))
    t = compare(dict(a=_tabulate(dict(clean=ok(400), pgd=ok(300))), b=_tabulate(dict(clean=ok(410), pgd=ok(200)))))
    assert t.loc['pgd', 'a'].endswith('*') and not any(c.endswith('*') for c in (*t.loc['clean'], t.loc['pgd', 'b']))


def test_the_page_of_a_fraud_warns_first(nets):
    html = report_page(judged(Fraud(nets['sat'], after=lambda z: 1e4*z).eval()))
    assert html.index('Do not trust') < html.index('<table')


def test_classes_add_up(nets):
    r = judged(nets['sat'], checks=0)
    share = torch.bincount(r.y, minlength=10)/len(r.y)
    for a in r.right: assert (by_class(r)[a].values*share.numpy()).sum() == pytest.approx(r[a], abs=1e-6)
