"""Networks: shapes for all sizes, and the same logits as published networks.

torchvision's own classes are the references where it has them; the others are written from the
descriptions of their layouts and share no code with `ader.networks`, so no mistake can hide."""
import json, pytest, torch
from functools import partial
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet
from ader.data import AderError, Images, dataloaders
from ader.networks import *

NAMED = 'small_resnet resnet56 resnet18 mobilenet_v2 wrn_22_6 wrn_34_10 wrn_70_16'.split()
SMALL = [('small_resnet', dict(width=4, stages=3)), ('small_resnet', dict(width=4, act='silu')),
         ('wide_resnet', dict(depth=10, widen=1)),
         ('wide_resnet', dict(depth=10, widen=1, variant='deepmind')),
         ('mobilenet_v2', dict(width_mult=0.1))]

# ---- shapes and sizes ----

@pytest.mark.parametrize('name', NAMED)
def test_shapes(name):
    with torch.device('meta'): # shapes without weights
        net = archs[name](in_channels=4, classes=100)
        least = net.min_size
        for size in (least, 33):
            x = torch.empty(2, 4, size, size)
            assert net(x).shape == (2, 100) and net.before_last(x).shape[1] == net.widths[-2]
        with pytest.raises(AderError, match=f'{least}×{least} pixels, got {least-1}×40'):
            net(torch.empty(2, 4, least-1, 40))

@pytest.mark.parametrize('name, kw', SMALL)
def test_learns_and_is_built_again(name, kw):
    net = archs[name](in_channels=2, classes=7, mean=[0.1,0.2], std=[0.5,0.4], **kw)
    x = torch.rand(4,2,21,20)
    F.cross_entropy(net(x), torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    twin = build(json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config and twin.eval()(x).equal(net.eval()(x))

def test_weights_of_a_seed_stay_what_they_were():
    "The order of random draws decides every result of the records."
    for f,kw,total,then in ((small_resnet, {}, 133.546389, 0.974371493),
                            (wide_resnet, dict(depth=10, widen=1), 223.984597, 0.985173523),
                            (mobilenet_v2, {}, 16960.0219, 0.422076821)):
        torch.manual_seed(0)
        got = sum(p.double().sum() for p in f(**kw).parameters()).item()
        assert (got, torch.rand(1).item()) == pytest.approx((total, then), rel=1e-5)

@pytest.mark.parametrize('name, kw', SMALL)
def test_multiply_adds(name, kw):
    "Counted in another way: what each layer's output says it took."
    net, total = archs[name](in_channels=3, **kw).eval(), []
    def count(m, _, out):
        conv = isinstance(m, nn.Conv2d)
        total.append(out.numel()*(m.weight[0].numel() if conv else m.in_features))
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_hook(count)
    net(torch.rand(1,3,20,20))
    assert sum(total) == multiply_adds(net, 20) == multiply_adds(net.train(), (3,20,20))
    assert net.training

@pytest.mark.parametrize('make, words', [
    (lambda: wide_resnet(20), '6·n'), (lambda: wide_resnet(10, 0), 'widen must be'),
    (lambda: wide_resnet('28'), 'depth must be'), (lambda: wrn_22_6(classes=True), 'classes must'),
    (lambda: wrn_22_6(variant='swish'), "'trades' or 'deepmind'"),
    (lambda: mobilenet_v2(width_mult=-1), 'width_mult'), (lambda: small_resnet(stages=1), '2 st'),
    (lambda: small_resnet(stem_stride=3), 'stem_stride'), (lambda: resnet56(std=0), 'std must'),
    (lambda: small_resnet(act='elu'), 'silu'),
    (lambda: small_resnet(width=10**5, stages=9), 'at most 100000'),
    (lambda: resnet56(mean=[0.1,0.2]), 'mean must be one number or 3'),
    (lambda: small_resnet()(torch.zeros(2,1,8,8, dtype=torch.uint8)), 'divide bytes by 255'),
    (lambda: small_resnet()(torch.zeros(1,8,8)), r'\(B, 1, H, W\)'),
    (lambda: build({'arch': 'wrn_34_10', 'widen': 3}), 'not the arguments of wrn_34_10'),
    (lambda: build({'arch': ['resnet18']}), 'no network is called')])
def test_bad_input(make, words):
    with pytest.raises(AderError, match=words): make()

names = 'width depth widen classes mean std variant width_mult x'.split()
odd = st.one_of(st.integers(-2, 70), st.floats(-1, 3), st.booleans(), st.none(), st.sampled_from(
    [10**9, 10**20, float('nan'), float('inf'), 'deepmind', 'x', [1], {}]))

@given(st.sampled_from(['small_resnet', 'wide_resnet', 'mobilenet_v2']),
       st.dictionaries(st.sampled_from(names), odd))
def test_any_config(name, args):
    "A description from a file gives a network, or one error."
    with torch.device('meta'):
        try: assert isinstance(build({'arch': name, **args}), Net)
        except AderError as e: assert str(e)

def test_from_text():
    x = torch.rand(40,3,8,8)*torch.tensor([1, 0.5, 0])[:,None,None]
    ds = Images(x, torch.arange(40)%4, 'abcd')
    net = net_from_text('small_resnet: width=8, blocks=2', dls := dataloaders(ds, ds, device='cpu'))
    assert net.config['width'] == 8 and (net.in_channels, net.classes) == (3, 4)
    assert net.normalize.mean.flatten().tolist() == pytest.approx([0.5, 0.25, 0], abs=0.02)
    assert net.normalize.std.min().item() == pytest.approx(1e-3) # a channel that is constant
    for text in ('small_resnet:width', 'small_resnet:width=[', 'resnet19', 'resnet18:depth=3', ''):
        with pytest.raises(AderError): net_from_text(text, dls)

# ---- the published layouts, written down once more ----

def conv(i, o, k=3, s=1, g=1, p=None):
    return nn.Conv2d(i, o, k, s, k//2 if p is None else p, groups=g, bias=False)

class WideBlock(nn.Module):
    "Of TRADES, or of DeepMind with its own names, activation and padding."
    def __init__(self, i, o, s, dm):
        super().__init__()
        self.n = ('batchnorm_0', 'conv_0', 'batchnorm_1', 'conv_1', 'shortcut') if dm else (
            'bn1', 'conv1', 'bn2', 'conv2', 'convShortcut')
        layers = nn.BatchNorm2d(i), conv(i,o,3,s,p=0), nn.BatchNorm2d(o), conv(o,o), conv(i,o,1,s)
        for k,m in zip(self.n, layers[:5 if i != o else 4]): setattr(self, k, m)
        self.act, self.pad = (F.silu, (0,1,0,1)) if dm else (F.relu, (1,1,1,1))
        if s == 1: self.pad = 1,1,1,1
    def forward(self, x):
        bn1, conv1, bn2, conv2, short = (getattr(self, k, None) for k in self.n)
        a = self.act(bn1(x))
        return conv2(self.act(bn2(conv1(F.pad(a, self.pad))))) + (short(a) if short else x)

class Wide(nn.Module):
    "WRN of TRADES, with the block that it never runs, or of DeepMind, which normalises inside."
    def __init__(self, depth, k, dm):
        super().__init__()
        n, w, self.dm = (depth-4)//6, [16, 16*k, 32*k, 64*k], dm
        group = lambda i, s: nn.ModuleDict({'block' if dm else 'layer': nn.Sequential(
            *[WideBlock(w[i+1] if j else w[i], w[i+1], 1 if j else s, dm) for j in range(n)])})
        self.stem, self.norm, self.out = conv(3,16), nn.BatchNorm2d(w[3]), nn.Linear(w[3], 10)
        self.groups = nn.ModuleList([group(0, 1), group(1, 2), group(2, 2)])
    def forward(self, x):
        x, act = self.stem(x), F.silu if self.dm else F.relu
        for g in self.groups:
            for m in g.values(): x = m(x)
        return self.out(act(self.norm(x)).mean((2,3)))
    def published(self):
        "The state dict under its published names."
        names = {f'groups.{i}': f'block{i+1}' for i in range(3)}
        names |= dict(stem='conv1', norm='bn1', out='fc')
        if self.dm: names = dict(stem='init_conv', norm='batchnorm', out='logits', groups='layer')
        state = {} if self.dm else {'sub_block1.layer.0.bn1.weight': torch.ones(16)}
        for k,v in self.state_dict().items():
            a = next(a for a in names if k.startswith(f'{a}.'))
            state[names[a] + k[len(a):]] = v
        return state

class Liu(ResNet):
    "With the names of pytorch-cifar."
    def __init__(self):
        super().__init__(BasicBlock, [2,2,2,2], num_classes=10)
        self.conv1, self.maxpool = conv(3,64), nn.Identity()
    def published(self):
        names = lambda k: k.replace('downsample', 'shortcut').replace('fc.', 'linear.')
        return {names(k): v for k,v in self.state_dict().items()}

PUBLISHED = { # published, its state dict, ours
    'ResNet of torchvision': (Liu, Liu.state_dict, resnet18),
    'ResNet of pytorch-cifar': (Liu, Liu.published, resnet18),
    'WRN of TRADES': (partial(Wide, 16, 2, False), Wide.published, partial(wide_resnet, 16, 2)),
    'WRN of DeepMind': (partial(Wide, 16, 2, True), Wide.published,
                        partial(wide_resnet, 16, 2, variant='deepmind'))}

def mark(net):
    "Batch norms with statistics and weights that are not the initial ones."
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for t in (m.running_mean, m.bias): nn.init.uniform_(t, -.2, .2)
        for t in (m.running_var, m.weight): nn.init.uniform_(t, .5, 1.5)
    return net.double().eval()

@pytest.mark.parametrize('name', PUBLISHED)
def test_same_logits(name):
    "Also normalised: what the published network was fed is what ours makes of pixels."
    make, published, ours = PUBLISHED[name]
    ref, ours, x = mark(make()), ours().double().eval(), torch.rand(1,3,32,32).double()
    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    load_published(ours, published(ref), mean, std)
    with torch.no_grad():
        a = ref((x - torch.tensor(mean).view(3,1,1))/torch.tensor(std).view(3,1,1))
        b = ours(x)
    assert a.std() > 1e-3 # else two wrong networks could agree
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert ours.config['mean'] == mean and ours.config['std'] == std

# ---- checkpoints and files ----

@pytest.fixture
def state(): return small_resnet(1, 8, 3).state_dict()
def ours(): return small_resnet(1, 8, 3, mean=0.1)
plain = dict(mean=0, std=1)
def same(net, state): assert all(v.equal(state[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('prefix', ['', 'module.', 'module.model.', '_orig_mod.module.'])
@pytest.mark.parametrize('key', [None, 'state_dict', 'net', 'model', 'model_state_dict', 'rmodel'])
def test_wrapping(state, prefix, key, tmp_path):
    wrapped = {prefix + k: v for k,v in state.items()}
    checkpoint = {key: wrapped, 'epoch': 3, 'acc': 91.2} if key else wrapped
    torch.save(checkpoint, tmp_path/'a.pth')
    for o in (checkpoint, str(tmp_path/'a.pth')): same(load_published(ours(), o), state)

def test_safetensors_and_files_without_batch_counters(state, tmp_path):
    save_file({k: v for k,v in state.items() if 'num_batches' not in k}, tmp_path/'a.safetensors')
    same(load_published(ours(), tmp_path/'a.safetensors'), state)

def refused(net, weights, *words, **kw):
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(AderError) as e: load_published(net, weights, **kw)
    for w in words: assert w in str(e.value), str(e.value)
    same(net, before)

def test_every_difference_is_named(state):
    del state['stem.1.weight']
    state |= {'scale': torch.ones(1), 'head.2.weight': torch.ones(10,7)}
    refused(ours(), state, 'layout: ader', 'stem.1.weight is missing, not (8,)', 'scale is unknown',
            'head.2.weight is (10, 7), not (10, 16)')
    refused(resnet18(), {'a': torch.ones(1)}, 'layout: None', 'a is unknown', **plain)

def test_wrong_variant():
    "Some variants have the same weights and compute something else with them."
    trades, dm = Wide(10, 1, False).published(), Wide(10, 1, True).published()
    refused(wide_resnet(10, 1, variant='deepmind'), trades, "variant='trades' is needed", **plain)
    refused(wide_resnet(10, 1), dm, "variant='deepmind' is needed", **plain)

def test_not_a_state_dict(state):
    bare = {k: v for k,v in state.items() if 'normalize' not in k}
    for weights,words in (
        ({}, 'it is empty'), ({'epoch': 3}, 'epoch is not a tensor'), (ours(), 'Net'),
        ({'net': state, 'model': state}, 'net, model are several'),
        ({'state_dict': state, 'state_dict_ema': state}, 'are several state dicts'),
        ({f'module.{k}': v for k,v in state.items()} | state, 'several networks'),
        (bare, "don't say how their images are normalised"),
        (bare | {'mean': torch.ones(2), 'std': torch.ones(1)}, 'mean must be one number or 3'),
        (bare | {'mean': torch.ones(3), 'mu': torch.ones(3)}, 'both name the same weight')):
        refused(ours(), weights, words)
    refused(ours(), state, 'come with their own mean', **plain)
    with pytest.raises(AderError, match='without attention'): load_published(nn.Linear(2,2), state)

class Code: # what `weights_only=True` must not run
    def __reduce__(self): return exec, ('raise SystemExit("code was run")',)

@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_bad_files(state, name, tmp_path):
    refused(ours(), tmp_path/name, 'there is no file')
    save_file(state, tmp_path/name) if 'safe' in name else torch.save(state, tmp_path/name)
    whole = (tmp_path/name).read_bytes()
    for part in (b'', whole[:4], whole[:len(whole)//2], whole[:-8], b'<html>404</html>'*50):
        (tmp_path/name).write_bytes(part)
        refused(ours(), tmp_path/name, f'{name} is damaged')
    torch.save({'net': Code()}, tmp_path/'a.pth')
    refused(ours(), tmp_path/'a.pth', 'holds more than weights')
