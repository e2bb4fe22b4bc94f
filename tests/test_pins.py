"""Results that must survive a renaming: losses, gradients, attacks, evaluation, training.

Inputs are made by NumPy's RandomState, whose stream is frozen, and weights are set by it too,
layer after layer in the order of `net.modules()`, so that nothing depends on names or on how a
network is first filled. Two networks were trained once and are kept in pins/pin_net.safetensors,
each as one row of numbers. `python tests/test_pins.py` writes pins/pins.json anew; do that only
when a result is meant to change, and say which.
"""
import hashlib, json, math, sys, tempfile
import numpy as np, pytest, torch
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from torch import nn

# ---- names that a redesign may move ----------------------------------------------------------

from fastai.callback.core import Callback
from ader.attacks import (FGSM, PGD, AutoAttack, CW_inf, PGD_sat, PGD_trades, Square, Threat,
                          Transfer)
from ader.attention import add_attention
from ader.data import Images, RandomCrop, dataloaders, digits
from ader.losses import attention_kl, distillation_loss, soft_kl
from ader.methods import make_method, methods
from ader.networks import small_resnet
from ader.weighting import AdaptiveWeight, AnnealedWeight, ConstantWeight

METHODS = [o for o in methods if o not in ('HAT', 'IGDM', 'SAAD')] # newer than the pins

def new_net():
    "The network of all pins, with attention."
    return add_attention(small_resnet(width=8))

def images():
    "Training, validation and test digits, without augmentation, on the CPU."
    return digits(augment=[], device='cpu')

def few_images(dtype):
    "300 training and 100 validation digits of a type, with augmentation."
    sets = [dl.dataset[:n] for dl,n in ((images().train, 300), (images().valid, 100))]
    sets = [Images(x.to(dtype), y, list('0123456789'), 'few digits', 0.2) for x,y in sets]
    return dataloaders(*sets, bs=50, augment=[RandomCrop(1)], device='cpu')

def some_digits(n):
    "The first `n` test digits and their labels."
    return images().test.dataset[:n]

def made(name, settings):
    "A method with its teachers, in single precision whatever the hardware."
    return make_method(name, *teachers_of(settings), precision='float32', **own_settings(settings))

def placed(method, net, threat, epoch=0, epochs=10):
    "The method as it is in the middle of a training of `net`, without a training."
    method.learn = SimpleNamespace(model=net, epoch=epoch, pct_train=epoch/epochs)
    method._first_loss = None
    method.attack = method.training_attack(threat)
    return method

def loss_of(method, x, x_adv, y):
    "What the student minimises."
    return method.loss(x, x_adv, y)

def adversary_of(method, x, y):
    "What the student is attacked with; None without an attack."
    return method.adversary(x, y)

def terms_of(method):
    "What the method recorded, by name, a number a step."
    return {k: [o.item() for o in v] for k,v in method.terms.items()}

def fitted(method, net, data, epochs, **more):
    "The network after training, and its validation accuracies without attack and under PGD-10."
    from ader.teachers import train
    net = train(method, net, data, epochs, seed=0, progress=False, **more).model
    return net, net.metadata['valid']['clean'], net.metadata['valid']['pgd-10']

def accuracies(net, data, n):
    "Accuracy of `net` on `n` test images without attack and under the attacks of the paper."
    from ader.evaluation import evaluate
    table = evaluate(net, data.test, images=n, progress=False, precision='float32')
    return dict(zip(table.attack, table.accuracy))

def by_onnx(net, x):
    "Logits that onnxruntime gives with the exported network."
    from ader.deploy import onnx_session, to_onnx
    onnx = onnx_session(to_onnx(net, image=[1,8,8]))
    return torch.from_numpy(onnx.run(['logits'], {'images': x.numpy()})[0])

# ---- inputs ----------------------------------------------------------------------------------

HERE = Path(__file__).parent/'pins'
JSON, NETS = HERE/'pins.json', HERE/'pin_net.safetensors'
THREAT = Threat(0.2)

def normal(seed, *size):
    "Random numbers of a frozen stream, in double precision."
    return torch.from_numpy(np.random.RandomState(seed).randn(*size))

def pixels(seed, *size):
    "Random pixels between 0 and 1."
    return torch.from_numpy(np.random.RandomState(seed).rand(*size))

@torch.no_grad()
def fill(net, seed):
    "Set all weights and statistics, layer after layer."
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    for i,m in enumerate(layers):
        r = partial(normal, 1000*seed + i)
        if isinstance(m, nn.BatchNorm2d):
            w, b, mean, var = r(4, m.num_features)
            m.weight.copy_(1 + 0.2*w)
            m.bias.copy_(0.2*b)
            m.running_mean.copy_(0.2*mean)
            m.running_var.copy_((0.2*var).exp())
        else:
            fan_in = m.weight[0].numel()
            m.weight.copy_(r(*m.weight.shape)*math.sqrt(2/fan_in))
            if m.bias is not None:
                m.bias.copy_(0.2*normal(1000*seed + 500 + i, len(m.bias)))
    return net

def numbers_of(net):
    "All weights and statistics of a network, in their order and whatever they are called."
    return [v for v in net.state_dict().values() if v.is_floating_point()]

def row(net):
    "All weights and statistics of a network in one row."
    return torch.cat([v.detach().flatten() for v in numbers_of(net)])

@torch.no_grad()
def kept(which):
    "One of the two networks that were trained once, 'clean' or 'robust'."
    from safetensors.torch import load_file
    net, values = new_net(), load_file(NETS)[which]
    wanted = numbers_of(net)
    sizes = [v.numel() for v in wanted]
    assert sum(sizes) == len(values), 'the network has other weights than the kept one'
    for v,o in zip(wanted, values.split(sizes)):
        v.copy_(o.view_as(v))
    return net.eval()

def dummies(dtype=torch.double):
    "Two teachers with weights by formula."
    return [fill(new_net(), seed).to(dtype).eval() for seed in (1, 2)]

def teachers_of(settings):
    "The clean and the robust teacher that a method shall have."
    return settings.get('teachers') or dummies()

def own_settings(settings):
    "What a method is told besides its teachers."
    return {k: v for k,v in settings.items() if k != 'teachers'}

# ---- fingerprints ----------------------------------------------------------------------------

def dot(values, seed=7):
    "The product with a fixed random vector, divided by the root of its length."
    values = values.detach().double().flatten()
    return (values @ normal(seed, len(values))).item()/math.sqrt(len(values))

def print_of(values):
    "Sum, length and product of a row of numbers."
    values = values.detach().double().flatten()
    return [values.sum().item(), values.norm().item(), dot(values)]

def bytes_of(net):
    "A checksum of all weights, bit by bit, whatever they are called."
    h = hashlib.sha256()
    for v in net.state_dict().values():
        h.update(v.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]

# ---- sections --------------------------------------------------------------------------------

def losses():
    "The losses of the paper in double precision, and ω over four steps."
    out = {}
    s, t, y = 2*normal(1, 6, 5), 2*normal(2, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    for direction in ('T||S', 'S||T'):
        for tau in (0.5, 1., 4.):
            out[f'soft_kl {direction} {tau}'] = soft_kl(s, t, tau, direction)
    same, small = [torch.sigmoid(2*normal(i, 6, 1, n, n)) for i,n in ((4, 8), (5, 4))]
    m = torch.sigmoid(2*normal(3, 6, 1, 8, 8))
    for size,other in dict(same=same, smaller=small).items():
        for direction in ('S||T', 'T||S'):
            for how,tau in (('sum', 1.), ('softmax', 1.), ('softmax', 0.3)):
                name = f'{size} {how} {tau} {direction}'
                out[f'attention_kl {name}'] = attention_kl(m, other, how, tau, direction)
                out[f'attention_kl turned {name}'] = attention_kl(other, m, how, tau, direction)
    mixes = (0., 1., 'T||S'), (0.5, 1., 'T||S'), (0.9, 4., 'S||T'), (1., 2., 'T||S')
    for o in mixes:
        out['distillation_loss ' + ' '.join(map(str, o))] = distillation_loss(s, t, y, *o)
    steps = pixels(6, 4, 2) + 0.1
    weights = dict(
        plain=AdaptiveWeight(), beta=AdaptiveWeight(beta=3.), slow=AdaptiveWeight(momentum=0.025),
        both=AdaptiveWeight(2., 0.3), constant=ConstantWeight(0.2), annealed=AnnealedWeight())
    for name,weight in weights.items():
        for i,(a,b) in enumerate(steps):
            out[f'weight {name} {i}'] = weight(a, b, i/4)
    return {k: float(v) for k,v in out.items()}

CASES = [
    ('Natural', {}), ('Natural', dict(branch=0.)),
    ('SAT', {}), ('SAT', dict(branch=0.)),
    ('TRADES', {}), ('TRADES', dict(beta=2.)), ('TRADES', dict(branch=0.)),
    ('MART', {}), ('MART', dict(floor=1e-4)), ('MART', dict(beta=2., branch=0.5)),
    ('ARD', {}), ('ARD', dict(alpha=0.7, temperature=3.)), ('ARD', dict(average='classes')),
    ('IAD', {}), ('IAD', dict(begin=0., beta=0.5)), ('IAD', dict(begin=0., whole=True)),
    ('IAD', dict(begin=0., alpha=0.8, temperature=2.)),
    ('RSLAD', {}), ('RSLAD', dict(alpha=0.5)), ('RSLAD', dict(average='classes')),
    ('AdaAD', {}), ('AdaAD', dict(alpha=0.6)), ('AdaAD', dict(average='classes')),
    ('MTARD', {}), ('MTARD', dict(momentum=0.5, beta=2.)), ('MTARD', dict(average='classes')),
    ('MTARD', dict(momentum=0.5, decay=(0.2, 0.3, 0.9))),
    ('BMTARD', {}), ('BMTARD', dict(rate=0.1)), ('BMTARD', dict(rate=0.5, lowest=2., highest=2.2)),
    ('ADER', {}), ('ADER', dict(attention='none')), ('ADER', dict(attention='clean')),
    ('ADER', dict(attention='robust')), ('ADER', dict(robust_sees='x')),
    ('ADER', dict(climbs='kl')), ('ADER', dict(branch=0.)),
    ('ADER', dict(weight='constant')), ('ADER', dict(weight='slow')),
    ('ADER', dict(temperature=2., direction='S||T')),
    ('ADER', dict(att_normalize='softmax', att_temperature=0.5, att_direction='T||S')),
    ('ADERPlus', {}), ('ADERPlus', dict(balance=False)), ('ADERPlus', dict(robust_sees='x_adv')),
    ('ADERPlus', dict(attention='none', branch=0.)),
    ('ADERPlus', dict(weight='adaptive', climbs='kl'))]
WEIGHTS = dict(
    constant=lambda: ConstantWeight(0.3), adaptive=AdaptiveWeight,
    slow=lambda: AdaptiveWeight(2., 0.3))

NEW = dict(branch='branch_weight', average='reduction', begin='warmup', whole='full_teacher_term',
           lowest='tau_min', highest='tau_max', robust_sees='robust_input', climbs='inner_loss',
           balance='match_confidence')

def settings_of(case):
    "The settings of a case, with objects for the names of weights."
    value = lambda k, v: WEIGHTS[v]() if k == 'weight' else 'mean' if v == 'classes' else v
    return {NEW.get(k, k): value(k, v) for k,v in case.items()}

def title(name, case):
    return ' '.join([name, *(f'{k}={v}' for k,v in case.items())])

def two_steps(name, case):
    "Losses and gradients in two steps of training, on images that are given, in double precision."
    student = fill(new_net(), 3).double().train()
    method, y = made(name, settings_of(case)), torch.arange(12) % 10
    x = pixels(8, 12, 1, 8, 8)
    x_adv = (x + 0.2*(2*pixels(9, 12, 1, 8, 8) - 1)).clamp(0, 1)
    steps = []
    for epoch in (0, 4):
        placed(method, student, THREAT, epoch)
        loss = loss_of(method, x, x_adv, y)
        parts = list(student.parameters())
        found = torch.autograd.grad(loss, parts, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for p,g in zip(parts, found)]
        steps.append([loss.item(), *print_of(torch.cat([g.flatten() for g in grads]))])
        with torch.no_grad():
            for p,g in zip(parts, grads):
                p.sub_(0.05*g)
    return dict(steps=steps, terms=terms_of(method))

def method_losses():
    "Every method with its defaults and with other settings."
    return {title(*o): two_steps(*o) for o in CASES}

CLIMBS = [(o, {}) for o in METHODS] + [('ADER', dict(climbs='kl')), ('ADERPlus', dict(climbs='kl'))]

def adversaries():
    "The images that each method trains on, from a fixed random state, in single precision."
    out, (x, y) = {}, some_digits(16)
    for name,case in CLIMBS:
        nets = [kept('clean'), kept('robust')]
        settings = dict(settings_of(case), teachers=nets, steps=3, step_size=0.05)
        method = placed(made(name, settings), fill(new_net(), 3).train(), THREAT)
        torch.manual_seed(0)
        z = adversary_of(method, x, y)
        out[title(name, case)] = None if z is None else [z.double().sum().item(), dot(z - x)]
    return out

def attacks():
    "The sum of each image after each attack on the robust network."
    net, other, (x, y) = kept('robust'), kept('clean'), some_digits(16)
    with torch.no_grad():
        z = net(x)
    two = Threat(1., '2')
    calls = {
        'FGSM': (FGSM(THREAT), x, y), 'PGD_sat': (PGD_sat(THREAT), x, y),
        'PGD_trades': (PGD_trades(THREAT), x, y), 'CW_inf': (CW_inf(THREAT), x, y),
        'restarts': (PGD(THREAT, 5, restarts=2), x, y), 'kl': (PGD(THREAT, 10, loss='kl'), x, z),
        'from the image': (PGD(THREAT, 10, 0.03, 'image'), x, y), 'L2': (PGD(two, 10), x, y),
        'at half': (PGD(THREAT, 5).with_eps(0.1), x, y), 'FGSM L2': (FGSM(two), x, y),
        'hunt PGD_sat': (partial(PGD_sat(THREAT).until_fooled, bs=8), x, y),
        'hunt CW_inf': (partial(CW_inf(THREAT).until_fooled, bs=8), x, y),
        'hunt L2': (PGD(two, 10, restarts=2).until_fooled, x, y), 'Square': (Square(THREAT, 100), x, y),
        'Square L2': (Square(two, 100), x, y), 'AutoAttack': (AutoAttack(THREAT), x[:6], y[:6]),
        'Transfer': (Transfer(other, PGD_sat(THREAT)), x, y)}
    found = {k: f(net, a, b, torch.Generator().manual_seed(0)) for k,(f,a,b) in calls.items()}
    return {k: o.double().flatten(1).sum(1).tolist() for k,o in found.items()}

def evaluation():
    "Accuracies of the two kept networks."
    return {k: accuracies(kept(k), images(), 200) for k in ('clean', 'robust')}

TRAINED = 'SAT', 'TRADES', 'ADER', 'ADERPlus'

@lru_cache
def runs():
    "An epoch of training by each of four methods, with the augmentation of the digits."
    out = {}
    for name in TRAINED:
        method = made(name, dict(teachers=[kept('clean'), kept('robust')], steps=3, step_size=0.05))
        out[name] = fitted(method, fill(new_net(), 3), digits(device='cpu'), 1)
    return out

def trained_weights():
    "Sum, length and product of all weights after an epoch."
    return {k: print_of(row(net)) for k,(net,*_) in runs().items()}

def trained_accuracies():
    "Validation accuracies after an epoch, without attack and under PGD-10."
    return {k: o for k,(_,*o) in runs().items()}

def trained_bytes():
    "Checksums of the weights after an epoch."
    return {k: bytes_of(net) for k,(net,*_) in runs().items()}

class Smooth(Callback):
    "Lets the smoothed loss of fastai be in double precision."
    order = 60 # after the `Recorder`
    def before_fit(self):
        smooth = self.recorder.smooth_loss
        smooth.val = smooth.val.double()

def trained_in_double():
    "Weights after an epoch on a few digits in double precision, where rounding decides nothing."
    out = {}
    for name in TRAINED:
        teachers = [kept(o).double() for o in ('clean', 'robust')]
        method = made(name, dict(teachers=teachers, steps=3, step_size=0.05))
        student, data = fill(new_net(), 3).double(), few_images(torch.double)
        net, *found = fitted(method, student, data, 1, cbs=Smooth())
        out[name] = print_of(row(net)) + found
    return out

EXACT = 0., 0.
SECTIONS = { # function, and the relative and absolute difference that is allowed
    'losses': (losses, (1e-9, 1e-12)),
    'method_losses': (method_losses, (1e-9, 1e-10)),
    'adversaries': (adversaries, (1e-5, 1e-6)),
    'attacks': (attacks, (1e-5, 1e-6)),
    'evaluation': (evaluation, EXACT),
    'trained_weights': (trained_weights, (1e-4, 1e-5)),
    'trained_accuracies': (trained_accuracies, EXACT),
    'trained_bytes': (trained_bytes, EXACT),
    'trained_in_double': (trained_in_double, (1e-7, 1e-8))}

# In single precision a training goes elsewhere when another CPU, or another torch, rounds
# otherwise: one sign of a gradient decides a pixel, and an image of 27 is 0.037. There these are
# allowed; None: no comparison.
ELSEWHERE = dict(trained_weights=(0.02, 0.05), trained_accuracies=(0., 0.04), trained_bytes=None)

# ---- comparison ------------------------------------------------------------------------------

def machine():
    "What bits depend on."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    find = lambda name: next((o.split(':')[1].strip() for o in lines if o.startswith(name)), '')
    flags = hashlib.sha256(find('flags').encode()).hexdigest()[:8]
    kernels = torch.backends.cpu.get_cpu_capability()
    return dict(torch=torch.__version__, cpu=find('model name'), flags=flags, kernels=kernels)

def rounded(o):
    "The same with floats of 12 significant digits."
    if isinstance(o, dict):
        return {k: rounded(v) for k,v in o.items()}
    if isinstance(o, (list, tuple)):
        return [rounded(v) for v in o]
    return float(f'{o:.12g}') if isinstance(o, float) else o

def differences(now, then, rel, least, at=''):
    "Where two nested results differ by more than is allowed, a line each."
    if isinstance(then, dict) and isinstance(now, dict):
        if now.keys() != then.keys():
            return [f'{at}: now {sorted(now)}, then {sorted(then)}']
        return [o for k in then for o in differences(now[k], then[k], rel, least, f'{at}/{k}')]
    if isinstance(then, list) and isinstance(now, list):
        if len(now) != len(then):
            return [f'{at}: now {len(now)} values, then {len(then)}']
        pairs = enumerate(zip(now, then))
        return [o for i,(a,b) in pairs for o in differences(a, b, rel, least, f'{at}/{i}')]
    numbers = isinstance(now, (int, float)) and isinstance(then, (int, float))
    if numbers and math.isclose(now, then, rel_tol=rel, abs_tol=least):
        return []
    return [] if now == then else [f'{at}: now {now}, then {then}']

def pins_of():
    "All results, by section."
    torch.set_num_threads(1)
    return dict(machine=machine(), **{k: rounded(f()) for k,(f,_) in SECTIONS.items()})

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def pins():
    return json.loads(JSON.read_text())

@pytest.mark.parametrize('section', SECTIONS)
def test_pins(section, pins):
    "The results are those of before."
    f, allowed = SECTIONS[section]
    if machine() != pins['machine']:
        allowed = ELSEWHERE.get(section, allowed)
    if allowed is None:
        pytest.skip('bits are compared where they were made: the same CPU, the same torch')
    found = differences(rounded(f()), pins[section], *allowed)
    assert not found, f'{len(found)} results changed:\n' + '\n'.join(found[:20])

def test_every_method_is_pinned():
    "No method is left out, none is gone."
    assert {name for name,_ in CASES} == {name for name,_ in CLIMBS} == set(METHODS)

class Killed(Exception): pass

class Kill(Callback):
    "Ends a training after its first epoch, when the checkpoint is written."
    order = 90
    def after_epoch(self):
        raise Killed('after the first epoch')

def test_resumed_training():
    "A training that was killed after its first epoch and then continued ends with the same bits."
    def run(**more):
        method = made('ADER', dict(teachers=[kept('clean'), kept('robust')], steps=1))
        return fitted(method, fill(new_net(), 3), few_images(torch.float), 2, **more)[0]
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(Killed):
            run(resume=f'{folder}/x', cbs=Kill())
        assert bytes_of(run(resume=f'{folder}/x')) == bytes_of(run())

@pytest.mark.filterwarnings('ignore')
def test_onnx():
    "The exported network answers as the network does."
    for name in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(name)
    net, (x, _) = kept('robust'), some_digits(4)
    with torch.no_grad():
        want = net(x)
    assert (by_onnx(net, x) - want).abs().max() < 1e-4

# ---- writing anew ----------------------------------------------------------------------------

def train_nets():
    "Train the two kept networks for 15 epochs, one ordinarily and one by SAT."
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    rows = {}
    for which,name,settings in (('clean', 'Natural', {}), ('robust', 'SAT', dict(steps=5))):
        method = made(name, settings)
        net, *found = fitted(method, fill(new_net(), 10 + len(rows)), digits(device='cpu'), 15)
        print(which, 'validation accuracies', found)
        rows[which] = row(net)
    save_file(rows, NETS)

def write():
    "Write the numbers of the code as it is; the two kept networks stay unless they are missing."
    if not NETS.exists():
        train_nets()
    text = json.dumps(pins_of(), indent=0, ensure_ascii=False)
    JSON.write_text(text.replace('\n', ' ').replace('}, "', '},\n"') + '\n', encoding='utf-8')
    print(f'{JSON}: {JSON.stat().st_size:,} bytes')

if __name__ == '__main__':
    sys.exit(write())
