"Teachers: trained, given attention that changes nothing, from elsewhere, and those that don't fit."
import enum, importlib.metadata, os, sys, types
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from ader.attacks import PGD_sat, Threat
from ader.attention import (InputAdapter, add_attention, forward_with_attention, has_attention)
from ader.checkpoints import load, save
from ader.data import AderError, digits
from ader.evaluation import check_teacher
from ader.methods import ADER
from ader.networks import build, mobilenet_v2, small_resnet, wide_resnet
from ader.teachers import (AttachedAttention, activation_map, attach_attention, find_layer,
                           from_robustbench, teach, train, _zoo_net)
from ader.training import SAT, Natural

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

# ---- training --------------------------------------------------------------------------------

def test_the_seed_fixes_everything_but_the_first_weights(small, net):
    def once(seed, disturb):
        torch.manual_seed(0)
        student = net()
        torch.rand(disturb)
        learn = train(SAT(steps=1), student, small(), 1, seed=seed, progress=False)
        return learn.model.state_dict()
    a = once(1, 0)
    assert same(a, once(1, 9)) and not same(a, once(2, 0))

@pytest.mark.parametrize('kw, what', [(dict(epochs=0), '1 epoch'), (dict(lr=0), 'learning rate'),
                                      (dict(lr=float('nan')), 'learning rate')])
def test_bad_settings(plain, small, kw, what):
    with pytest.raises(AderError, match=what):
        train(Natural(), plain(), small(), progress=False, **kw)

def test_teach(net, small):
    own = net()
    assert teach('natural', own, small(), epochs=1, progress=False) is own # its attention is kept
    with pytest.raises(AderError, match='one of natural, trades, sat'): teach('mart', own, small())

# ---- attention beside a network --------------------------------------------------------------

KINDS = dict(small_resnet=lambda: small_resnet(width=4), mobilenet_v2=lambda: mobilenet_v2(1),
             wide_resnet=lambda: wide_resnet(10, 1, in_channels=1))

def of_size(dls, size):
    "The same digits, larger."
    for dl in dls: dl.dataset.x = F.interpolate(dl.dataset.x, size)
    return dls

@pytest.mark.parametrize('kind', ['mobilenet_v2', 'small_resnet', 'wide_resnet'])
def test_predictions_stay_bit_for_bit(kind, small, tmp_path):
    dls, x, any_net = of_size(small(), 16), torch.rand(3,1,16,16), KINDS[kind]()
    with torch.no_grad(): any_net.train()(torch.rand(32,1,16,16)) # other statistics than a fresh one
    any_net.eval()
    weights = {k: v.clone() for k,v in any_net.state_dict().items()}
    with torch.no_grad(): before = any_net(x)
    net = attach_attention(any_net, dls)
    with torch.no_grad():
        out = forward_with_attention(net, x)
        assert torch.equal(net(x), before) and torch.equal(out.logits, before)
    assert same(any_net.state_dict(), weights) and has_attention(net)
    m = out.attention
    assert m.shape[:2] == (3, 1) and 0 < m.min() and m.max() <= 1
    save(net, tmp_path/'a')
    twin = load(tmp_path/'a')
    with torch.no_grad(): again = forward_with_attention(twin, x)
    for a,b in zip(again, out): assert a is b is None or torch.equal(a, b)
    assert twin.config == net.config and twin.metadata == net.metadata

class Theirs(nn.Module):
    "Layers in another order than they are named."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.c, self.fc, self.bn = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10), nn.BatchNorm2d(8)
    def forward(self, x):
        return self.fc(F.relu_(self.c(F.relu(self.bn(self.b(F.relu(self.a(x))))))).mean((2,3)))

class Tokens(nn.Module):
    "A transformer's matrix of attention has four dimensions too, and is no grid of the image."
    def __init__(self):
        super().__init__()
        self.cut, self.soft, self.fc = nn.Conv2d(1, 6, 2, 2), nn.Softmax(-1), nn.Linear(6, 10)
    def forward(self, x):
        t = self.cut(x).flatten(2).mT
        t = torch.cat([t[:,:1], t], 1)[:,None]
        return self.fc((self.soft(t @ t.mT) @ t).mean((1,2)))

def test_a_network_from_elsewhere(small):
    net, x = Theirs(), torch.rand(2,1,8,8)
    assert find_layer(net, x) == 'bn' and net.training and find_layer(Tokens(), x) == 'cut'
    before = net.eval()(x)
    for layer,size in ((None, 4), ('a', 8)):
        a = attach_attention(net, small(), layer=layer)
        assert torch.equal(a(x), before)
        assert forward_with_attention(a, x).attention.shape[-1] == size
    train(ADER(a, a, steps=1), add_attention(small_resnet(width=4)), small(), 1, progress=False)
    for bad in ('z', 'fc', ''):
        with pytest.raises(AderError): attach_attention(net, small(), layer=bad)
    with pytest.raises(AderError, match='attention already'): attach_attention(a, small())
    with pytest.raises(AderError, match='gives features'):
        attach_attention(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), small())

@given(scale=st.floats(1e-30, 1e30), zero=st.booleans())
def test_the_map_of_activations(scale, zero):
    g = torch.randn(2,3,4,4)
    m = activation_map(g*scale*(not zero))
    assert 0 < m.min() and m.max() <= 1 and m.isfinite().all()
    if zero: return
    assert (m.amax((2,3)) == 1).all() and torch.allclose(m, activation_map(g), atol=1e-4)

KEYS = ['layer', 'channels', 'arch', 'more']

VALUES = st.none() | st.integers(-2, 20) | st.text(max_size=4) | st.just({})

@settings(max_examples=30)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_tampered_configs_are_refused_or_build(key, value):
    inside = AttachedAttention(small_resnet(width=4, in_channels=3), 'stages.1')
    config = InputAdapter(inside, 3, 8).config
    for c in (config, config['net']):
        try: build({**c, key: value})
        except AderError: pass

# ---- teachers for other images ---------------------------------------------------------------

@pytest.mark.parametrize('image', [(1,8,8), (3,20,12)])
def test_teachers_for_other_images_just_work(image, small, net):
    c, *size = image
    make = lambda mean: add_attention(small_resnet(width=4, in_channels=c, mean=mean, std=0.5))
    teachers = [make(0.1), make(0.2)]
    for t in teachers: t.metadata = dict(image=list(image))
    learn = train(ADER(*teachers, steps=1), net(), small(), 1, progress=False)
    x = torch.rand(2,1,8,8)
    for t in learn.ader.teachers.values():
        assert isinstance(t, InputAdapter) == (image != (1,8,8)) and t(x).shape == (2,10)
        assert forward_with_attention(t, x).attention.shape[2:] == torch.Size(size)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    t = learn.ader.teachers['clean'] # not adapted twice
    assert not isinstance(getattr(t, 'net', None), InputAdapter)

def test_an_attack_sees_through_an_adapter():
    inside, x, y = small_resnet(in_channels=3).eval(), torch.rand(8,1,8,8), torch.arange(8)
    net = InputAdapter(inside, 3, 16)
    z = PGD_sat(Threat(0.2))(net, x, y)
    assert F.cross_entropy(net(z), y) > F.cross_entropy(net(x), y) + 0.05

def test_teachers_that_do_not_fit(small, net):
    def go(clean, **kw):
        train(ADER(clean, net(), steps=1), net(**kw), dls, 1, progress=False)
    dls = small()
    for classes, what in ((list('0123456789')[::-1], 'in another order'),
                          ([f'class {i}' for i in range(10)], "'class 0' where the data has '0'")):
        t = net()
        t.metadata = dict(classes=classes)
        with pytest.raises(AderError, match=what): go(t)
    with pytest.raises(AderError, match='has 7 classes and the student 10'): go(net(classes=7))
    for dl in dls: dl.dataset.x = dl.dataset.x.expand(-1, 3, -1, -1)
    go(net(), in_channels=3) # teachers of grey images, a student of colour
    with pytest.raises(AderError, match='the clean teacher does not accept images.*4'):
        go(net(in_channels=4), in_channels=3)

# ---- teachers that are checked ---------------------------------------------------------------

def test_one_line_about_teachers_that_were_not_checked(small, net, capsys, all_digits, tmp_path):
    a, b = net(), net()
    method = ADER(a, b, steps=1)
    learn = train(method, net(), small(), 1, progress=False)
    assert capsys.readouterr().out.count('teacher were not checked') == 1
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not capsys.readouterr().out
    for t in (a, b): found = check_teacher(t, all_digits.valid, images=50, progress=False)
    train(ADER(a, b, steps=1), net(), small(), 1, progress=False)
    assert 'were checked and found unfit' in capsys.readouterr().out
    save(b, tmp_path/'b')
    kept = load(tmp_path/'b').metadata['verified']
    assert kept['images'] == 50 and kept['data'] == 'digits' and kept['roles'] == found.roles == []
    assert kept['threat'] == dict(eps=0.2, norm='Linf')
    for t,role in ((a, 'clean'), (b, 'robust')): t.metadata['verified']['roles'] = [role]
    train(ADER(a, b, steps=1), net(), small(), 1, progress=False)
    assert not capsys.readouterr().out

def test_a_constant_prediction_is_no_teacher(all_digits):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x):
            return 2*F.one_hot(torch.full((len(x),), 3), 10) + 0*self.w + 0*x.mean()
    assert check_teacher(Constant(), all_digits.test, images=200, progress=False).roles == []

# ---- from elsewhere --------------------------------------------------------------------------

class ZooNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3, 1, 1), nn.MaxPool2d(2)
        self.last, self.fc = nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
    def forward(self, x): return self.fc(self.last(self.pool(self.conv(x).relu())).mean((2,3)))

@pytest.fixture
def fake_zoo(monkeypatch, tmp_path):
    "What `robustbench.utils` offers, with a small network and nothing to download from."
    data = enum.Enum('BenchmarkDataset', dict(cifar_10='cifar10', cifar_100='cifar100'))
    threats = enum.Enum('ThreatModel', dict(Linf='Linf', L2='L2'))
    zoo = {data.cifar_10: {threats.Linf: {'Gowal2020Small': dict(model=ZooNet, gdrive_id='x')}}}
    def load_model(name, folder, dataset, threat):
        file = Path(folder)/dataset/threat/f'{name}.pt'
        if not file.exists(): raise ConnectionError('no route to host')
        net = zoo[data(dataset)][threats(threat)][name]['model']()
        net.load_state_dict(torch.load(file, map_location='cpu'))
        return net
    package, utils = types.ModuleType('robustbench'), types.ModuleType('robustbench.utils')
    package.utils, timm = utils, types.SimpleNamespace(is_model=lambda name: False)
    vars(utils).update(timm=timm, BenchmarkDataset=data, ThreatModel=threats, all_models=zoo,
                       load_model=load_model)
    for m in (package, utils): monkeypatch.setitem(sys.modules, m.__name__, m)
    version = importlib.metadata.version
    fake = lambda name: '1.1' if name == 'robustbench' else version(name)
    monkeypatch.setattr(importlib.metadata, 'version', fake)
    made, file = ZooNet().eval(), tmp_path/'models'/'cifar10'/'Linf'/'Gowal2020Small.pt'
    file.parent.mkdir(parents=True)
    torch.save(made.state_dict(), file)
    return made, tmp_path/'models', file

def attach_from_the_zoo(name, made, folder, small, tmp_path):
    x, g = torch.rand(2,3,32,32), torch.rand(2,1,8,8)
    net = from_robustbench(name, folder=folder)
    teacher = attach_attention(net, small())
    save(teacher, tmp_path/'t')
    twin = load(tmp_path/'t')
    with torch.no_grad():
        assert torch.equal(net(x), made(x)) and torch.equal(teacher.net.net(x), made(x))
        outs = forward_with_attention(twin, g)[:2], forward_with_attention(teacher, g)[:2]
    assert all(map(torch.equal, *outs)) and teacher.net.size == [32,32]
    assert twin.metadata['source'] == name and twin.metadata['data'] == 'CIFAR-10'
    assert twin.config == teacher.config
    paths = [v for v in twin.metadata.values() if isinstance(v, str) and ('/' in v or '\\' in v)]
    assert not paths
    return teacher

def test_robustbench_as_we_call_it(fake_zoo, small, net, tmp_path):
    made, folder, file = fake_zoo
    t = attach_from_the_zoo('Gowal2020Small', made, folder, small, tmp_path)
    train(ADER(t, t, steps=1), net(), small(), 1, progress=False)
    def refused(what, *args):
        with pytest.raises(AderError, match=what): from_robustbench(*args, folder=folder)
    refused('did you mean Gowal2020Small', 'Gowal2020Smal')
    refused("no networks for 'mnist'", 'x', 'mnist')
    refused("'L7'", 'x', 'cifar10', 'L7')
    file.write_bytes(file.read_bytes()[:500])
    refused('could not load Gowal2020Small', 'Gowal2020Small')
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    torch.save(Evil(), file)
    refused('could not load', 'Gowal2020Small')
    assert not (tmp_path/'evil').exists() and 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    file.unlink()
    refused('no route to host.*put the file at', 'Gowal2020Small')

def test_robustbench_itself(small, tmp_path):
    "With the extra installed: a network of the zoo with random weights."
    name = 'Rade2021Helper_R18_extra'
    try: made = _zoo_net(name).eval()
    except AderError as e: pytest.skip(str(e))
    file = tmp_path/'models'/'cifar10'/'Linf'/f'{name}.pt'
    file.parent.mkdir(parents=True)
    torch.save(made.state_dict(), file)
    attach_from_the_zoo(name, made, tmp_path/'models', small, tmp_path)
    with pytest.raises(AderError, match='did you mean .*Gowal2020Uncovering_70_16_extra'):
        _zoo_net('Gowal2020Uncovering_70_16_extr')

def test_without_robustbench(monkeypatch):
    monkeypatch.setitem(sys.modules, 'robustbench', None)
    with pytest.raises(AderError, match=r"pip install 'ader-distill\[robustbench\]'"):
        from_robustbench('Gowal2020Uncovering_70_16_extra')

def test_a_name_of_the_zoo_where_a_saved_network_goes(monkeypatch):
    import ader.teachers
    from ader.checkpoints import load
    net, asked = small_resnet(width=4), []
    monkeypatch.setattr(ader.teachers, 'from_robustbench', lambda *a: asked.append(a) or net)
    assert load('robustbench/Wang2023Better_WRN-28-10/cifar100') is net
    assert asked == [('Wang2023Better_WRN-28-10', 'cifar100')]
