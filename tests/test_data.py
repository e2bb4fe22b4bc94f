"Loading, splitting, batching and augmenting images."
import io, os, pickle
from hashlib import md5
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from PIL import Image
from torchvision import datasets
from ader.data import *
from ader.data import _decode, _list_images, _split_off

REAL = Path(os.environ.get('FASTAI_HOME', '~/.fastai')).expanduser()/'data'/'cifar10'
NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
gen = lambda seed=0: torch.Generator().manual_seed(seed)

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai'))
    monkeypatch.chdir(tmp_path)
    return tmp_path

def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen(seed))

def save(x, path, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1,2,0).squeeze(-1).numpy()).save(path, **kwargs)

def folder(root, *names):
    "Images of 8×8 pixels; a name that ends with / stands for four of them."
    root.mkdir(exist_ok=True)
    paths = [p for o in names for p in ([f'{o}{i}.png' for i in range(4)] if o[-1] == '/' else [o])]
    for i,p in enumerate(paths): save(noise(3,8,8, seed=i), root/p)
    return root

# ---- augmentation and batches ----

def test_augmentations():
    "They repeat with the seed, leave their input alone, and treat bytes and floats alike."
    x = noise(64,3,16,16)
    for f in (RandomCrop(4), RandomFlip(0.3)):
        a = f(x, gen(1))
        assert a.dtype == torch.uint8 and a.is_contiguous() and x.equal(noise(64,3,16,16))
        assert a.equal(f(x, gen(1))) and not a.equal(f(x, gen(2)))
        assert (f(x/255, gen(1))*255).round().byte().equal(a)

def test_crop_and_flip_are_uniform():
    x = torch.zeros(9000,1,5,5)
    x[:,:,2,2] = 1
    where = RandomCrop(1)(x, gen()).mean((0,1))
    assert (where[1:4,1:4] - 1/9).abs().max() < 0.02 and where.sum() == pytest.approx(1)
    x = torch.tensor([1.,0]).expand(9000,1,1,2)
    assert abs(RandomFlip(0.3)(x, gen())[...,1].mean() - 0.3) < 0.02

def test_sizes_of_batches():
    dl = Batches(Images(noise(9,1,8,8), np.arange(9)%2, 'ab'), 4)
    assert [len(y) for _,y in dl] == [4,4,1] and [len(y) for _,y in dl.new(drop_last=True)] == [4,4]
    parts = [[y for _,y in dl.new(bs=2).shared(i, 4)] for i in range(4)] # the 9th joins a batch
    assert [[len(y) for y in p] for p in parts] == [[3], [2], [2], [2]]
    with pytest.raises(AderError, match='cannot share'): dl.shared(0, 10)

x4, y4 = torch.rand(4,1,8,8), torch.tensor([0,1,0,1])

@pytest.mark.parametrize('x, y, words', [
    (x4*255, y4, 'must lie in'), (x4/0, y4, 'must lie in'), (x4[0], y4, r'\(B, C, H, W\)'),
    (x4[:0], y4, r'\(B, C, H, W\)'), (x4.long(), y4, 'uint8 or float'), (x4, y4-1, 'got -1 to 0'),
    (x4, y4[:3], '4 images need labels'), (x4, y4[:,None], 'labels of shape'),
    (x4, y4.float(), 'whole numbers')])
def test_misuse(x, y, words):
    with pytest.raises(AderError, match=words): Images(x, y, 'ab')

@pytest.mark.parametrize('bs, seed', [(0, 0), (2.5, 0), (2, -1), (2, None)])
def test_bad_batches(bs, seed):
    with pytest.raises(AderError, match='whole number'): digits(bs=bs, seed=seed)

# ---- splits ----

def test_splits_stay_what_they_were():
    "Else a network would be tested on images that it was trained on."
    b, c = _split_off(torch.arange(1000)%7, 100)[1], _split_off(torch.arange(1000)%7, 0.25, 3)[1]
    assert (len(b), b[:4].tolist(), b.sum()) == (98, [20,40,49,50], 48083)
    assert (len(c), c[:4].tolist(), c.sum()) == (252, [2,7,11,16], 120092)
    for part in (0, -0.5, 20, 21):
        with pytest.raises(AderError, match='cannot split'): _split_off(torch.arange(20)%2, part)
    with pytest.raises(AderError, match='one image'): _split_off(torch.tensor([0,0,1]), 0.5)

# ---- folders ----

@pytest.mark.parametrize('parts', ['train valid test', 'training val testing',
                                   'Training Validation Testing', 'Train VAL Test'])
def test_parts(home, parts):
    a, b, c = parts.split()
    names = [f'{a}/x/', f'{a}/y/', f'{b}/x/1.png', f'{b}/y/', f'{c}/x/1.png', f'{c}/y/2.png']
    dls = image_folder(folder(home/'f', *names), 8)
    assert [o.n for o in dls] == [8,5,2] and dls.train.classes == ['x','y']
    assert dls.test.dataset.name == 'f'

def test_missing_parts_are_split_off(home):
    a = image_folder(folder(home/'f', 'x/', 'y/'), 8)
    b = image_folder(home/'f', 8, seed=5, bs=2)
    assert [o.n for o in a] == [4,2,2] and a.test.dataset.x.equal(b.test.dataset.x)
    assert len({o.numpy().tobytes() for dl in a for o in dl.dataset.x}) == 8
    f = folder(home/'g', 'Training/x/', 'Training/y/', 'Testing/x/', 'Testing/y/')
    assert [o.n for o in image_folder(f, 8)] == [6,2,8]

def test_the_first_images_are_a_sample(home):
    "Files come class by class, and whoever looks at the first few must see all classes."
    names = [f'{part}/{k}/{i}.png' for part in ('train', 'test') for k in 'xyz' for i in range(12)]
    dls = image_folder(folder(home/'f', *names), 8)
    y = dls.test.dataset.y
    assert len(y) == 36 and len(y[:15].unique()) == 3 and y.diff().ne(0).sum() > 10
    for ds in (dl.dataset for dl in dls): # and it can be told which files they are
        for x,y,f in zip(ds.x, ds.y, ds.files):
            assert f.split('/')[1] == ds.classes[y]
            assert np.array_equal(_decode(home/'f'/f, (8, 8), 3), x)

def test_order_classes_and_hidden_files(home):
    f = folder(home/'f', 'b/10.png', 'b/9.png', 'Bus/old/9.png', 'train/x.png', 'b/.0.png',
               '.ipynb_checkpoints/b/1.png')
    assert _list_images(f, False) == {'train': [('train/x.png', 'train'), ('Bus/old/9.png', 'Bus'),
                                                ('b/9.png', 'b'), ('b/10.png', 'b')]}

@pytest.mark.parametrize('names, words', [
    ('', 'two or more classes'), ('a/', 'two or more classes'), ('a/ b/ x.png', 'x.png is not in'),
    ('train/a/ train/b/ test/x.png', 'test/x.png is not in train/<class>/'),
    ('train/a/ train/b/ more/a/', 'more/a/0.png is not in train/<class>/'),
    ('Training/ Testing/', 'not in train/<class>/'), ('valid/a/ valid/b/ test/a/', 'same classes'),
    ('train/a/ train/b/ test/a/ test/b/ test/c/', 'same classes, not so: c'),
    ('train/a/ train/b/ train/c/ test/a/ test/b/', 'same classes, not so: c')])
def test_what_has_no_place_is_named(home, names, words):
    with pytest.raises(AderError, match=words): image_folder(folder(home/'f', *names.split()))

@pytest.mark.parametrize('kw', [dict(size=0), dict(size=(8,)), dict(channels=4), dict(valid=0),
                                dict(bs=0), dict(path='nowhere'), dict(path='/')])
def test_bad_arguments(home, kw):
    with pytest.raises(AderError): image_folder(**(dict(path=folder(home/'f', 'x/', 'y/')) | kw))

def test_kinds_of_images(home):
    "Formats, modes and sizes: all are read."
    exts = 'png jpg bmp gif tiff webp PNG jpeg ppm'.split()
    for i,ext in enumerate(exts): save(noise(3,30,40), home/'f'/'ab'[i%2]/f'{i}.{ext}')
    for m in ('1', 'L', 'P', 'RGBA', 'CMYK', 'YCbCr'):
        Image.new('RGB', (9,9)).convert(m).save(home/'f'/'a'/f'{m}.tif')
    Image.new('LA', (9,9)).save(home/'f'/'a'/'LA.png')
    for size,channels,shape in ((8,3,(3,8,8)), ((6,10),1,(1,6,10)), (64,3,(3,64,64))):
        dls = image_folder(home/'f', size, channels)
        assert sum(o.n for o in dls) == 16 and all(o.dataset.x.shape[1:] == shape for o in dls)

def test_no_image_is_stretched_turned_or_black(home):
    x, exif = torch.zeros(3,40,80, dtype=torch.uint8), Image.Exif()
    x[:,:,20:60] = 255 # the middle square
    save(x, home/'x.png')
    assert (_decode(home/'x.png', (20,20), 3)[:,:,1:-1] == 255).all()
    exif[0x0112] = 3 # upside down
    save(noise(3,8,8), home/'x.png', exif=exif)
    assert (_decode(home/'x.png', (8,8), 3) == noise(3,8,8).flip(1,2).numpy()).all()
    Image.fromarray(np.uint8([[[9,9,9,128], [0,0,0,0]]])).save(home/'x.png') # on white
    assert _decode(home/'x.png', (1,2), 1).flatten().tolist() == [132, 255]

@pytest.mark.parametrize('value', [np.float32(1), np.uint16(4095), np.int32(70_000), np.int32(-1)])
def test_pixels_of_no_known_range_are_refused(home, value):
    f = folder(home/'f', 'a/', 'b/')
    Image.fromarray(np.full((4,4), value)).save(f/'a'/'x.tif')
    with pytest.raises(AderError, match='a/x.tif .pixels must be 8 or 16 bits'): image_folder(f)

def test_broken_files_are_named_at_once(home):
    f = folder(home/'f', 'a/', 'b/')
    bad = [b'', (f/'a/0.png').read_bytes()[:60], b'text', b'%!PS-Adobe-3.0 EPSF-3.0\n']
    for i,o in enumerate(f.rglob('*.png')): o.write_bytes(bad[i%4])
    with pytest.raises(AderError, match='8 of 8 images') as e: image_folder(f, 8)
    assert 'a/0.png' in str(e.value) and str(e.value).count('.png (') == 5

@given(kind=st.sampled_from(['PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP']), cut=st.booleans(),
       at=st.integers(0, 300), new=st.binary(max_size=8))
def test_any_bytes(home, kind, cut, at, new):
    "A file that is cut off, or has other bytes somewhere, is read or named."
    f, buf = folder(home/'f', 'a/', 'b/'), io.BytesIO()
    Image.new('RGB', (8,8), 100).save(buf, kind)
    b = buf.getvalue()
    (f/'a'/'x.png').write_bytes(b[:at] + (b'' if cut else new + b[at+len(new):]))
    try: assert sum(o.n for o in image_folder(f, 8, device='cpu')) == 9
    except AderError as e: assert '1 of 9 images' in str(e) and 'a/x.png' in str(e)

# ---- CIFAR ----

x80, y80 = noise(80,3,32,32), torch.arange(80)%10
part = lambda i: 'train' if i < 60 else 'test'

def torchvision_files(root, monkeypatch):
    "60 training and 20 test images as files of which torchvision is told the checksums."
    batches = [*torch.arange(60).chunk(5), torch.arange(60,80)]
    held = [dict(data=x80[i].flatten(1).numpy(), labels=y80[i].tolist()) for i in batches]
    names = [f'data_batch_{i}' for i in range(1,6)] + ['test_batch', 'batches.meta']
    files = dict(zip(names, map(pickle.dumps, [*held, dict(label_names=NAMES)])))
    sums = [[k, md5(b).hexdigest()] for k,b in files.items()]
    monkeypatch.setattr(datasets.CIFAR10, 'train_list', sums[:5])
    monkeypatch.setattr(datasets.CIFAR10, 'test_list', sums[5:6])
    monkeypatch.setattr(datasets.CIFAR10, 'meta', datasets.CIFAR10.meta | dict(md5=sums[6][1]))
    (root/'cifar-10-batches-py').mkdir(parents=True)
    for k,b in files.items(): (root/'cifar-10-batches-py'/k).write_bytes(b)

@pytest.mark.filterwarnings('ignore:CIFAR')
def test_cifar_from_torchvision_and_from_a_folder(home, monkeypatch):
    torchvision_files(home/'tv', monkeypatch)
    for i in range(80):
        c = NAMES[y80[i]]
        save(x80[i], home/'fastai'/'data'/'cifar10'/part(i)/c/f'{i}_{c}.png')
    a, b = cifar10(valid=20), cifar10(home/'tv', valid=20, seed=9)
    assert [o.n for o in a] == [40,20,20] and a.test.dataset.x.equal(x80[60:])
    for o,p in zip(a, b):
        assert o.dataset.x.equal(p.dataset.x) and o.dataset.y.equal(p.dataset.y)
        assert o.classes == p.classes == NAMES and o.dataset.name == p.dataset.name == 'CIFAR-10'
    assert str(a.train.augment) == '[RandomCrop(4), RandomFlip(0.5)]' and not a.valid.augment

def test_cifar_of_jpeg_files_says_so(home):
    for i in range(80): save(x80[i], home/'c'/part(i)/NAMES[y80[i]]/f'{i}.jpg')
    with pytest.warns(UserWarning, match='60000 images, but .* has 80'): dls = cifar10(home/'c', 10)
    assert dls.test.dataset.name == 'CIFAR-10 (JPEG)'
    with pytest.raises(AderError, match='100 classes, but .* has 10'): cifar100(home/'c')

@pytest.mark.filterwarnings('ignore:CIFAR')
def test_cifar100_takes_the_fine_class(home):
    for i in range(200):
        for k in ('train', 'test'): save(x80[i%80], home/k/f'g{i%20}'/f'c{i%100:02d}'/f'{i}.png')
    assert cifar100(home, valid=100).train.classes == [f'c{i:02d}' for i in range(100)]

def test_without_a_network_one_error_says_what_to_do(home, monkeypatch):
    def offline(self): raise OSError('no route to host')
    monkeypatch.setattr(datasets.CIFAR10, 'download', offline)
    with pytest.raises(AderError) as e: cifar10()
    for o in ('no route', str(home/'fastai'/'data'), 'cifar-10-python.tar.gz', 'cifar10/train/<cl'):
        assert o in str(e.value)

@pytest.mark.skipif(not (REAL/'labels.txt').exists(), reason=f'CIFAR-10 is not in {REAL}')
def test_the_real_one_keeps_its_order_and_its_split():
    files = _list_images(REAL, True)
    train, test = (torch.tensor([NAMES.index(c) for _,c in files[k]]) for k in ('train', 'test'))
    assert len(train) == 50_000 and test[:10].tolist() == [3,8,8,0,6,6,1,6,3,1]
    b = _split_off(train, 1000)[1]
    assert (b[:4].tolist(), b.sum(), (b*train[b]).sum()) == ([78,216,304,359], 24684549, 113563719)
    assert _decode(REAL/files['train'][78][0], (32,32), 3).mean() == pytest.approx(113.115, abs=0.5)

# ---- by name ----

def test_load_data(home):
    f = folder(home/'f', 'a/', 'b/')
    assert load_data('digits', bs=7).train.bs == 7
    assert load_data(f).train.dataset.x.shape[1:] == (3,32,32)
    assert load_data(str(f), size=6, channels=1).train.dataset.x.shape[1:] == (1,6,6)
    with pytest.raises(AderError, match='cifar10, cifar100, or a folder'): load_data('cifar')
    with pytest.raises(AderError, match='are for folders'): load_data('digits', size=9)
