"Teachers: a training that survives any kill, adoption that changes nothing, and the ways in which a teacher does not fit."
import json, os, random, re, signal, subprocess, sys, time, types
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from ader.attacks import PGD, PGD_sat, Threat
from ader.attention import Adapt, adapted, attend, can_attend, look
from ader.data import AderError, digits
from ader.evaluation import fitness, verify, wilson
import ader.methods
from ader.methods import ADER, Method, Natural, SAT, TRADES
from ader.networks import build, mobilenet_v2, small_resnet, wide_resnet
from ader.recipes import ader_teach, ader_teach_cli
from ader.teachers import (Adopted, Branch, Resumable, activation_map, adopt, find_layer, from_published, from_robustbench, load, read_checkpoint,
                           save, teach, train, zoo_net)
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.learner import Learner


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

class Stop(Exception): pass

class StopAt(Callback):
    "Stop like a kill: an exception that nobody expects, at one event of one step."
    order = 70
    def __init__(self, event, epoch, step):
        def f():
            if self.epoch == epoch and self.iter == step: raise Stop('here')
        setattr(self, event, f)
        self.run_valid = event == 'after_pred'


# A training that survives

@pytest.fixture(scope='module')
def pair():
    "A clean and an adversarial teacher, untrained, and unverified."
    torch.manual_seed(5)
    return attend(small_resnet(width=4)).eval(), attend(small_resnet(width=4)).eval()

def distil(pair, small, resume=None, cbs=None, seed=0, epochs=3):
    torch.manual_seed(9)
    return train(ADER(*pair, steps=2), attend(small_resnet(width=4)), small(), epochs, seed=seed, progress=False, cbs=cbs, resume=resume)

@pytest.fixture(scope='module')
def whole(pair, all_digits):
    "The training that was never killed."
    from ader.data import Images, dataloaders
    def make(train=60, valid=40, bs=20):
        sets = [Images(x, y, list('0123456789'), 'few digits', 0.2) for x,y in (all_digits.train.dataset[:train], all_digits.valid.dataset[:valid])]
        return dataloaders(*sets, bs=bs, device='cpu')
    return distil(pair, make), make


@settings(max_examples=12)
@given(event=st.sampled_from(['before_batch', 'after_pred', 'after_backward', 'after_step', 'after_batch']), epoch=st.integers(0, 2), step=st.integers(0, 2))
def test_stopped_at_any_moment_and_continued(pair, whole, tmp_path_factory, event, epoch, step):
    (learn, make), path = whole, tmp_path_factory.mktemp('ckpt')/'x'
    with pytest.raises(Stop): distil(pair, make, path, StopAt(event, epoch, step))
    torch.rand(7), random.random()
    again = distil(pair, make, path)
    assert same(again.model.state_dict(), learn.model.state_dict())
    assert again.ader.history().equals(learn.ader.history())
    assert again.recorder.values == learn.recorder.values and again.recorder.iters == learn.recorder.iters
    assert again.recorder.lrs == learn.recorder.lrs and list(map(float, again.recorder.losses)) == list(map(float, learn.recorder.losses))
    assert again.model.card['valid'] == learn.model.card['valid']


def all_methods(cls=Method): return [m for c in cls.__subclasses__() if c.__module__ == 'ader.methods' for m in [c, *all_methods(c)] if 'loss' in dir(m) and m.loss is not Method.loss]

@pytest.mark.parametrize('method', all_methods(), ids=lambda m: m.__name__)
def test_every_method_continues(pair, small, tmp_path, method):
    "Whatever a method remembers from step to step."
    import inspect
    roles = [k for k in inspect.signature(method).parameters if k in ('clean', 'robust')]
    def go(resume=None, cbs=None):
        torch.manual_seed(3)
        m = method(**dict(zip(roles, pair[:len(roles)])), steps=1)
        return train(m, attend(small_resnet(width=4)), small(), 3, seed=1, progress=False, resume=resume, cbs=cbs)
    with pytest.raises(Stop): go(tmp_path/'x', StopAt('before_batch', 1, 2))
    a, b = go(), go(tmp_path/'x')
    assert same(a.model.state_dict(), b.model.state_dict())
    h, k = ([c for c in l.cbs if isinstance(c, Method)][0].history() for l in (a, b))
    assert h.equals(k)


def test_checkpoints_change_nothing(pair, whole, tmp_path):
    learn, make = whole
    assert same(distil(pair, make, tmp_path/'x').model.state_dict(), learn.model.state_dict())
    assert [o.name for o in sorted(tmp_path.iterdir())] == ['x-0002.ckpt', 'x-0003.ckpt']


@pytest.mark.parametrize('cut', [0, 10, 32, 1000, -1])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(pair, whole, tmp_path, capsys, cut):
    learn, make = whole
    with pytest.raises(Stop): distil(pair, make, tmp_path/'x', StopAt('before_batch', 2, 1))
    f = tmp_path/'x-0002.ckpt'
    f.write_bytes(f.read_bytes()[:cut])
    capsys.readouterr()
    again = distil(pair, make, tmp_path/'x')
    out = capsys.readouterr().out
    assert 'x-0002.ckpt is damaged' in out and 'continuing after epoch 1 of 3' in out
    assert same(again.model.state_dict(), learn.model.state_dict())


@given(at=st.floats(0, 1, exclude_max=True))
def test_any_flipped_bit_is_noticed(tmp_path_factory, at):
    from ader.teachers import write_checkpoint
    f = tmp_path_factory.mktemp('bit')/'c'
    write_checkpoint(f, dict(a=torch.arange(5)))
    data = bytearray(f.read_bytes())
    data[int(at*len(data))] ^= 1
    f.write_bytes(bytes(data))
    assert read_checkpoint(f) is None


def test_all_checkpoints_damaged_means_from_the_start(pair, whole, tmp_path):
    learn, make = whole
    for n in (1, 2): (tmp_path/f'x-000{n}.ckpt').write_bytes(b'nothing')
    assert same(distil(pair, make, tmp_path/'x').model.state_dict(), learn.model.state_dict())


def test_a_checkpoint_cannot_run_code(tmp_path):
    import hashlib, io
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    buf = io.BytesIO()
    torch.save(Evil(), buf)
    (tmp_path/'c').write_bytes(hashlib.sha256(buf.getvalue()).digest() + buf.getvalue())
    with pytest.raises(Exception): read_checkpoint(tmp_path/'c')
    assert not (tmp_path/'evil').exists()


@pytest.mark.parametrize('change, word', [(dict(epochs=4), 'epochs'), (dict(seed=1), 'seed')])
def test_another_training_is_refused(pair, whole, tmp_path, change, word):
    _, make = whole
    with pytest.raises(Stop): distil(pair, make, tmp_path/'x', StopAt('before_batch', 1, 1))
    before = {o: o.read_bytes() for o in tmp_path.iterdir()}
    with pytest.raises(AderError, match=f'another training .*{word} was'): distil(pair, make, tmp_path/'x', **change)
    assert {o: o.read_bytes() for o in tmp_path.iterdir()} == before


def test_another_method_is_refused(small, plain, tmp_path):
    train(TRADES(steps=1), plain(), small(), 1, progress=False, resume=tmp_path/'x')
    for other in (SAT(steps=1), TRADES(steps=2), TRADES(5., steps=1), TRADES(steps=1, threat=Threat(0.1))):
        with pytest.raises(AderError, match='another training'): train(other, plain(), small(), 1, progress=False, resume=tmp_path/'x')
    with pytest.raises(AderError, match='another training'): train(TRADES(steps=1), plain(blocks=2), small(), 1, progress=False, resume=tmp_path/'x')


def test_other_checkpoints_in_the_folder_are_left_alone(small, plain, tmp_path):
    for n in ('x-y-0001.ckpt', 'x.ckpt', 'x-0001.ckpt.bak', 'xx-0001.ckpt'): (tmp_path/n).write_text('')
    (tmp_path/'.x-0007.ckpt.123').write_text('half written')
    r = train(Natural(), plain(), small(), 1, progress=False, resume=tmp_path/'x').resumable
    assert [o.name for o in r.files()] == ['x-0001.ckpt']
    r.clear()
    assert sorted(o.name for o in tmp_path.iterdir()) == ['x-0001.ckpt.bak', 'x-y-0001.ckpt', 'x.ckpt', 'xx-0001.ckpt']


def test_every_few_epochs(small, plain, tmp_path):
    def go(cbs=None):
        torch.manual_seed(0)
        learn = Learner(small(), plain(), cbs=[Natural(), Resumable(tmp_path/'x', every=2)])
        learn.add_cbs(cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, 1e-2)
        return learn.model.state_dict()
    with pytest.raises(Stop): go(StopAt('before_batch', 3, 1))
    assert [o.name for o in tmp_path.iterdir()] == ['x-0002.ckpt']
    a = go()
    Resumable(tmp_path/'x').clear()
    assert same(a, go())
    with pytest.raises(AderError, match='at least 1 epoch'): Resumable(tmp_path/'x', every=0)


@pytest.mark.parametrize('kind', ['fastai', 'torch'])
def test_loaders_of_others(all_digits, plain, tmp_path, kind):
    "Their order comes from generators of their own, which are continued too."
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    x, y = all_digits.train.dataset[:60]
    class Rows(torch.utils.data.Dataset):
        loss_func = nn.CrossEntropyLoss()
        def __len__(self): return 60
        def __getitem__(self, i): return x[i], y[i]
    def go(cbs=None):
        torch.manual_seed(0), random.seed(0)
        make = DataLoader if kind == 'fastai' else torch.utils.data.DataLoader
        dls = DataLoaders(make(Rows(), batch_size=20, shuffle=True), make(Rows(), batch_size=20), device='cpu')
        learn = Learner(dls, plain(), cbs=[Natural(), Resumable(tmp_path/'x')])
        learn.add_cbs(cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 1e-2)
        return learn.model.state_dict()
    with pytest.raises(Stop): go(StopAt('before_batch', 2, 1))
    a = go()
    Resumable(tmp_path/'x').clear()
    assert same(a, go())


def command(*argv): return [sys.executable, '-W', 'ignore', '-c', 'from ader.recipes import ader_teach_cli; ader_teach_cli()', *map(str, argv)]

def test_killed_in_the_real_world(tmp_path):
    "SIGKILL at random moments, in processes of their own, until one of them ends by itself."
    argv = ['--net', 'small_resnet:width=8', '--epochs', 5, '--images', 100]
    env, kills, rng = {**os.environ, 'OMP_NUM_THREADS': '1'}, 0, random.Random(0)
    for wait in (0.2, 1.3, None):
        p = subprocess.Popen(command(*argv, '--out', tmp_path/'killed'), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        if wait is not None:
            seen, deadline = set((tmp_path/'killed').glob('*.ckpt')), time.time() + 120
            while p.poll() is None and not set((tmp_path/'killed').glob('*.ckpt')) - seen and time.time() < deadline: time.sleep(0.02)
            time.sleep(wait*rng.random())
            if p.poll() is None: p.send_signal(signal.SIGKILL); kills += 1
        out, err = p.communicate(timeout=300)
        assert not err
    assert p.returncode == 0 and kills and 'continuing after epoch' in out and 'As the clean teacher' in out
    assert not list((tmp_path/'killed').glob('*.ckpt')) and not list((tmp_path/'killed').glob('.*'))
    ader_teach(net='small_resnet:width=8', epochs=5, images=100, out=tmp_path/'whole')
    for f in ('teacher.safetensors', 'teacher.json'): assert (tmp_path/'killed'/f).read_bytes() == (tmp_path/'whole'/f).read_bytes()


# Adoption

NETS = dict(small=lambda: small_resnet(width=4), three=lambda: small_resnet(width=4, stages=3), mobile=lambda: mobilenet_v2(1, 10, 0.25),
            cifar=lambda: mobilenet_v2(1, 10, 0.25, variant='pytorch-cifar'), wide=lambda: wide_resnet(10, 1, 1), deepmind=lambda: wide_resnet(10, 1, 1, variant='deepmind'))

@pytest.fixture(params=NETS)
def any_net(request):
    "One of our networks, with statistics of batch norm that are not those of a fresh one."
    net = NETS[request.param]()
    with torch.no_grad(): net.train()(torch.rand(32,1,16,16))
    return net.eval()

def of_size(dls, size):
    "The same loaders with images of another size."
    for dl in dls: dl.dataset.x = F.interpolate(dl.dataset.x, size)
    return dls

@pytest.mark.parametrize('attention', ['activation', 'branch'])
def test_adoption_changes_nothing(any_net, small, attention, tmp_path):
    x, y = torch.rand(3,1,16,16, requires_grad=True), torch.tensor([1,2,3])
    def answers(net):
        z = net(x)
        return z.detach(), torch.autograd.grad(F.cross_entropy(z, y), x)[0]
    before, weights = answers(any_net), {k: v.clone() for k,v in any_net.state_dict().items()}
    net = adopt(any_net, of_size(small(), 16), attention, attacked=True, epochs=1, progress=False)
    for got in (answers(net), answers(net.train())): assert all(torch.equal(*o) for o in zip(got, before))
    assert torch.equal(look(net, x).logits, before[0])
    assert same(any_net.state_dict(), weights) and same(net.net.state_dict(), weights)
    m = look(net, x).attention
    assert m.shape[:2] == (3, 1) and 0 < m.min() and m.max() <= 1 and can_attend(net)
    save(net, tmp_path/'a')
    twin = load(tmp_path/'a')
    for a,b in zip(look(twin, x), look(net.eval(), x)): assert a is b is None or torch.equal(a, b)
    assert twin.spec == net.spec and twin.card == net.card


def test_all_of_the_branch_is_trained(any_net, small):
    "Also what draws the map: the class scores alone would leave it as it was."
    dls = of_size(small(), 16)
    torch.manual_seed(0)
    net = Adopted(any_net, find_layer(any_net, torch.rand(1,1,16,16)), any_net.widths[-2], 10)
    before = {k: v.clone() for k,v in net.block.named_parameters()}
    train(Branch(), net, dls, 1, progress=False)
    for k,v in net.block.named_parameters(): assert not torch.equal(v, before[k]), k
    x = torch.rand(2,1,16,16)
    with torch.no_grad(): assert not torch.equal(net.stressed(x).logits, net(x)) and torch.equal(net.stressed(x).attention, look(net, x).attention)


def test_a_network_from_elsewhere(small):
    "Whatever module: its features are found, its answers stay."
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fc = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
            self.bn = nn.BatchNorm2d(8)
        def forward(self, x): return self.fc(F.relu_(self.c(F.relu(self.bn(self.b(F.relu(self.a(x))))))).mean((2,3)))
    net = Theirs()
    assert find_layer(net, torch.rand(1,1,8,8)) == 'bn' and net.training
    x = torch.rand(2,1,8,8)
    before = net.eval()(x)
    for layer in (None, 'a'):
        a = adopt(net, small(), layer=layer)
        assert torch.equal(a(x), before) and look(a, x).attention.shape[-1] == (8 if layer else 4)
    train(ADER(a, a, steps=1), attend(small_resnet(width=4)), small(), 1, progress=False)
    for bad in ('z', 'fc', ''):
        with pytest.raises(AderError): adopt(net, small(), layer=bad)


def test_token_by_token_is_no_place_to_look(small):
    "A transformer's attention matrix has four dimensions too."
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.cut, self.soft, self.fc = nn.Conv2d(1, 6, 2, 2), nn.Softmax(-1), nn.Linear(6, 10)
        def forward(self, x):
            t = self.cut(x).flatten(2).mT
            t = torch.cat([t[:,:1], t], 1)[:,None]
            return self.fc((self.soft(t @ t.mT) @ t).mean((1,2)))
    assert find_layer(Tokens(), torch.rand(1,1,8,8)) == 'cut'


@pytest.mark.parametrize('net, what', [(attend(small_resnet()), 'attention already'), (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 'gives features')])
def test_what_cannot_be_adopted(net, what, small):
    with pytest.raises(AderError, match=what): adopt(net, small())


@given(scale=st.floats(1e-30, 1e30), zero=st.booleans())
def test_the_map_of_activations(scale, zero):
    g = torch.randn(2,3,4,4)
    m = activation_map(g*scale*(not zero))
    assert 0 < m.min() and m.max() <= 1 and m.isfinite().all()
    if not zero: assert (m.amax((2,3)) == 1).all() and torch.allclose(m, activation_map(g), atol=1e-4)


@given(key=st.sampled_from(['net', 'layer', 'channels', 'classes', 'depth', 'arch', 'more']), value=st.none() | st.integers(-2, 20) | st.text(max_size=4) | st.just({}))
def test_tampered_specs_are_refused_or_build(key, value):
    net = Adapt(adopt_once(), 3, 8)
    for spec in (net.spec, net.spec['net']):
        try: build({**spec, key: value})
        except AderError: pass

def adopt_once(memo={}):
    if not memo: memo['net'] = adopt(small_resnet(width=4, in_channels=3), digits(augment=[], device='cpu'), 'branch', epochs=1, progress=False)
    return memo['net']


# Teachers that were made for other images

@pytest.mark.parametrize('image', [(1,8,8), (3,8,8), (1,16,16), (3,32,32), (3,20,12)])
def test_teachers_for_other_images_just_work(image, small, net):
    c, *size = image
    teachers = [attend(small_resnet(width=4, in_channels=c, mean=0.1*i, std=0.5)) for i in (1, 2)]
    for t in teachers: t.card = dict(image=list(image))
    learn = train(ADER(*teachers, steps=1), net(), small(), 1, progress=False)
    x = torch.rand(2,1,8,8)
    for role in ('clean', 'robust'):
        t = learn.ader.teachers[role]
        assert isinstance(t, Adapt) == (image != (1,8,8)) and t(x).shape == (2,10)
        assert look(t, x).attention.shape[2:] == torch.Size(size)
    assert learn.ader.teachers['clean'] is not teachers[0] or image == (1,8,8)
    learn.ader.steps = 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not isinstance(getattr(learn.ader.teachers['clean'], 'net', None), Adapt)


def test_colour_student_of_grey_teachers(small, net):
    dls = small()
    for dl in dls: dl.dataset.x = dl.dataset.x.expand(-1, 3, -1, -1)
    train(ADER(net(), net(), steps=1), net(in_channels=3), dls, 1, progress=False)


def test_an_attack_sees_through_adapt():
    torch.manual_seed(0)
    inside, x, y = small_resnet(in_channels=3).eval(), torch.rand(8,1,8,8), torch.arange(8)
    net = Adapt(inside, 3, 16)
    z = PGD_sat(Threat(0.2))(net, x, y)
    assert F.cross_entropy(net(z), y) > F.cross_entropy(net(x), y) + 0.05


def test_no_way_between_some_channels(small, net):
    dls = small()
    for dl in dls: dl.dataset.x = dl.dataset.x.expand(-1, 3, -1, -1)
    with pytest.raises(AderError, match='the clean teacher does not accept images.*no way from images of 3 channels to images of 4'):
        train(ADER(net(in_channels=4), net(), steps=1), net(in_channels=3), dls, 1, progress=False)


@pytest.mark.parametrize('classes, what', [(list('0123456789')[::-1], 'in another order'), ([f'class {i}' for i in range(10)], "'class 0' where the data has '0'")])
def test_other_classes_say_so(small, net, classes, what):
    t = net()
    t.card = dict(classes=classes)
    with pytest.raises(AderError, match=what): train(ADER(t, net(), steps=1), net(), small(), 1, progress=False)
    with pytest.raises(AderError, match='knows 7 classes and the student 10'): train(ADER(net(), net(classes=7), steps=1), net(), small(), 1, progress=False)


# Verification

def test_one_line_about_teachers_that_were_not_verified(small, net, capsys, all_digits):
    a, b = net(), net()
    method = ADER(a, b, steps=1)
    learn = train(method, net(), small(), 1, progress=False)
    assert capsys.readouterr().out == 'The clean and the robust teacher were not verified (see ader.evaluation.verify)\n'
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not capsys.readouterr().out
    for t in (a, b): verify(t, all_digits.valid, images=50, progress=False)
    train(ADER(a, b, steps=1), net(), small(), 1, progress=False)
    assert capsys.readouterr().out == 'The clean and the robust teacher were verified and found unfit for that\n'
    a.card['verified']['roles'], b.card['verified']['roles'] = ['clean'], ['robust']
    train(ADER(a, b, steps=1), net(), small(), 1, progress=False)
    assert not capsys.readouterr().out


def test_what_was_found_is_saved(net, all_digits, tmp_path):
    t = net()
    v = verify(t, all_digits.test, images=60, progress=False)
    save(t, tmp_path/'t')
    card = load(tmp_path/'t').card['verified']
    assert card['images'] == 60 and card['data'] == 'digits' and card['threat'] == dict(eps=0.2, norm='inf') and card['roles'] == v.roles and card['words'] == v.words
    assert [card[k] for k in ('clean', 'FGSM', 'PGD_sat', 'PGD_trades')] == [round(o, 6) for o in v.scores.accuracy]


def test_a_constant_answer_is_no_teacher(all_digits):
    class Constant(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x): return F.one_hot(torch.full((len(x),), 3), 10) + 0*self.w + 0*x.mean()
    v = verify(Constant(), all_digits.test, progress=False)
    assert v.roles == [] and v.words.count('NO') == 2


def test_a_teacher_for_other_images_is_verified_too(all_digits):
    t = small_resnet(width=4, in_channels=3)
    t.card = dict(image=[3,16,16])
    verify(t, all_digits.valid, images=20, progress=False)
    assert t.card['verified']['images'] == 20


@given(right=st.lists(st.integers(0, 200), min_size=4, max_size=4), chance=st.sampled_from([0.01, 0.1, 0.5]))
def test_more_right_answers_never_make_a_worse_clean_teacher(right, chance):
    import pandas as pd
    def roles(k): return fitness(pd.DataFrame([(a, o/200, *wilson(o, 200)) for a,o in zip(('clean', 'FGSM', 'PGD_sat', 'PGD_trades'), k)],
                                              columns=['attack', 'accuracy', 'low', 'high']), chance)
    clean, fgsm, *pgd = sorted(right, reverse=True)
    d = roles([clean, fgsm, *pgd])
    assert d['clean'][0] <= roles([200, fgsm, *pgd])['clean'][0]
    assert d['robust'][0] <= roles([clean, fgsm, *[fgsm]*2])['robust'][0]
    if max(pgd) == 0: assert not d['robust'][0]


# From elsewhere

@pytest.fixture
def fake_zoo(monkeypatch, tmp_path):
    "What `robustbench.utils` offers, with a network small enough to be made here, and nothing to download from."
    import enum
    class BenchmarkDataset(enum.Enum): cifar_10 = 'cifar10'; cifar_100 = 'cifar100'
    class ThreatModel(enum.Enum): Linf = 'Linf'; L2 = 'L2'
    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.last, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
        def forward(self, x): return self.fc(self.last(self.pool(self.conv(x).relu())).mean((2,3)))
    zoo = {BenchmarkDataset.cifar_10: {ThreatModel.Linf: {'Gowal2020Small': dict(model=Theirs, gdrive_id='x')}}}
    def load_model(name, folder, dataset, threat):
        file = Path(folder)/dataset/threat/f'{name}.pt'
        if not file.exists(): raise ConnectionError('no route to host')
        net = zoo[BenchmarkDataset(dataset)][ThreatModel(threat)][name]['model']()
        net.load_state_dict(torch.load(file, map_location='cpu'))
        return net
    utils = types.ModuleType('robustbench.utils')
    vars(utils).update(timm=types.SimpleNamespace(is_model=lambda name: False), BenchmarkDataset=BenchmarkDataset, ThreatModel=ThreatModel, all_models=zoo, load_model=load_model)
    package = types.ModuleType('robustbench')
    package.utils = utils
    for m in (package, utils): monkeypatch.setitem(sys.modules, m.__name__, m)
    made = Theirs().eval()
    file = tmp_path/'models'/'cifar10'/'Linf'/'Gowal2020Small.pt'
    file.parent.mkdir(parents=True)
    torch.save(made.state_dict(), file)
    return made, tmp_path/'models', file


def adopt_from_the_zoo(name, made, folder, small, tmp_path):
    x = torch.rand(2,3,32,32)
    net = from_robustbench(name, folder=folder)
    with torch.no_grad(): assert torch.equal(net(x), made(x))
    teacher = adopt(net, small())
    with torch.no_grad(): assert torch.equal(teacher.net.net(x), made(x)) and teacher.net.size == [32,32]
    save(teacher, tmp_path/'t')
    twin = load(tmp_path/'t')
    g = torch.rand(2,1,8,8)
    with torch.no_grad():
        for a,b in zip(look(twin, g)[:2], look(teacher, g)[:2]): assert torch.equal(a, b)
    assert twin.card['source'] == name and twin.card['data'] == 'CIFAR-10' and twin.spec == teacher.spec
    assert not any(isinstance(v, str) and ('/' in v or '\\' in v) for v in twin.card.values()) # no path of this machine
    return teacher


def test_robustbench_as_we_call_it(fake_zoo, small, net, tmp_path):
    made, folder, file = fake_zoo
    t = adopt_from_the_zoo('Gowal2020Small', made, folder, small, tmp_path)
    train(ADER(t, t, steps=1), net(), small(), 1, progress=False)
    for args, what in ((('Gowal2020Smal',), 'did you mean Gowal2020Small'), (('x', 'mnist'), "not 'mnist'"), (('x', 'cifar10', 'L7'), "not 'L7'"), (('x', 'cifar100'), 'no network')):
        with pytest.raises(AderError, match=what): from_robustbench(*args, folder=folder)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(AderError, match='could not load Gowal2020Small'): from_robustbench('Gowal2020Small', folder=folder)
    file.unlink()
    with pytest.raises(AderError, match='no route to host.*put it at'): from_robustbench('Gowal2020Small', folder=folder)


def test_files_from_the_zoo_run_no_code(fake_zoo, tmp_path):
    _, folder, file = fake_zoo
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    torch.save(Evil(), file)
    with pytest.raises(AderError, match='could not load'): from_robustbench('Gowal2020Small', folder=folder)
    assert not (tmp_path/'evil').exists() and 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


def test_robustbench_itself(small, tmp_path):
    "With the extra installed: a network of the zoo with random weights, saved as the zoo saves it."
    try: made = zoo_net('Rade2021Helper_R18_extra').eval()
    except AderError as e: pytest.skip(str(e))
    file = tmp_path/'models'/'cifar10'/'Linf'/'Rade2021Helper_R18_extra.pt'
    file.parent.mkdir(parents=True)
    torch.save(made.state_dict(), file)
    adopt_from_the_zoo('Rade2021Helper_R18_extra', made, tmp_path/'models', small, tmp_path)
    with pytest.raises(AderError, match='did you mean .*Gowal2020Uncovering_70_16_extra'): zoo_net('Gowal2020Uncovering_70_16_extr')


def test_without_robustbench(monkeypatch):
    monkeypatch.setitem(sys.modules, 'robustbench', None)
    with pytest.raises(AderError, match=r"pip install 'ader\[robustbench\]'"): from_robustbench('Gowal2020Uncovering_70_16_extra')


def test_published_weights_say_where_they_are_from(tmp_path):
    net = small_resnet(mean=0, std=1).eval()
    torch.save({k: v for k,v in net.state_dict().items() if 'normalize' not in k}, tmp_path/'w.pth')
    ours = from_published(small_resnet(), tmp_path/'w.pth', 0, 1, data='digits')
    x = torch.rand(2,1,8,8)
    assert torch.equal(ours(x), net(x)) and ours.card['source'] == 'w.pth' and ours.card['data'] == 'digits' and not ours.training


# The command

def cli(capsys, *argv):
    try: code = ader_teach_cli(list(map(str, argv))) or 0
    except SystemExit as e: code = e.code
    return code, *capsys.readouterr()

def test_the_command(tmp_path, capsys):
    argv = ['--net', 'small_resnet:width=4', '--epochs', 1, '--images', 50, '--method', 'natural', '--out', tmp_path/'t']
    code, out, err = cli(capsys, *argv)
    assert code == 0 and not err and re.search(r'epoch +1 of 1', out) and 'As the adversarial teacher' in out
    t, r = load(tmp_path/'t'/'teacher'), json.loads((tmp_path/'t'/'record.json').read_text())
    assert r['card'] == t.card and r['spec'] == t.spec and r['seconds'] > 0 and t.card['verified']['images'] == 50
    before = {o: o.read_bytes() for o in (tmp_path/'t').iterdir()}
    assert cli(capsys, *argv)[0] == 0
    code, out, err = cli(capsys, *argv, '--seed', 1)
    assert code == 2 and not out and err.count('\n') == 1 and 'seed 0, not 1' in err
    assert {o: o.read_bytes() for o in (tmp_path/'t').iterdir()} == before
    assert cli(capsys, *argv, '--seed', 1, '--fresh')[0] == 0
    assert load(tmp_path/'t'/'teacher').card['seed'] == 1


def test_checkpoints_of_another_command_are_one_sentence(tmp_path, capsys):
    train(Natural(), attend(small_resnet(width=4)), digits(device='cpu'), 1, progress=False, resume=tmp_path/'teacher')
    code, out, err = cli(capsys, '--epochs', 1, '--net', 'small_resnet:width=4', '--out', tmp_path)
    assert code == 2 and err.count('\n') == 1 and 'are of another training' in err and err.startswith('ader_teach: the checkpoints')


@pytest.mark.parametrize('argv', [['--method', 'mart'], ['--net', 'resnet1'], ['--net', 'small_resnet:width'], ['--net', 'attend'], ['--net', 'small_resnet:width=x'],
                                  ['--data', '/nowhere'], ['--eps', '8'], ['--eps', '1/0'], ['--eps', 'nan'], ['--eps', '1e999'], ['--epochs', '0'], ['--lr', 'nan'],
                                  ['--bs', '0'], ['--seed', '-1'], ['--images', '-1'], ['--out', '/proc/x'], ['--net', 'small_resnet:in_channels=3']])
def test_misuse(argv, capsys, tmp_path):
    code, out, err = cli(capsys, '--out', tmp_path, '--epochs', 1, *argv)
    assert code == 2 and err.strip().splitlines()[-1].startswith('ader_teach: ')
    assert not list(tmp_path.iterdir())
