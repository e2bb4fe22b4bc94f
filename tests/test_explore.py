"Pictures of an attack on one image, with and without somebody to pull the sliders."
import pytest, torch
from ader.data import AderError
from ader.explore import attack_strip, attack_view, explore, live

@pytest.mark.parametrize('norm', ['inf', '2'])
def test_a_view_stays_in_the_ball_and_leaves_the_network(net, norm):
    n = net().train()
    before = {k: v.clone() for k,v in n.state_dict().items()}
    v = attack_view(n, torch.rand(1,8,8), 3, 0.3, norm=norm)
    size = v.added.abs().max() if norm == 'inf' else v.added.norm()
    assert 0 < size <= 0.3 + 1e-5 and 0 <= v.x.min() and v.x.max() <= 1
    assert v.p.sum().item() == pytest.approx(1, abs=1e-5) and n.training
    assert all(torch.equal(o, before[k]) for k,o in n.state_dict().items())

def test_bytes_and_colour(plain):
    v = attack_view(plain(in_channels=3, classes=2), torch.randint(0, 256, (3,8,8), dtype=torch.uint8), 1, 0.1)
    assert v.x.dtype == torch.float32 and v.attention is None and len(v.p) == 2

def test_where_nobody_can_pull_there_is_a_strip(net):
    assert not live()
    assert len(explore(net(), torch.rand(1,8,8), 3).axes) == 18

def test_somebody_can_pull(net, monkeypatch):
    w = pytest.importorskip('ipywidgets')
    monkeypatch.setattr('ader.explore.live', lambda: True)
    box = explore(net(), torch.rand(1,8,8), 3, eps=0.2)
    (e, s), im = box.children[0].children, box.children[1]
    before = im.value
    e.value = 0.2
    assert im.value[:4] == b'\x89PNG' and im.value != before

def test_one_image_is_looked_at(net):
    with pytest.raises(AderError, match='one image'): explore(net(), torch.rand(2,1,8,8), 3)
