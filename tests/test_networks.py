"""Networks: shapes for all sizes, and the same logits as the published layouts.

The reference networks below are written from the layouts' descriptions alone and share no code with `ader.networks`,
so that a mistake there can't hide here."""
import json, pytest, torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from ader.attention import attend
from ader.data import AderError
from ader.networks import *

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Tiny tensors lose more by waiting for other threads than they gain, most of all on a busy machine."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

# ---- shapes ----

NAMED = 'small_resnet', 'resnet56', 'resnet18', 'mobilenet_v2', 'wrn_22_6', 'wrn_34_10', 'wrn_70_16', 'wide_resnet'
SMALL = [('small_resnet', dict(width=4)), ('small_resnet', dict(width=4, stages=3)), ('mobilenet_v2', dict(width_mult=0.1)),
         ('mobilenet_v2', dict(width_mult=0.1, variant='pytorch-cifar')), ('wide_resnet', dict(depth=10, widen=1)),
         ('wide_resnet', dict(depth=10, widen=1, variant='deepmind'))]

@pytest.mark.parametrize('name', NAMED)
@pytest.mark.parametrize('channels, classes', [(1,2), (3,10), (4,100)])
def test_shapes(name, channels, classes):
    with torch.device('meta'): # shapes without weights
        net = archs[name](in_channels=channels, classes=classes)
        with_attention = attend(net)
        for size in (16, 31, 32, 64, 96):
            x = torch.empty(2, channels, size, size)
            g = net.before_last(x)
            assert net(x).shape == (2, classes) and g.shape[1] == net.widths[-2]
            out = with_attention(x, attend=True)
            assert [tuple(o.shape) for o in out] == [(2, classes), (2, 1, *g.shape[2:]), (2, classes)]

@pytest.mark.parametrize('name, kw', SMALL)
@pytest.mark.parametrize('attended', [False, True])
def test_learns(name, kw, attended):
    "Values and gradients are finite in training mode, at an even and an odd size, in one channel and three."
    torch.manual_seed(0)
    for channels,size in [(1,16), (3,21)]:
        net = archs[name](in_channels=channels, classes=7, **kw)
        net = attend(net) if attended else net
        F.cross_entropy(net(torch.rand(4, channels, size, size)), torch.arange(4)).backward()
        for n,p in net.named_parameters():
            if not n.startswith('block.to_scores'): assert p.grad is not None and p.grad.isfinite().all(), n

@pytest.mark.parametrize('name, kw', SMALL)
@pytest.mark.parametrize('attended', [False, True])
def test_spec_round_trip(name, kw, attended):
    net = archs[name](in_channels=2, classes=5, mean=[0.1,0.2], std=[0.5,0.4], **kw)
    net = attend(net) if attended else net
    twin = build(json.loads(json.dumps(net.spec)))
    twin.load_state_dict(net.state_dict())
    x = torch.rand(2, 2, 20, 20)
    with torch.no_grad(): assert torch.equal(net.eval()(x), twin.eval()(x))
    assert twin.spec == net.spec

@pytest.mark.parametrize('name', NAMED)
def test_named_specs(name):
    with torch.device('meta'): net, twin = archs[name](), build(archs[name]().spec)
    assert net.spec['arch'] == name and count_params(net) == count_params(twin)

def test_sizes():
    with torch.device('meta'):
        for f,millions in dict(resnet56=0.86, mobilenet_v2=2.24, resnet18=11.17, wrn_22_6=9.66, wrn_34_10=46.16, wrn_70_16=266.80).items():
            assert round(count_params(archs[f]())/1e6, 2) == millions
        assert count_params(mobilenet_v2(variant='pytorch-cifar')) == 2_296_922

def by_hand(net, x):
    "Multiply-adds counted in another way: what each layer's output says it took."
    total = []
    def count(m, _, out):
        per = m.in_channels//m.groups*m.kernel_size[0]*m.kernel_size[1] if isinstance(m, nn.Conv2d) else m.in_features
        total.append(out[0].numel()*per)
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(): net(x)
    for h in hooks: h.remove()
    return sum(total)

@pytest.mark.parametrize('name, kw', SMALL)
def test_multiply_adds(name, kw):
    net = attend(archs[name](in_channels=3, **kw))
    before = {k: v.clone() for k,v in net.state_dict().items()}
    n = multiply_adds(net, 20)
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert n == by_hand(net.eval(), torch.rand(1,3,20,20)) == multiply_adds(net, 20)

# ---- doors ----

@pytest.mark.parametrize('name, least', dict(small_resnet=2, resnet56=4, resnet18=8, mobilenet_v2=8, wrn_34_10=4).items())
def test_too_small(name, least):
    with torch.device('meta'):
        net = archs[name](in_channels=3)
        assert net(torch.empty(2,3,least,least)).shape == (2,10)
        for n in (net, attend(net)):
            with pytest.raises(AderError, match=f'at least {least}×{least} pixels, got {least-1}×40'): n(torch.empty(2,3,least-1,40))

@pytest.mark.parametrize('make, words', [
    (lambda: wide_resnet(20), '6·n'), (lambda: wide_resnet(4), '6·n'), (lambda: wide_resnet(10, 0), 'widen must be'), (lambda: wide_resnet('28'), 'depth must be'),
    (lambda: wrn_22_6(classes=0), 'classes must be'), (lambda: wrn_22_6(variant='swish'), "'trades' or 'deepmind'"), (lambda: resnet56(in_channels=0), 'in_channels must be'),
    (lambda: mobilenet_v2(variant='relu'), "'torchvision' or 'pytorch-cifar'"), (lambda: mobilenet_v2(width_mult=-1), 'width_mult'),
    (lambda: resnet56(std=0), 'std must be above 0'), (lambda: resnet56(mean=[0.1,0.2]), 'mean must be one number or 3'),
    (lambda: small_resnet()(torch.zeros(2,1,8,8, dtype=torch.uint8)), 'divide bytes by 255'), (lambda: small_resnet()(torch.zeros(1,8,8)), r'\(B, 1, H, W\)'),
    (lambda: build({'arch': 'wrn_34_10', 'widen': 3}), 'not the arguments of wrn_34_10')])
def test_bad_input(make, words):
    with pytest.raises(AderError, match=words): make()

# ---- the published layouts, written down once more ----

def conv(i, o, k=3, s=1, g=1): return nn.Conv2d(i, o, k, s, k//2, groups=g, bias=False)

def mark(net):
    "Batch norms with statistics and weights that are not the initial ones."
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t,lo,hi in ((m.running_mean,-.2,.2), (m.running_var,.5,1.5), (m.weight,.5,1.5), (m.bias,-.2,.2)): nn.init.uniform_(t, lo, hi)
    return net.double().eval()

class RefBasic(nn.Module):
    "After He et al. 2016; `short` is what the layout calls the shortcut."
    def __init__(self, i, o, s, short):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2, self.short = conv(i,o,3,s), nn.BatchNorm2d(o), conv(o,o), nn.BatchNorm2d(o), short
        if s != 1 or i != o: setattr(self, short, nn.Sequential(conv(i,o,1,s), nn.BatchNorm2d(o)))
    def forward(self, x):
        side = getattr(self, self.short)(x) if hasattr(self, self.short) else x
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + side).relu()

class RefResNet(nn.Module):
    def __init__(self, widths, blocks, short='shortcut', last='linear', classes=10):
        super().__init__()
        self.conv1, self.bn1, self.n, self.last = conv(3,widths[0]), nn.BatchNorm2d(widths[0]), len(widths), last
        i = widths[0]
        for k,o in enumerate(widths):
            setattr(self, f'layer{k+1}', nn.Sequential(*[RefBasic(i if j == 0 else o, o, 2 if j == 0 and k else 1, short) for j in range(blocks)]))
            i = o
        setattr(self, last, nn.Linear(i, classes))
    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for k in range(self.n): x = getattr(self, f'layer{k+1}')(x)
        return getattr(self, self.last)(x.mean((2,3)))

CFG = [(1,16,1,1), (6,24,2,1), (6,32,3,2), (6,64,4,2), (6,96,3,1), (6,160,3,2), (6,320,1,1)]

class RefMobileBlock(nn.Module):
    def __init__(self, i, o, e, s):
        super().__init__()
        w, self.s = e*i, s
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(i,w,1), nn.BatchNorm2d(w), conv(w,w,3,s,w), nn.BatchNorm2d(w)
        self.conv3, self.bn3 = conv(w,o,1), nn.BatchNorm2d(o)
        self.shortcut = nn.Sequential(*([conv(i,o,1), nn.BatchNorm2d(o)] if s == 1 and i != o else []))
    def forward(self, x):
        y = self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()))
        return y + self.shortcut(x) if self.s == 1 else y

class RefMobile(nn.Module):
    "MobileNet-V2 of pytorch-cifar."
    def __init__(self, classes=10):
        super().__init__()
        self.conv1, self.bn1, layers, i = conv(3,32), nn.BatchNorm2d(32), [], 32
        for e,o,n,s in CFG:
            for j in range(n):
                layers.append(RefMobileBlock(i, o, e, s if j == 0 else 1))
                i = o
        self.layers, self.conv2, self.bn2, self.linear = nn.Sequential(*layers), conv(320,1280,1), nn.BatchNorm2d(1280), nn.Linear(1280, classes)
    def forward(self, x):
        x = self.layers(self.bn1(self.conv1(x)).relu())
        return self.linear(self.bn2(self.conv2(x)).relu().mean((2,3)))

class RefInverted(nn.Module):
    def __init__(self, i, o, e, s):
        super().__init__()
        w, self.add = e*i, s == 1 and i == o
        cba = lambda *a: nn.Sequential(conv(*a), nn.BatchNorm2d(a[1]), nn.ReLU6())
        self.conv = nn.Sequential(*([cba(i,w,1)] if e > 1 else []), cba(w,w,3,s,w), conv(w,o,1), nn.BatchNorm2d(o))
    def forward(self, x): return x + self.conv(x) if self.add else self.conv(x)

class RefTorchvisionMobile(nn.Module):
    "MobileNet-V2 of torchvision with CIFAR's strides."
    def __init__(self, classes=10):
        super().__init__()
        cba = lambda *a: nn.Sequential(conv(*a), nn.BatchNorm2d(a[1]), nn.ReLU6())
        layers, i = [cba(3,32)], 32
        for e,o,n,s in CFG:
            for j in range(n):
                layers.append(RefInverted(i, o, e, s if j == 0 else 1))
                i = o
        self.features, self.classifier = nn.Sequential(*layers, cba(320,1280,1)), nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
    def forward(self, x): return self.classifier(self.features(x).mean((2,3)))

class RefWideBlock(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = nn.BatchNorm2d(i), conv(i,o,3,s), nn.BatchNorm2d(o), conv(o,o)
        self.convShortcut = conv(i,o,1,s) if i != o else None
    def forward(self, x):
        a = self.bn1(x).relu()
        y = self.conv2(self.bn2(self.conv1(a)).relu())
        return y + (self.convShortcut(a) if self.convShortcut else x)

class RefGroup(nn.Module):
    def __init__(self, block, name, n, i, o, s):
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(*[block(i if j == 0 else o, o, s if j == 0 else 1) for j in range(n)]))
    def forward(self, x): return getattr(self, self.name)(x)

class RefWide(nn.Module):
    "WRN of TRADES, with the block it never runs."
    def __init__(self, depth, k, classes=10):
        super().__init__()
        n, w = (depth-4)//6, [16, 16*k, 32*k, 64*k]
        self.conv1, self.bn1, self.fc = conv(3,16), nn.BatchNorm2d(w[3]), nn.Linear(w[3], classes)
        self.block1, self.sub_block1 = [RefGroup(RefWideBlock, 'layer', n, w[0], w[1], 1) for _ in range(2)]
        self.block2, self.block3 = [RefGroup(RefWideBlock, 'layer', n, w[i], w[i+1], 2) for i in (1, 2)]
    def forward(self, x): return self.fc(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu().mean((2,3)))

class RefDeepMindBlock(nn.Module):
    def __init__(self, i, o, s):
        super().__init__()
        self.s, self.batchnorm_0, self.batchnorm_1 = s, nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.conv_0, self.conv_1 = nn.Conv2d(i, o, 3, s, 0, bias=False), conv(o,o)
        self.shortcut = conv(i,o,1,s) if i != o else None
    def forward(self, x):
        a = F.silu(self.batchnorm_0(x))
        y = self.conv_0(F.pad(a, (1,1,1,1) if self.s == 1 else (0,1,0,1)))
        return self.conv_1(F.silu(self.batchnorm_1(y))) + (self.shortcut(a) if self.shortcut else x)

class RefDeepMind(nn.Module):
    def __init__(self, depth, k, mean, std, classes=10):
        super().__init__()
        n, w = (depth-4)//6, [16, 16*k, 32*k, 64*k]
        for name,v in (('mean', mean), ('std', std)): self.register_buffer(name, torch.tensor(v).view(3,1,1))
        self.init_conv, self.batchnorm, self.logits = conv(3,16), nn.BatchNorm2d(w[3]), nn.Linear(w[3], classes)
        self.layer = nn.Sequential(*[RefGroup(RefDeepMindBlock, 'block', n, w[i], w[i+1], min(i,1)+1) for i in range(3)])
    def forward(self, x):
        x = self.layer(self.init_conv((x - self.mean)/self.std))
        return self.logits(F.silu(self.batchnorm(x)).mean((2,3)))

CIFAR = dict(mean=[0.4914, 0.4822, 0.4465], std=[0.2471, 0.2435, 0.2616])
PUBLISHED = { # published, ours, whether the published file says how it normalises
    'resnet18': (lambda: RefResNet([64,128,256,512], 2), resnet18, False),
    'resnet18 of torchvision': (lambda: RefResNet([64,128,256,512], 2, 'downsample', 'fc'), resnet18, False),
    'resnet56': (lambda: RefResNet([16,32,64], 9, 'downsample', 'fc', classes=100), lambda: resnet56(classes=100), False),
    'mobilenet_v2 of pytorch-cifar': (RefMobile, lambda: mobilenet_v2(variant='pytorch-cifar'), False),
    'mobilenet_v2 of torchvision': (RefTorchvisionMobile, mobilenet_v2, False),
    'wrn_16_2 of TRADES': (lambda: RefWide(16, 2), lambda: wide_resnet(16, 2), False),
    'wrn_16_2 of DeepMind': (lambda: RefDeepMind(16, 2, **CIFAR, classes=100), lambda: wide_resnet(16, 2, classes=100, variant='deepmind'), True)}

@pytest.mark.parametrize('name', PUBLISHED)
def test_same_logits(name):
    make, build_ours, says = PUBLISHED[name]
    torch.manual_seed(0)
    ref, ours = mark(make()), build_ours().double().eval()
    assert sum(p.numel() for n,p in ref.named_parameters() if 'sub_block1' not in n) == count_params(ours)
    x = torch.rand(1, 3, 32, 32).double()
    load_published(ours, ref.state_dict(), **({} if says else dict(mean=0., std=1.)))
    with torch.no_grad(): a, b = ref(x), ours(x)
    assert a.std() > 1e-3 # else two wrong networks could agree
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('ref, ours', [
    (lambda: RefWide(34, 10), wrn_34_10), (lambda: RefDeepMind(70, 16, **CIFAR), lambda: wrn_70_16(variant='deepmind')),
    (lambda: RefDeepMind(22, 6, **CIFAR, classes=100), lambda: wrn_22_6(classes=100, variant='deepmind'))])
def test_large_ones_fit(ref, ours):
    "Names and shapes alone; their logits are those of the small ones, longer and wider."
    with torch.device('meta'): assert differences(ours(), ref().state_dict()) == []

def test_normalises_as_published():
    "A published network that is fed normalised images is ours with these numbers as mean and std, also after `build` and with attention."
    torch.manual_seed(0)
    ref, x = mark(RefResNet([8,16], 1)), torch.rand(2, 3, 16, 16).double()
    c = {k: torch.tensor(v).view(3,1,1).double() for k,v in CIFAR.items()}
    net = load_published(small_resnet(1, 8, 3), ref.state_dict(), **CIFAR).double().eval()
    with torch.no_grad(): torch.testing.assert_close(net(x), ref((x - c['mean'])/c['std']), rtol=1e-5, atol=1e-5)
    assert net.spec['mean'] == CIFAR['mean'] and attend(net).spec['net'] == net.spec
    twin = build(net.spec).double().eval()
    twin.load_state_dict(net.state_dict())
    with torch.no_grad(): assert torch.equal(twin(x), net(x))

# ---- checkpoints and files ----

@pytest.fixture
def ref():
    torch.manual_seed(0)
    return mark(RefResNet([8,16], 1)).float()
def student(): return small_resnet(1, 8, 3).eval()
def same(net, ref):
    x = torch.rand(2,3,16,16)
    with torch.no_grad(): torch.testing.assert_close(net(x), ref(x), rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('prefix', ['', 'module.', 'model.', 'module.model.', '_orig_mod.module.'])
@pytest.mark.parametrize('key', [None, 'state_dict', 'net', 'model', 'model_state_dict'])
def test_wrapping(ref, prefix, key, tmp_path):
    state = {prefix + k: v for k,v in ref.state_dict().items()}
    checkpoint = {key: state, 'epoch': 3, 'acc': 91.2} if key else state
    same(load_published(student(), checkpoint, 0, 1), ref)
    torch.save(checkpoint, tmp_path/'a.pth')
    same(load_published(student(), str(tmp_path/'a.pth'), 0, 1), ref)

def test_safetensors_and_our_own(ref, tmp_path):
    save_file(ref.state_dict(), tmp_path/'a.safetensors')
    net = load_published(student(), tmp_path/'a.safetensors', 0, 1)
    same(net, ref)
    same(load_published(student(), net.state_dict()), ref) # ours says how it normalises

def test_without_batch_counters(ref):
    same(load_published(student(), {k: v for k,v in ref.state_dict().items() if 'num_batches' not in k}, 0, 1), ref)

def refused(net, weights, *words, **kw):
    before = {k: v.clone() for k,v in net.state_dict().items()}
    with pytest.raises(AderError) as e: load_published(net, weights, **({'mean': 0, 'std': 1} | kw))
    for w in words: assert w in str(e.value), str(e.value)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()), 'something was loaded'

def test_every_difference_is_named(ref):
    state = ref.state_dict()
    del state['bn1.weight'], state['layer2.0.shortcut.0.weight']
    state |= {'scale': torch.ones(1), 'linear.weight': torch.ones(10,7), 'layer2.1.conv1.weight': torch.ones(1)}
    refused(student(), state, 'missing: stem.1.weight, stages.1.0.downsample.0.weight', 'unknown: scale, layer2.1.conv1.weight',
            'linear.weight (10, 7) and not (10, 16)')

def test_wrong_network(ref):
    refused(resnet18(), ref.state_dict(), 'layout: ResNet', 'missing: ', 'of another shape: ')
    refused(small_resnet(1, 8, 3, classes=7), ref.state_dict(), 'linear.bias (10,) and not (7,)')
    refused(student(), {'features.weight': torch.ones(1)}, 'unknown: features.weight')
    refused(student(), {'a': torch.ones(1)}, 'layout: unknown', 'unknown: a')

def test_wrong_variant():
    "Some variants have the same weights and compute something else with them."
    refused(wide_resnet(10, 1, variant='deepmind'), RefWide(10, 1).state_dict(), "variant: 'trades' is needed, the network has 'deepmind'")
    refused(wide_resnet(10, 1), RefDeepMind(10, 1, **CIFAR).state_dict(), "variant: 'deepmind' is needed", mean=None, std=None)
    refused(mobilenet_v2(), RefMobile().state_dict(), "variant: 'pytorch-cifar' is needed", 'layers.0.conv2.weight')

def test_not_a_state_dict(ref):
    state = ref.state_dict()
    refused(student(), {}, 'it is empty')
    refused(student(), {'epoch': 3}, 'epoch is not a tensor')
    refused(student(), ref, 'got RefResNet')
    refused(student(), {'net': state, 'model': state}, 'several state dicts, net, model')
    refused(student(), {**{f'module.{k}': v for k,v in state.items()}, **state}, 'several networks')
    refused(student(), {**state, 'fc.weight': state['linear.weight']}, 'linear.weight and fc.weight both name the same weight')
    refused(student(), state, "don't say how", mean=None)
    refused(student(), state, 'mean must be one number or 3', mean=[0.,0.])
    refused(student(), state, 'std must be above 0', std=0)
    refused(student(), {**state, 'mean': torch.zeros(3), 'std': torch.ones(3)}, 'come with their own mean')
    with pytest.raises(AderError, match='before attend'): load_published(attend(student()), state, 0, 1)

class Code: # what `weights_only=True` must not run
    def __reduce__(self): return exec, ('raise SystemExit("code was run")',)

@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors'])
def test_bad_files(ref, name, tmp_path):
    f = tmp_path/name
    with pytest.raises(AderError, match='there is no file'): load_published(student(), f, 0, 1)
    with pytest.raises(AderError, match='there is no file'): load_published(student(), tmp_path, 0, 1)
    save_file(ref.state_dict(), f) if name.endswith('safetensors') else torch.save(ref.state_dict(), f)
    whole = f.read_bytes()
    for part in (b'', whole[:4], whole[:len(whole)//2], whole[:-8], b'not a file of weights', b'<html>404</html>'*50):
        f.write_bytes(part)
        refused(student(), f, f'{name} is damaged')

def test_no_code_is_run(tmp_path):
    torch.save({'net': Code()}, tmp_path/'a.pth')
    refused(student(), tmp_path/'a.pth', 'holds more than weights')


@pytest.mark.parametrize('size', [0, 3, True, 2., '2', None])
def test_the_stride_of_the_first_convolution_is_1_or_2(size):
    with pytest.raises(AderError, match='stem_stride must be'): small_resnet(stem_stride=size)


def test_a_stride_in_the_first_convolution_leaves_a_quarter_of_the_work():
    whole, half = (small_resnet(1, 16, 3, stages=3, stem_stride=s) for s in (1, 2))
    assert [p.shape for p in whole.parameters()] == [p.shape for p in half.parameters()]
    assert multiply_adds(half, 32) == pytest.approx(multiply_adds(whole, 32)/4, rel=0.01)
    assert half.min_size == 2*whole.min_size and half(torch.rand(2, 3, 32, 32)).shape == (2, 10)
