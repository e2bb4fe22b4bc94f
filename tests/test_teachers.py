"Saved networks: what comes back is what went in, and nothing else gets through."
import json, os
import pytest, torch
from hypothesis import given, strategies as st
from torch import nn
from ader.attention import attend
from ader.data import AderError, digits
from ader.methods import Natural, SAT
from ader.networks import mobilenet_v2, resnet18, small_resnet
from ader.teachers import load, save, teach, train, write_whole


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A small network in files, and the bytes of both."
    path = tmp_path_factory.mktemp('saved')/'net'
    save(attend(small_resnet(width=4)), path)
    return path, path.with_suffix('.safetensors').read_bytes(), path.with_suffix('.json').read_bytes()


@pytest.mark.parametrize('make', [small_resnet, lambda: small_resnet(2, 8, 3, 5, 3, mean=[.1,.2,.3], std=[.4,.5,.6]),
                                  lambda: mobilenet_v2(1, 3), lambda: resnet18(classes=100)])
@pytest.mark.parametrize('wrap', [lambda n: n, attend])
def test_round_trip(make, wrap, tmp_path):
    net = wrap(make()).eval()
    save(net, tmp_path/'a.b'/'net.safetensors', note='ε')
    twin = load(tmp_path/'a.b'/'net.json')
    x = torch.rand(2, net.in_channels, 32, 32)
    with torch.no_grad(): assert torch.equal(net(x), twin(x))
    assert twin.card == {'note': 'ε'} and not twin.training


def test_a_dot_in_the_name_is_not_a_suffix(tmp_path):
    save(small_resnet(), tmp_path/'eps0.2')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['eps0.2.json', 'eps0.2.safetensors']
    load(tmp_path/'eps0.2')


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(saved, cut):
    path, weights, _ = saved
    path.with_suffix('.safetensors').write_bytes(weights[:int(cut*len(weights))])
    with pytest.raises(AderError, match='damaged'): load(path)
    path.with_suffix('.safetensors').write_bytes(weights)


@given(at=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_is_refused(saved, at):
    path, weights, _ = saved
    bad = bytearray(weights)
    bad[int(at*len(bad))] ^= 1
    path.with_suffix('.safetensors').write_bytes(bytes(bad))
    with pytest.raises(AderError, match='damaged'): load(path)
    path.with_suffix('.safetensors').write_bytes(weights)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=8),
                    lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(max_size=8), s, max_size=3), max_leaves=8)

@given(d=JSON)
def test_any_other_json_is_refused(saved, d):
    path, _, about = saved
    path.with_suffix('.json').write_text(json.dumps(d))
    with pytest.raises(AderError): load(path)
    path.with_suffix('.json').write_bytes(about)


@given(key=st.sampled_from(['arch', 'blocks', 'width', 'in_channels', 'classes', 'stages', 'mean', 'std', 'other']), value=JSON)
def test_any_other_spec_is_refused_or_fits(saved, key, value):
    path, _, about = saved
    d = json.loads(about)
    d['spec']['net'][key] = value
    path.with_suffix('.json').write_text(json.dumps(d))
    try: assert load(path)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    except AderError: pass
    finally: path.with_suffix('.json').write_bytes(about)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    f = tmp_path/'f'
    write_whole(f, b'whole')
    def full(*_): raise OSError(28, 'No space left on device')
    for broken in ('fsync', 'replace'):
        with monkeypatch.context() as m:
            m.setattr(os, broken, full)
            with pytest.raises(AderError, match='No space left'): write_whole(f, b'new')
        assert f.read_bytes() == b'whole' and [o.name for o in tmp_path.iterdir()] == ['f']


def test_unserialisable_facts_do_not_touch_what_is_there(tmp_path):
    save(small_resnet(), tmp_path/'net')
    before = {o.name: o.read_bytes() for o in tmp_path.iterdir()}
    with pytest.raises(TypeError): save(small_resnet(), tmp_path/'net', fact=object())
    assert {o.name: o.read_bytes() for o in tmp_path.iterdir()} == before


def test_teach_keeps_attention_it_is_given():
    net = attend(small_resnet(), depth=2)
    assert teach('natural', net, digits(), epochs=1, progress=False) is net


def test_the_seed_fixes_everything_but_the_first_weights():
    def once(seed, disturb):
        torch.manual_seed(0)
        net = attend(small_resnet(width=4))
        torch.rand(disturb)
        return train(SAT(steps=2), net, digits(seed=seed), 1, seed=seed, progress=False).model.state_dict()
    a, b, c = once(1, 0), once(1, 9), once(2, 0)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize('kw, what', [(dict(epochs=0), '1 epoch'), (dict(lr=0), 'learning rate'), (dict(lr=float('nan')), 'learning rate')])
def test_bad_settings(kw, what):
    with pytest.raises(AderError, match=what): train(Natural(), small_resnet(), digits(), progress=False, **kw)


def test_only_networks_with_a_spec_are_saved(tmp_path):
    with pytest.raises(AderError, match='no spec'): save(nn.Linear(2, 2), tmp_path/'x')
    assert not list(tmp_path.iterdir())
