"An attack on one image, as a strip of pictures and with sliders."
import pytest, torch
from ader.data import AderError
from ader.explore import attack_strip, explore, _attack_view, _is_interactive

@pytest.mark.parametrize('norm', ['Linf', 'L2'])
def test_the_attack_stays_in_the_ball_and_leaves_the_network(net, norm):
    n, x = net().train(), torch.rand(1,8,8)
    before = {k: v.clone() for k,v in n.state_dict().items()}
    out, z = _attack_view(n, x, 3, 0.3, 10, norm)
    size = (z - x).abs().max() if norm == 'Linf' else (z - x).norm()
    assert 0 < size <= 0.3 + 1e-5 and 0 <= z.min() and z.max() <= 1 and n.training
    assert out.attention is not None
    assert all(torch.equal(o, before[k]) for k,o in n.state_dict().items())

def test_bytes_and_colour_without_attention(plain):
    x = torch.randint(0, 256, (3,8,8), dtype=torch.uint8)
    assert len(attack_strip(plain(in_channels=3, classes=2), x, 1, eps=[0, 0.1]).axes) == 4

def test_a_strip_where_there_is_nobody_to_move_sliders(net):
    assert not _is_interactive()
    assert len(explore(net(), torch.rand(1,8,8), 3).axes) == 18

def test_sliders(net, monkeypatch):
    w = pytest.importorskip('ipywidgets')
    seen = []
    monkeypatch.setattr('ader.explore._is_interactive', lambda: True)
    monkeypatch.setattr('ader.explore.attack_strip', lambda net, x, y, ε, n, *rest: seen.append((ε, n)))
    monkeypatch.setattr(w, 'interact', lambda f, **sliders: f(**{k: o.max for k,o in sliders.items()}))
    explore(net(), torch.rand(1,8,8), 3, eps=0.2, steps=30)
    assert seen == [(0.2, 30)]

def test_one_image_is_needed(net):
    with pytest.raises(AderError, match='one image'): explore(net(), torch.rand(2,1,8,8), 3)

def test_settings_of_different_length(net):
    with pytest.raises(ValueError): attack_strip(net(), torch.rand(1,8,8), 3, eps=[0, 0.1], steps=[1, 2, 3])

def test_nothing_added_is_drawn_white(net):
    "Where the slider begins, at ε = 0, and the maps keep one scale a row."
    fig = attack_strip(net(), torch.rand(1,8,8), 3, eps=0)
    added = fig.axes[1].images[-1]
    assert added.norm(0.) == 0.5 and min(added.cmap(0.5)[:3]) > 0.95
