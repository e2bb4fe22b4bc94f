"The same attack by ader, by foolbox and by the Adversarial Robustness Toolbox, on the same network and the same 500 digits."
import numpy as np, pytest, torch
from torch.nn import functional as F
from ader.networks import small_resnet
from ader.attacks import FGSM, PGD, Threat, _length

THREATS = Threat(0.1), Threat(0.5, 'L2')
STEPS = 20
POINTS = 0.006 # of accuracy: 3 of 500 digits
SEEDS = range(3) # of random starts; a single one moves the accuracy by half a point itself

@pytest.fixture(scope='module')
def trained(all_digits):
    "A small network hardened a little, so that many digits withstand and many don't, with the 500 test digits and their labels."
    torch.manual_seed(0)
    net, (x, y) = small_resnet(width=8), all_digits.train.dataset[:]
    opt = torch.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(12):
        for i in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(net(PGD(Threat(0.15), 3, 0.075)(net, x[i], y[i])), y[i])
            opt.zero_grad(); loss.backward(); opt.step()
    x, y = all_digits.test.dataset[:]
    assert len(x) == 500
    return net.eval().requires_grad_(False), x, y

def accuracy(net, x, y):
    with torch.no_grad(): return (net(x).argmax(1) == y).float().mean().item()

# Each of the three makes adversarial images: `f(net, x, y, threat, step_size, seed)`. Without a step size it is FGSM, without a seed there is no random start.

def ours(net, x, y, t, step_size, seed):
    attack = PGD(t, STEPS, step_size, 'image' if seed is None else 'uniform') if step_size else FGSM(t)
    return attack(net, x, y, torch.Generator().manual_seed(seed or 0))

def foolbox(net, x, y, t, step_size, seed):
    fb = pytest.importorskip('foolbox')
    fast, pgd = dict(Linf=(fb.attacks.LinfFastGradientAttack, fb.attacks.LinfPGD)).get(t.norm, (fb.attacks.L2FastGradientAttack, fb.attacks.L2PGD))
    attack = pgd(abs_stepsize=step_size, steps=STEPS, random_start=seed is not None) if step_size else fast()
    torch.manual_seed(seed or 0)
    return attack(fb.PyTorchModel(net, bounds=(0, 1), device='cpu'), x, y, epsilons=t.eps)[1]

def art(net, x, y, t, step_size, seed):
    pytest.importorskip('art')
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier
    c = PyTorchClassifier(net, torch.nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type='cpu')
    about = dict(norm=np.inf if t.norm == 'Linf' else 2, eps=t.eps, batch_size=len(x))
    if step_size: attack = ProjectedGradientDescentPyTorch(c, eps_step=step_size, max_iter=STEPS, num_random_init=int(seed is not None), verbose=False, **about)
    else: attack = FastGradientMethod(c, **about)
    np.random.seed(seed or 0)
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))

pytestmark = pytest.mark.filterwarnings('ignore') # of the two libraries
both = pytest.mark.parametrize('other', [foolbox, art], ids=lambda f: f.__name__)
norms = pytest.mark.parametrize('threat', THREATS, ids=lambda t: t.norm)

@both
@norms
@pytest.mark.parametrize('share', [None, 0.25], ids=['FGSM', 'PGD'])
def test_same_images_without_a_random_start(trained, other, threat, share):
    """Robust accuracy within 0.6 points and, where the steps are the same ones, the same images. (After a step within L2, ours and foolbox first come back into
    the ball and then into the range, the toolbox the other way round.)"""
    net, x, y = trained
    a, b = (f(net, x, y, threat, share and share*threat.eps, None) for f in (ours, other))
    d = b - x
    assert (d.abs().amax() if threat.norm == 'Linf' else _length(d).amax()) <= threat.eps + 1e-5
    assert 0.05 < accuracy(net, a, y) < accuracy(net, x, y) - 0.05, 'a comparison at the ends of the scale would show nothing'
    assert abs(accuracy(net, a, y) - accuracy(net, b, y)) <= POINTS + 1e-9
    if not (other is art and threat.norm == 'L2' and share): assert ((a - b).abs() < 1e-3).float().mean() > 0.99

@norms
def test_same_accuracy_from_random_starts(trained, threat):
    "PGD from random points of the ball, each library's own: on average the robust accuracies are within 0.6 points."
    net, x, y = trained
    a, b = (np.mean([accuracy(net, f(net, x, y, threat, threat.eps/4, seed), y) for seed in SEEDS]) for f in (ours, foolbox))
    assert 0.05 < a < accuracy(net, x, y) - 0.05 and abs(a - b) <= POINTS + 1e-9
