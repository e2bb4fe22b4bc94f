import copy, pickle
import numpy as np, pytest, torch
from torch import nn
from ader.data import AderError
from ader.networks import build, mobilenet_v2, small_resnet
from ader.attention import (AttentionBlock, AttentionNet, InputAdapter, add_attention,
apply_attention, forward_with_attention, has_attention)

@pytest.fixture
def x(): return torch.rand(4,1,8,8)

def same(a, b): return all(torch.equal(p, q) for p,q in zip(a, b))

def test_modulate_in_numpy():
    "Eq. 2, channel by channel."
    g, m = torch.randn(2,3,4,5), torch.rand(2,1,4,5)
    got = apply_attention(g, m).numpy()
    for b in range(2):
        for c in range(3): np.testing.assert_allclose(got[b,c], (1 + m[b,0].numpy())*g[b,c].numpy(), rtol=1e-6)

@pytest.mark.parametrize('make,channels', [(small_resnet, 1), (lambda: small_resnet(stages=3, width=4), 1), (lambda: mobilenet_v2(width_mult=0.1), 3)])
def test_last_stage_sees_the_modulated_features(make, channels):
    "What enters the last stage is (1+M)·g of what left the stage before, which the block leaves as it was; the map has their resolution."
    net, seen = add_attention(make()).eval(), {}
    net.net.stages[-2].register_forward_hook(lambda m, i, o: seen.update(g=o, before=o.clone()))
    net.net.stages[-1].register_forward_pre_hook(lambda m, i: seen.update(last=i[0].clone()))
    with torch.no_grad(): out = net(torch.rand(2,channels,16,16), attend=True)
    assert torch.equal(seen['g'], seen['before'])
    assert out.attention.shape == (2, 1, *seen['g'].shape[2:]) and 0 <= out.attention.min() and out.attention.max() <= 1
    np.testing.assert_allclose(seen['last'].numpy(), (1 + out.attention.numpy())*seen['before'].numpy(), rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize('train', [True, False])
def test_the_two_calls_agree(net, x, train):
    "`net(x)` is the logits of `net(x, attend=True)`, in both modes, and both count once in batch norm."
    n = net().train(train)
    twin = copy.deepcopy(n)
    assert torch.equal(n(x), twin(x, attend=True).logits)
    assert all(torch.equal(a, b) for a,b in zip(n.state_dict().values(), twin.state_dict().values()))

def grads(net, loss):
    net.zero_grad(set_to_none=True)
    loss.backward()
    return {k: p.grad is not None and bool(p.grad.abs().sum() > 0) for k,p in net.named_parameters()}

def test_logits_teach_the_block_through_the_map(net, x):
    "A loss of the logits reaches planes and map, but not the class scores."
    n = net().train()
    g = grads(n, n(x, attend=True).logits.square().sum())
    assert g['block.planes.0.weight'] and g['block.to_map.0.weight'] and g['net.stem.0.weight'] and g['net.head.2.weight']
    assert not any(v for k,v in g.items() if 'to_scores' in k)

def test_the_map_reaches_block_and_features_only(net, x):
    "A loss of the map (Eq. 3) reaches planes, map and earlier stages, nothing after them."
    n = net().train()
    g = grads(n, n(x, attend=True).attention.square().sum())
    assert g['block.planes.0.weight'] and g['block.to_map.0.weight'] and g['net.stem.0.weight']
    assert not any(v for k,v in g.items() if 'to_scores' in k or k.startswith(('net.stages.1', 'net.head')))

def test_branch_logits_teach_the_planes_only(net, x):
    "A loss of the branch reaches its class scores and planes, not the map's own layers, nor the last stage."
    n = net().train()
    g = grads(n, n(x, attend=True).branch_logits.square().sum())
    assert g['block.to_scores.0.weight'] and g['block.planes.0.weight'] and g['net.stem.0.weight']
    assert not any(v for k,v in g.items() if 'to_map' in k or k.startswith(('net.stages.1', 'net.head')))

def test_branch_logits_are_the_average_of_class_planes():
    "K×1×1 convolution, then the mean over positions, in NumPy."
    block = AttentionBlock(6, 5).eval()
    g = torch.randn(2,6,4,3)
    with torch.no_grad(): (m, s), p = block(g), block.planes(g)
    conv = block.to_scores[0]
    w, b = conv.weight.detach().numpy()[:,:,0,0], conv.bias.detach().numpy()
    np.testing.assert_allclose(s.numpy(), np.einsum('kc,bchw->bk', w, p.numpy())/12 + b, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('depth', [1, 3])
def test_depth_counts_convolutions(depth):
    "`depth` N×3×3 convolutions, then K×1×1."
    convs = [m for m in AttentionBlock(6, 5, depth).planes if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convs] == [(6, (3,3))]*depth + [(5, (1,1))]

@pytest.mark.skipif(torch.cuda.is_available(), reason='here DataParallel would leave the CPU')
def test_behind_data_parallel(net, x):
    "The wrapper keeps attention, logits and the answer to `has_attention`."
    n = net().eval()
    wrapped = nn.DataParallel(n)
    assert has_attention(wrapped) and same(forward_with_attention(wrapped, x), forward_with_attention(n, x)) and torch.equal(wrapped(x), n(x))
    assert not has_attention(nn.DataParallel(n.net)) and forward_with_attention(nn.DataParallel(n.net), x).attention is None

@pytest.mark.parametrize('trip', [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=['deepcopy', 'pickle'])
def test_round_trip(net, x, trip):
    "A copy answers alike, keeps its spec, and shares nothing with the original."
    n = net(); n(x); n.eval()
    twin = trip(n)
    want = forward_with_attention(n, x)
    assert same(forward_with_attention(twin, x), want) and twin.config == n.config and has_attention(twin)
    with torch.no_grad(): [p.zero_() for p in twin.parameters()]
    assert same(forward_with_attention(n, x), want)

def test_from_config_and_state_dict(x, tmp_path):
    "Rebuilt from its config, a network loads the saved weights strictly and answers alike, with settings away from the defaults."
    n = add_attention(small_resnet(width=3, stages=3, classes=7), depth=2)
    n(x); n.eval()
    torch.save(dict(config=n.config, state=n.state_dict()), tmp_path/'n.pt')
    d = torch.load(tmp_path/'n.pt', weights_only=True)
    twin = build(d['config'])
    twin.load_state_dict(d['state'])
    assert isinstance(twin, AttentionNet) and same(forward_with_attention(twin.eval(), x), forward_with_attention(n, x))

def test_channels_last(net):
    "Memory format changes no answer."
    n, x = net(in_channels=3).eval(), torch.rand(4,3,8,8)
    want, got = forward_with_attention(n, x), forward_with_attention(n.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_attend_keeps_the_network_it_is_given(plain, x):
    "Weights already learned stay; the block is new. `look` at a network without a block gives its logits and two times nothing."
    p = plain().eval()
    logits, weights = p(x), copy.deepcopy(p.state_dict())
    assert not has_attention(p) and torch.equal(forward_with_attention(p, x).logits, logits) and forward_with_attention(p, x)[1:] == (None, None)
    n = add_attention(p)
    assert n.net is p and all(torch.equal(v, p.state_dict()[k]) for k,v in weights.items())

def test_bad_input(net, plain, x):
    "Refused with what was wrong."
    for f in (lambda: add_attention(net()), lambda: add_attention(nn.Linear(2, 2)), lambda: add_attention('net'), lambda: add_attention(plain(), depth=0), lambda: net()(x[0]),
              lambda: net()(torch.rand(2,3,8,8)), lambda: net()(torch.rand(2,3,8,8), attend=True)):
        with pytest.raises(AderError): f()


@pytest.mark.parametrize('size', [True, [True, 8], 0, 8., [8], [8, 8, 8], 10**6])
def test_sizes_that_are_none(size):
    with pytest.raises(AderError, match='must be|at most'): InputAdapter(nn.Identity(), 1, size)
