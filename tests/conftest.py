"What all tests share: fixed seeds, small data, small networks."
import matplotlib
matplotlib.use('Agg')
import pytest, shutil, torch
from hypothesis import HealthCheck, Phase, settings
from ader.attention import add_attention
from ader.data import Images, dataloaders, digits
from ader.networks import small_resnet
from ader.teachers import teach

settings.register_profile('ader', deadline=None, max_examples=12, derandomize=True, database=None,
                          phases=[Phase.explicit, Phase.generate, Phase.shrink],
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile('ader')

torch.set_num_threads(1) # such small networks are slower with more

@pytest.fixture(autouse=True)
def seed():
    "Every test starts from the same global random state."
    torch.manual_seed(0)

@pytest.fixture(scope='session')
def all_digits():
    "The digits, on the CPU; not to be changed."
    return digits(augment=[], device='cpu')

@pytest.fixture(scope='session')
def few_digits():
    "A function as `digits`, on the CPU, of 200 training, 60 validation and 100 test images."
    def make(**kwargs):
        dls = digits(**kwargs | dict(device='cpu'))
        for dl,n in zip(dls.loaders, (200, 60, 100)):
            (dl.dataset.x, dl.dataset.y), dl.n = dl.dataset[:n], n
        return dls
    return make

@pytest.fixture
def small(all_digits):
    "A function that makes loaders of a few digits: `small(train=60, valid=40, bs=20, dtype=torch.float32)`."
    def make(train=60, valid=40, bs=20, dtype=torch.float32, eps=0.2):
        (x, y), (xv, yv) = all_digits.train.dataset[:train], all_digits.valid.dataset[:valid]
        sets = [Images(a.to(dtype), b, list('0123456789'), 'few digits', eps) for a,b in ((x, y), (xv, yv))]
        return dataloaders(*sets, bs=bs, device='cpu')
    return make

@pytest.fixture(scope='session')
def natural(all_digits):
    "A small network that reads digits and withstands no attack; not to be changed."
    torch.manual_seed(0)
    return teach('natural', small_resnet(width=8), all_digits, epochs=4, progress=False)

@pytest.fixture
def net():
    "A function that makes a network with attention small enough to train in a test."
    return lambda **kwargs: add_attention(small_resnet(width=4, **kwargs))

@pytest.fixture
def plain():
    "The same without attention."
    return lambda **kwargs: small_resnet(width=4, **kwargs)

@pytest.fixture(scope='session')
def browser():
    "Chromium or Chrome of this machine."
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not exe: pytest.skip('no Chromium on the PATH')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--no-sandbox', '--disable-gpu'])
        yield b
        b.close()
