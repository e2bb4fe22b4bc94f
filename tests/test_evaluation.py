"The robustness table: what it counts, what it leaves alone, and what it refuses."
import copy, json
import pandas as pd, pytest, torch
from torch import nn
from ader.attacks import FGSM, PGD, AutoAttack, PGD_sat, Threat
from ader.attention import add_attention
from ader.data import AderError, Batches, Images
from ader.evaluation import (accuracy_curves, check_teacher, compare, evaluate, plot_robustness,
                             show_attacked, wilson, _markdown_table, _on_attacks, _first_batches,
                             _judge_teacher, _robust_mask, _tabulate)
from ader.networks import small_resnet
from ader.speed import dtype_of

COST = ['seconds', 'forward', 'backward']


@pytest.fixture
def net(natural): return natural

@pytest.fixture
def run(all_digits):
    def f(net, dl=None, **kw):
        return evaluate(net, dl or all_digits.test, progress=False, **kw).drop(columns=COST)
    return f


# What is counted

def test_the_size_of_batches_does_not_matter(net, run, all_digits):
    dls = [Batches(all_digits.test.dataset, bs) for bs in (33, 500)]
    a, b = (run(net, dl, attacks=[FGSM(Threat(0.1))]) for dl in dls)
    assert a.equals(b)


def test_images_that_are_wrong_already_count_as_not_robust(run):
    class Wrong(nn.Module): # correct only for what is not an original image
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x):
            s = x.flatten(1).std(1)
            return torch.stack([2*s + self.p, 2 - 2*s], 1)
    ds = Images(torch.full((10,1,4,4), 0.5), torch.zeros(10, dtype=torch.long), 'ab')
    assert run(Wrong(), Batches(ds, 4), attacks=[PGD(Threat(0.4))]).accuracy.tolist() == [0, 0]


def test_the_worst_case_is_image_by_image():
    masks = dict(clean=[1,1,1,1], a=[1,1,0,0], b=[0,1,1,0])
    cost = dict(seconds=1., forward=2, backward=3)
    d = _tabulate({k: (torch.tensor(v).bool(), cost) for k,v in masks.items()}).set_index('attack')
    assert d.accuracy.tolist() == [1, 0.5, 0.5, 0.25] and d.index[-1] == 'worst case'
    assert d.loc['worst case', COST].tolist() == [3, 6, 9]


@pytest.mark.parametrize('n', [1, 255, 256, 257, 900])
def test_the_first_images_across_batches(all_digits, n):
    x, y = all_digits.test.dataset[:n]
    got = [torch.cat(o) for o in zip(*_first_batches(all_digits.test, n, 'cpu'))]
    assert torch.equal(got[0], x) and torch.equal(got[1], y)


@pytest.mark.parametrize('k, n', [(0, 1), (1, 1), (0, 10_000), (5000, 10_000)])
def test_an_interval_contains_its_accuracy(k, n):
    low, high = wilson(k, n)
    assert 0 <= low <= k/n <= high <= 1 and high > low


def test_curves_start_clean_and_respect_the_pixel_range(net, run, all_digits):
    c = accuracy_curves({'a': net}, all_digits.test, PGD_sat(Threat(0.6), 3), [0.5, 1, 2], images=50,
                        progress=False)
    assert c.eps.tolist() == [0, 0.3, 0.6] # 1.2 would leave the pixel range
    assert c.accuracy[0] == run(net, images=50, attacks=[]).accuracy[0]


# What is left alone

def test_the_network_is_left_as_it_was(net, run):
    net = copy.deepcopy(net).train()
    net.net.stem.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    in_training = run(net)
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert in_training.equals(run(net.eval()))


def test_half_precision_is_evaluated_in_float32(net, run):
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert run(half, images=100).equals(run(copy.deepcopy(half).float(), images=100))
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize('amx, dtype', [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_automatic_where_the_cpu_multiplies_matrices_of_it(amx, dtype, monkeypatch):
    "With AVX-512 alone it was slower than float32 (Intel Xeon)."
    monkeypatch.setattr('torch.cpu._is_amx_tile_supported', lambda: amx)
    monkeypatch.setattr('torch.cpu._is_avx512_bf16_supported', lambda: True)
    assert dtype_of('auto', small_resnet(width=4)) == dtype

def test_the_global_random_state_is_not_used(net, run):
    attacks = [PGD_sat(Threat(0.05))]
    torch.manual_seed(1)
    a, after = run(net, attacks=attacks), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert run(net, attacks=attacks).equals(a)


def test_progress_of_another_evaluation_is_not_used(net, all_digits, tmp_path):
    "Other weights or a damaged file: the work is done again."
    other = add_attention(small_resnet(width=8))
    run = lambda net, **kw: evaluate(net, all_digits.test, [PGD_sat(Threat(0.2))], images=100,
                                     progress=False, **kw).drop(columns='seconds')
    want = run(net)
    run(other, folder=tmp_path)
    assert run(net, folder=tmp_path).equals(want)
    for damaged in ('{"a', '[]'):
        for f in tmp_path.iterdir(): f.write_text(damaged)
        assert run(net, folder=tmp_path).equals(want)
    assert all(json.loads(f.read_text()) for f in tmp_path.iterdir())


def test_finished_work_is_not_done_again(net, all_digits, tmp_path):
    batches, a = _first_batches(all_digits.test, 50, 'cpu'), PGD_sat(Threat(0.2))
    first = _robust_mask(net, batches, a, file=tmp_path/'p.json')
    calls = []
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    again = _robust_mask(net, batches, a, mask=first[0], file=tmp_path/'p.json')
    hook.remove()
    assert not calls and torch.equal(first[0], again[0]) and first[1] == again[1]


# What is refused

def test_misuse(net, run, all_digits):
    with pytest.raises(AderError, match='at least 1 image'): run(net, images=0)
    with pytest.raises(AderError, match='no images'): evaluate(net, [], progress=False)
    (x, y), = _first_batches(all_digits.test, 8, 'cpu')
    with pytest.raises(AderError, match='must lie in'): run(net, [(x*255, y)])
    with pytest.raises(AderError, match='0 to 9'): run(net, [(x, y + 10)])
    same = [FGSM(Threat(0.1)), FGSM(Threat(0.2))]
    with pytest.raises(AderError, match='name of its own'): run(net, attacks=same)


# Tables and pictures

def test_the_bars_show_the_table(net, all_digits):
    d = evaluate(net, all_digits.test, images=50, progress=False)
    ax = plot_robustness({'a': d, 'b': d})
    heights = [[b.get_height() for b in c] for c in ax.containers if hasattr(c[0], 'get_height')]
    assert heights == [pytest.approx(d.accuracy.tolist())]*2
    assert [o.get_text() for o in ax.get_xticklabels()] == d.attack.tolist()


def test_titles_are_predictions(net, all_digits):
    fig = show_attacked(net, all_digits.test, n=3)
    (x, y), = _first_batches(all_digits.test, 3, 'cpu')
    with torch.no_grad(): clean = net(x).argmax(1)
    titles = [ax.title for ax in fig.axes[:6:2]] # an attacked image follows each
    assert [t.get_text() for t in titles] == [str(k) for k in clean.tolist()]
    assert [t.get_color() for t in titles] == ['#0173b2' if k == t else '#d55e00' for k,t in zip(clean, y)]


def test_a_star_needs_a_clear_lead():
    ok = lambda k: (torch.arange(500) < k, dict(seconds=0., forward=0, backward=0))
    t = compare(dict(a=_tabulate(dict(clean=ok(400), pgd=ok(300))),
                     b=_tabulate(dict(clean=ok(410), pgd=ok(200)))))
    assert t.loc['pgd', 'a'].endswith('*')
    assert not any(c.endswith('*') for c in (*t.loc['clean'], t.loc['pgd', 'b']))


def test_markdown():
    t = pd.DataFrame(dict(a=['1', '22'], long=['x', 'y']), index=['one', 'two'])
    assert _markdown_table(t) == ('|     |  a | long |\n|-----|---:|-----:|\n'
                                 '| one |  1 |    x |\n| two | 22 |    y |\n')


@pytest.mark.parametrize('percent, n, roles', [
    ((10, 10, 10, 10), 10_000, []), # always the same class
    ((90, 20, 15, 15), 10_000, ['clean']), # above guessing, but not a quarter
    ((56, 40, 30, 30), 100, ['robust']), # 56 of 100 is not surely above 55%
    ((90, 30, 60, 60), 10_000, ['clean'])]) # PGD finds less than FGSM
def test_what_a_teacher_can_be(percent, n, roles):
    names = 'clean', 'FGSM', 'PGD_sat', 'PGD_trades'
    rows = [(a, k/100, *wilson(k*n//100, n)) for a,k in zip(names, percent)]
    d = pd.DataFrame(rows, columns=['attack', 'accuracy', 'low', 'high'])
    assert [k for k,(ok,_) in _judge_teacher(d, 0.1).items() if ok] == roles


def test_autoattack_goes_on_in_the_middle(net, run, tmp_path, monkeypatch):
    "Each of its four attacks has its progress; only what is missing is done again."
    attack, done = AutoAttack(Threat(0.05)), []
    def noted(self, logits, x, y, k, bs, settings): # the attacks themselves take a minute
        done.append(self.only)
        rng = torch.Generator().manual_seed(settings['seed'])
        return x + 0.05*torch.randn(x.shape, generator=rng).sign()
    monkeypatch.setattr(AutoAttack, 'run', noted)
    whole = lambda: run(net, attacks=[attack], images=100, folder=tmp_path)
    first = whole()
    assert done == ['apgd-ce', 'apgd-t', 'fab-t', 'square'] and first.accuracy[1] > 0
    assert whole().equals(first) and len(done) == 4
    last = max(tmp_path.glob('*.progress.json'), key=lambda o: o.stat().st_mtime)
    last.unlink()
    assert whole().equals(first) and done[4:] == ['square']


def test_what_a_teacher_says_about_attacks_on_a_student(net, natural, all_digits):
    batches, attack = _first_batches(all_digits.test, 60, 'cpu'), PGD_sat(Threat(0.2), 5)
    own = _on_attacks(net, net, batches, attack)
    assert own['aligned'] == 1 and 0 < own['entropy'] < 2.31
    class Flat(nn.Module): # its gradient says nothing: the attack is the random start
        def forward(self, x): return torch.zeros(len(x), 10) + 0*x.sum()
    assert _on_attacks(natural, Flat(), batches, attack)['aligned'] < 0.2
    twin = copy.deepcopy(net)
    check = check_teacher(twin, all_digits.test, images=60, progress=False, student=net)
    assert '100% move it as its own attack does' in check.summary
    assert twin.metadata['verified']['aligned'] == 1


def test_the_first_images_of_sorted_ones_are_no_sample(natural, all_digits):
    x, y = all_digits.test.dataset[:]
    order = y.argsort(stable=True)
    with pytest.warns(UserWarning, match='the first 100 images show [23] of 10 classes'):
        evaluate(natural, (x[order], y[order]), [FGSM(Threat(0.1))], images=100, progress=False)

class InParts:
    "Fools nothing and notes how many images it gets; taken for AutoAttack by its `parts`."
    threat, name = Threat(0.1), 'in parts'
    def __init__(self): self.sizes = []
    def __repr__(self): return self.name
    def parts(self, k): return [self]
    def __call__(self, model, x, y, rng=None):
        self.sizes.append(len(x))
        return x

def test_slow_attacks_get_full_batches_of_what_is_left():
    torch.manual_seed(0)
    x, y = torch.rand(450, 1, 8, 8), torch.randint(0, 2, (450,))
    class ByMean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
        def forward(self, x): return torch.stack([x.mean((1,2,3)) - 0.5, 0*x[:,0,0,0]], 1)*self.w
    slow = InParts()
    d = evaluate(ByMean(), (x, y), [slow], progress=False)
    left = round(450*d.accuracy[0])
    assert 150 < left < 300 and d.accuracy[1] == d.accuracy[0]
    assert slow.sizes == [100]*(left//100) + [left % 100]
