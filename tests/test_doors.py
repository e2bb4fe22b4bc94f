"Every door takes what users of fastai, torch and torchvision have, and refuses the rest in one sentence."
import numpy as np, pytest, torch, warnings
from fastai.callback.hook import *
from fastai.callback.mixup import CutMix, MixUp
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import * # ways to plot
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from ader.all import *
from ader.attention import AttentionOutput
from ader.checkpoints import _checksum
from ader.networks import net_from_text
from ader.speed import FrozenCopy, _conv_bn_pairs

T, ce, quiet = Threat(0.2), nn.CrossEntropyLoss(), dict(progress=False)

@pytest.fixture(scope='module')
def d(few_digits): return few_digits()

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Noise, brighter in the second class."
    root, rng = tmp_path_factory.mktemp('ab'), np.random.default_rng(0)
    for k,c in enumerate('ab'):
        (root/c).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 128, (32, 32, 3)) + 100*k
            Image.fromarray(pixels.astype(np.uint8)).save(root/c/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def fa(folder):
    return ImageDataLoaders.from_folder(folder, valid_pct=0.25, seed=0, bs=10, num_workers=0)

def fit(dls, cbs, net=None, epochs=1, **kw):
    learn = Learner(dls, net or small_resnet(width=4), cbs=cbs, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn

def colour(classes=2): return small_resnet(width=4, in_channels=3, classes=classes)

def plain(d, x=lambda x: x, y=lambda y: y, valid=None):
    "torch's loaders of a few digits."
    dl = lambda o, f: DataLoader(TensorDataset(f(o.dataset.x[:100]), y(o.dataset.y[:100])), 50)
    return DataLoaders(dl(d.train, x), dl(d.valid, valid or x))

def refused(match): return pytest.raises(AderError, match=match)

# --- what a network may return

class Wrapped(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.net, self.f = small_resnet(width=4), f
    def forward(self, x): return self.f(self.net(x))

OUTPUTS = dict(tuple=(lambda z: (z, 0), 'tuple'), dict=(lambda z: dict(out=z), 'dict'),
               spatial=(lambda z: z[:,:,None,None], r'\(2, 10, 1, 1\)'),
               one=(lambda z: z[:,:1], 'two classes need two logits'),
               probabilities=(lambda z: z.softmax(1), 'leave its last softmax out'),
               nan=(lambda z: z*float('nan'), 'NaN'), five=(lambda z: z[:,:5], '5 outputs|5 classes'),
               twelve=(lambda z: torch.cat([z, z[:,:2]], 1), '12'))

DOORS = dict(
    fit=lambda d, net: fit(d, SAT(steps=1), net), teacher=lambda d, net: fit(d, RSLAD(net, steps=1)),
    evaluate=lambda d, net: evaluate(net, d.test, [FGSM(T)], images=20, **quiet),
    report=lambda d, net: robustness_report(net, d.test, images=20, **quiet),
    check_teacher=lambda d, net: check_teacher(net, d.test, images=20, **quiet),
    show=lambda d, net: show_attacked(net, d.test, n=2),
    attach=lambda d, net: attach_attention(net, d, layer='net.stages.0'))

@pytest.mark.parametrize('door', DOORS)
@pytest.mark.parametrize('output', OUTPUTS)
def test_what_is_no_logits_is_refused(d, output, door):
    f, match = OUTPUTS[output]
    if door == 'show' and output in ('five', 'twelve'): pytest.skip('pictures need no names')
    with refused(match): DOORS[door](d, Wrapped(f).eval())

@pytest.mark.parametrize('attack', [FGSM(T), AutoAttack(T), Square(T, 10)], ids=repr)
@pytest.mark.parametrize('output', ['tuple', 'spatial', 'one', 'probabilities', 'nan'])
def test_attacks_refuse_it_too(d, output, attack):
    f, match = OUTPUTS[output]
    with refused(match): attack(Wrapped(f).eval(), *d.test.dataset[:4])

def test_log_probabilities_are_logits(d):
    net = Wrapped(lambda z: z.log_softmax(1)).eval()
    assert len(evaluate(net, d.test, [FGSM(T)], images=20, **quiet)) == 2

# --- the results of attacks and adversaries

@pytest.mark.parametrize('f,match', [
    (lambda m, x, y, g: x + 0.5, 'moved an image'), (lambda m, x, y, g: x[:1], 'made'),
    (lambda m, x, y, g: x*float('nan'), 'moved an image')])
def test_an_attack_that_cheats(d, f, match):
    class Cheat:
        threat = T
        def __call__(self, *a): return f(*a)
    with refused(match): evaluate(small_resnet(), d.test, [Cheat()], images=20, **quiet)

def test_an_adversary_outside_the_pixels(d):
    class Wild(SAT):
        def adversary(self, x, y): return x + 2
    with refused('must lie in'): fit(d, Wild())

# --- loaders of others

def test_fastai_batches_in_attacks(fa):
    x, y = fa.one_batch()
    for a in (FGSM(), PGD(steps=2), AutoAttack(Threat(0.5))): # which few images withstand
        x_adv = a(colour().eval(), x[:2], y[:2])
        assert type(x_adv) is torch.Tensor and (x_adv - x[:2]).abs().max() <= a.threat.eps + 1e-6

def test_fastai_loaders_everywhere(fa, folder):
    net = train(SAT(steps=1), colour(), fa, 1, **quiet).model
    assert net.metadata['classes'] == ['a', 'b'] and net.metadata['image'] == [3, 32, 32]
    r = robustness_report(net, fa.valid, [FGSM()], checks=0, **quiet)
    assert r.classes == ['a', 'b'] and len(r.y) == 10
    assert len(check_teacher(net, fa.valid, **quiet).scores) == 4
    show_attacked(net, fa.valid, n=2)
    assert attach_attention(net, fa)(fa.one_batch()[0], attend=True).attention is not None
    learn = fit(fa, SAT(steps=1), colour())
    assert learn.predict(folder/'a'/'0.png')[0] in 'ab'

@pytest.mark.parametrize('kind', ['torch', 'index', 'pair', 'numpy', 'images', 'dataset', 'bytes'])
def test_evaluate_takes_any_data(d, kind):
    net, (x, y) = small_resnet().eval(), d.test.dataset[:60]
    data = dict(
        torch=lambda: DataLoader(TensorDataset(x, y), 25), pair=lambda: (x, y),
        index=lambda: DataLoader([(a, int(b), i) for i,(a,b) in enumerate(zip(x, y))], 25),
        numpy=lambda: (x.numpy(), y.numpy()), dataset=lambda: TensorDataset(x, y),
        images=lambda: d.test.dataset, bytes=lambda: ((x*255).to(torch.uint8), y))[kind]()
    got = evaluate(net, data, [FGSM(T)], images=60, **quiet)
    want = evaluate(net, d.test, [FGSM(T)], images=60, **quiet)
    assert got.accuracy.iloc[0] == pytest.approx(want.accuracy.iloc[0], abs=0.02)
    assert got.images.tolist() == [60, 60]
    check_teacher(net, data, T, images=10, **quiet)

def test_a_data_set_of_torchvision(folder):
    t = evaluate(colour(), ImageFolder(folder, transforms.ToTensor()), [FGSM()], **quiet)
    assert t.images.tolist() == [40, 40]
    with refused('ToTensor'): evaluate(colour(), ImageFolder(folder), [FGSM()], **quiet)
    with refused('2 outputs and the data'):
        evaluate(small_resnet(classes=2), digits().test, [FGSM()], **quiet)

def test_training_keeps_the_finished_network(d):
    "Loaders that know neither name nor classes."
    net = train(SAT(threat=T, steps=1), small_resnet(width=4), plain(d), 1, **quiet).model
    assert net.metadata['image'] == [1, 8, 8] and net.metadata['classes'] is None

def test_a_learner_of_ones_own_knows_its_data(d, tmp_path):
    learn = fit(d, Natural(), add_attention(small_resnet(width=4)))
    save(learn.model, tmp_path/'student')
    m = load(tmp_path/'student').metadata
    assert (m['method'], m['data'], m['image']) == ('Natural', 'digits', [1, 8, 8])
    assert m['classes'] == list('0123456789')

# --- images and labels

@pytest.mark.parametrize('y', [lambda y: y[:,None], lambda y: F.one_hot(y, 10).float(), lambda y: y + 1])
def test_labels_that_are_none(d, y):
    with refused('label'): fit(plain(d, y=y), SAT(steps=1, threat=T), loss_func=ce)

def test_images_that_are_none(d):
    "Only the training images are wrong; the first batch is refused."
    for f in (lambda x: (x - 0.3)/0.35, lambda x: x*2 - 1, lambda x: x.masked_fill(x > 0.9, torch.nan)):
        with refused('must lie in'):
            fit(plain(d, f, valid=lambda x: x), SAT(steps=1, threat=T), loss_func=ce)

def test_other_forms_of_the_same():
    assert Threat('8/255') == Threat(8/255)
    assert len(Images(torch.zeros(2,1,8,8), np.arange(2), ['a', 'b'])) == 2

# --- who owns the loss

@pytest.mark.parametrize('cbs', [lambda: [SAT(steps=1), MixUp(1.)], lambda: [SAT(steps=1), CutMix(1.)],
                                 lambda: [SAT(steps=1), TRADES(steps=1)]])
def test_two_owners_of_the_loss(d, cbs):
    with refused('both own the loss'): fit(d, cbs(), loss_func=CrossEntropyLossFlat())

def weights_after(dls, method, f):
    torch.manual_seed(0)
    return _checksum(fit(dls, method, small_resnet(width=4), loss_func=f).model)

WEIGHTED = [nn.CrossEntropyLoss(weight=torch.tensor([1000.] + [1e-3]*9)),
            nn.CrossEntropyLoss(label_smoothing=0.3), LabelSmoothingCrossEntropy(0.3),
            CrossEntropyLossFlat(weight=torch.tensor([1000.] + [1e-3]*9))]

@pytest.mark.parametrize('make', [Natural, lambda: SAT(steps=1), lambda: TRADES(steps=1)])
def test_class_weights_and_smoothing_count(few_digits, make):
    same = [weights_after(few_digits(), make(), f) for f in (None, ce, CrossEntropyLossFlat())]
    assert len({*same}) == 1
    others = [weights_after(few_digits(), make(), f) for f in WEIGHTED]
    assert others[0] == others[3] and len({same[0], *others[:2]}) == 3

@pytest.mark.parametrize('f', WEIGHTED, ids=lambda f: type(f).__name__)
def test_where_labels_are_not_used_they_are_refused(d, f):
    t = small_resnet(width=4)
    for m in (RSLAD(t, steps=1), MART(steps=1), ARD(t, steps=1), ADER(t, t, attention='none', steps=1)):
        with refused('has no term for them'): fit(d, m, loss_func=f)
    fit(d, ARD(t, alpha=0.5, steps=1), loss_func=f)

def test_smoothed_loss_by_hand(d):
    "The labels' term is the learner's loss of the student's logits, in every step."
    from fastai.callback.core import Callback
    pairs = []
    class Spy(Callback):
        def after_loss(self):
            if self.training: pairs.append((self.learn.loss.item(), WEIGHTED[1](logits[-1], self.y).item()))
    m, logits = SAT(steps=1), []
    def student(x):
        logits.append(type(m).student(m, x).logits)
        return AttentionOutput(logits[-1], None, None)
    m.student = student
    learn = fit(d, [m, Spy()], loss_func=WEIGHTED[1])
    assert len(pairs) == len(d.train) and learn.loss_func is WEIGHTED[1]
    for got,want in pairs: assert got == pytest.approx(want, rel=1e-5)

@pytest.mark.parametrize('reduction', ['sum', 0, -1., float('nan'), float('inf'), None])
def test_divisors_of_a_divergence(reduction):
    with refused("a number above 0"): RSLAD(small_resnet(), reduction=reduction)
    x = torch.randn(4, 10)
    assert RSLAD(small_resnet(), reduction=10).kl(x, x.flip(0)) == RSLAD(small_resnet(), reduction='mean').kl(x, x.flip(0))

# --- nets whose copy is not simple

def copied(net, d):
    "After a training, how far the copy is from the network itself."
    fit(digits(device='cpu'), SAT(steps=1, threat=T), net)
    x = d.test.dataset[:8][0]
    with torch.no_grad():
        return (FrozenCopy(net.eval(), x, 'float32')(x) - net(x)).abs().max().item()

def tower(conv):
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, 10))

@pytest.mark.parametrize('norm', [parametrizations.spectral_norm, parametrizations.weight_norm,
                                  lambda m: prune.random_unstructured(m, 'weight', 0.5)])
def test_computed_weights(d, norm): assert copied(tower(norm(nn.Conv2d(1, 8, 3))), d) < 1e-5

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.n, self.m, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.c.weight = self.b.weight
    def forward(self, x):
        x = self.n(self.b(self.a(x))).relu()
        return self.head(self.m(self.c(x)).relu().mean((2, 3)))

def test_shared_weights(d):
    "Not folded, not even where the result would pass the check."
    assert copied(Tied(), d) < 1e-5
    assert _conv_bn_pairs(Tied().eval(), d.test.dataset[:8][0]) == []

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = small_resnet(width=4), 1.
    def forward(self, x): return self.net(x)*self.scale

def test_numbers_that_change(d):
    net, x = Scaled().eval(), d.test.dataset[:8][0]
    copy = FrozenCopy(net, x, 'float32')
    net.scale = 3.
    torch.testing.assert_close(copy.refresh()(x), net(x), rtol=1e-4, atol=1e-5)

def test_folding_is_tried_with_trained_statistics(d):
    "A network that normalises what two convolutions made looks right while the statistics are fresh."
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)
        def forward(self, x):
            g = self.a(x)
            return self.head((self.n(g) + g).relu().mean((2, 3)))
    assert copied(Odd(), d) < 1e-5

def test_a_teacher_in_half_precision(d): fit(d, RSLAD(small_resnet(width=4).half(), steps=1))

# --- what a learner can do beside fitting

@pytest.fixture(scope='module')
def learn(d): return fit(d, SAT(steps=1))

@pytest.mark.parametrize('name', ['tta', 'show_results', 'summary', 'validate', 'get_preds'])
def test_learner(learn, name): getattr(learn, name)()

def test_predict(learn, d, tmp_path):
    x, y = d.test.dataset[0]
    name, k, p = learn.predict(x)
    with torch.no_grad(): want = learn.model.eval()(x[None]).softmax(1)[0]
    torch.testing.assert_close(p, want, rtol=1e-4, atol=1e-6)
    assert name == d.train.classes[k] and k == want.argmax()
    Image.fromarray((x[0]*255).byte().numpy()).save(tmp_path/'x.png')
    assert learn.predict(tmp_path/'x.png')[1] == learn.predict(Image.open(tmp_path/'x.png'))[1] == k
    preds, _ = learn.get_preds(dl=d.test_dl([x, x]))
    torch.testing.assert_close(preds, torch.stack([p, p]))

def test_export(learn, d, tmp_path):
    "The loaded learner predicts the same, and has no images inside."
    x = d.test.dataset[0][0]
    learn.export(tmp_path/'x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'x.pkl')
    assert again.predict(x)[0] == learn.predict(x)[0] and len(again.dls.train.dataset) == 0
    assert len(learn.dls.train.dataset) == 200

@pytest.mark.parametrize('which', ['ours', 'fastai'])
def test_interpretation(learn, fa, which):
    import matplotlib.pyplot as plt
    i = ClassificationInterpretation.from_learner(learn if which == 'ours' else fit(fa, SAT(steps=1), colour()))
    assert i.confusion_matrix().sum() == len(i.dl.dataset)
    i.plot_confusion_matrix()
    i.plot_top_losses(4)
    plt.close('all')

@pytest.mark.parametrize('which', ['ours', 'fastai'])
def test_tensorboard(d, fa, tmp_path, which):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    dls, net = (d, None) if which == 'ours' else (fa, colour())
    fit(dls, [SAT(steps=1), TensorBoardCallback(tmp_path)], net)
    assert list(tmp_path.glob('events*'))

# --- files

def test_nets_of_others_in_files(d, tmp_path):
    "By the constructor's name, or into a network that is there."
    x = torch.rand(2, 3, 32, 32)
    net = net_from_text('torchvision/shufflenet_v2_x0_5', cifar_like()).eval()
    save(net, tmp_path/'a')
    torch.testing.assert_close(load(tmp_path/'a')(x), net(x))
    with refused('no network is called|not the arguments'): net_from_text('torchvision/nothing', d)
    own = Tied().eval()
    save(own, tmp_path/'b')
    with refused('into=net'): load(tmp_path/'b')
    torch.testing.assert_close(load(tmp_path/'b', Tied())(x[:,:1]), own(x[:,:1]))

def cifar_like():
    images = Images(torch.rand(20, 3, 32, 32), torch.arange(20) % 2, ['a', 'b'])
    return dataloaders(images, images, images)

def test_a_compiled_net_is_saved_as_itself(tmp_path):
    net = small_resnet(width=4).eval()
    save(torch.compile(net, backend='eager'), tmp_path/'c')
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(load(tmp_path/'c')(x), net(x))

# --- attacks on request

def test_targeted(d, natural):
    "Towards a class: more images end there than by an attack away from the label."
    net, (x, y) = natural, d.test.dataset[:60]
    target = (y + 3) % 10
    reach = lambda a, t: (net(a(net, x, t)) .argmax(1) == target).float().mean().item()
    for restarts in (1, 2):
        a = PGD(T, 10, targeted=True, restarts=restarts)
        assert reach(a, target) > 0.6 > 0.4 > reach(PGD(T, 10), y)
        T.check(a(net, x, target), x)
    with refused('away from labels'): evaluate(net, d.test, [PGD(T, targeted=True)], images=5, **quiet)

# --- what is known is read

def test_a_published_accuracy_is_compared(d):
    "Weights that load and answer wrongly are noticed."
    net, few = small_resnet(width=4).eval(), dict(images=60, **quiet)
    clean = check_teacher(net, d.test, T, **few).scores.accuracy[0]
    for accuracy,says in ((clean, False), (clean + 0.3, True)):
        net.metadata['accuracy'] = accuracy
        assert ('It was published with' in check_teacher(net, d.test, T, **few).summary) == says

def test_the_average_of_the_best_epoch(d):
    "The weights, the scores and the epoch belong together; an unknown metric is refused."
    from fastai.callback.core import Callback
    class Spy(Callback):
        order, seen = 70, []
        def after_epoch(self): self.seen.append((self.recorder.log[1:], self.weight_ema.mean.module.state_dict()['head.2.bias'].clone()))
    ema, spy = WeightEMA(0.9, 'clean'), Spy()
    learn = train(SAT(steps=1), small_resnet(width=4), d, 4, cbs=[ema, spy], **quiet)
    k = learn.recorder.metric_names[1:-1].index('clean')
    best = max(range(4), key=lambda i: spy.seen[i][0][k])
    assert torch.equal(learn.model.state_dict()['head.2.bias'], spy.seen[best][1])
    assert learn.model.metadata['valid']['clean'] == pytest.approx(spy.seen[best][0][k])
    with refused('WeightEMA can monitor'): fit(d, [SAT(steps=1), WeightEMA(0.9, 'dirty')])
