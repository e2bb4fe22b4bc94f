"The images and networks of the package: what they are, their sizes, and that they are what their descriptions say."
import numpy as np, os, pytest, re, torch
from pathlib import Path
from PIL import Image
import ader
from ader.attacks import PGD_sat, Threat
from ader.attention import has_attention
from ader.data import AderError
from ader.samples import sample_images, sample_net

FOLDER = Path(ader.__file__).parent/'sample_data'
HOME = Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()/'data'/'cifar10'

def test_sizes_of_the_files():
    size = lambda *ends: sum(f.stat().st_size for f in FOLDER.iterdir() if f.name.endswith(ends))
    assert size('.zip') < 400e3 and size('.safetensors', '.json') < 4e6
    assert 'Krizhevsky' in (FOLDER/'README.md').read_text()

def test_the_classes_take_turns():
    x, y, classes = sample_images()
    assert x.shape == (200,3,32,32) and x.dtype == torch.float32 and x.min() >= 0 and x.max() == 1
    assert y.view(20, 10).eq(torch.arange(10)).all() and classes[3] == 'cat' and len(classes) == 10
    few, labels, _ = sample_images(7)
    assert torch.equal(few, x[:7]) and torch.equal(labels, y[:7])

@pytest.mark.skipif(not HOME.is_dir(), reason='needs CIFAR-10')
def test_they_are_the_first_of_the_test_set():
    x, y, classes = sample_images()
    for k,c in enumerate(classes):
        files = sorted((HOME/'test'/c).glob('*.jpg'), key=lambda f: int(re.match(r'\d+', f.name)[0]))[:20]
        pixels = torch.stack([torch.tensor(np.asarray(Image.open(f).convert('RGB'))) for f in files])
        assert torch.equal((x[y == k]*255).round().byte(), pixels.permute(0,3,1,2))

@pytest.mark.parametrize('name', ['clean', 'robust', 'student'])
def test_networks(name):
    "They classify, give maps, and say how they were made; the two that are robust are."
    (x, y, classes), net = sample_images(60), sample_net(name)
    d = net.metadata
    assert has_attention(net) and not net.training and d['classes'] == classes and d['made'].endswith('.')
    with torch.no_grad(): clean = (net(x).argmax(1) == y).float().mean()
    assert clean > 0.4 and d['test']['clean'] > 0.5
    under = net(PGD_sat(Threat(8/255), 5)(net, x, y)).argmax(1) == y
    if name == 'clean': assert under.float().mean() < 0.1 and d['test']['PGD_sat'] < 0.05
    else: assert under.float().mean() > 0.1 and d['test']['PGD_sat'] > 0.25

def test_other_names_are_refused():
    with pytest.raises(AderError, match="'clean', 'robust' or 'student', got 'adv'"): sample_net('adv')
