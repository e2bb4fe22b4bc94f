"Loading, splitting, caching and augmenting images."
import io, os, pickle, sys, subprocess
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from ader import data
from ader.data import *

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent/'shared'/'data'/'cifar10_jpeg_test.npz'
NAMES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
gen = lambda seed=0: torch.Generator().manual_seed(seed)
pytestmark = pytest.mark.filterwarnings('ignore:CIFAR')


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "Cache, fastai's home and working folder of every test are its own."
    monkeypatch.setenv('ADER_CACHE', str(tmp_path/'cache'))
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path/'fastai'))
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.fixture
def decoded(monkeypatch):
    "Counts how many images are decoded."
    paths, decode_images = [], data.decode_images
    monkeypatch.setattr(data, 'decode_images', lambda root, ps, *args: (paths.extend(ps), decode_images(root, ps, *args))[1])
    return paths

def noise(*shape, seed=0): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=gen(seed))

def save(x, path, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1,2,0).squeeze(-1).numpy()).save(path, **kwargs)
    return path

def classes_of(path, classes='ab', n=10, size=8, ext='png', channels=3):
    "A folder of `n` images for each class."
    for j,c in enumerate(classes):
        for i in range(n): save(noise(channels, size, size, seed=100*j+i), path/c/f'{i}.{ext}')
    return path

def cifar_folder(path, x, y, n, ext='png', names=NAMES, **kwargs):
    for i in range(len(x)): save(x[i], path/('train' if i < n else 'test')/names[y[i]]/f'{i}_{names[y[i]]}.{ext}', **kwargs)
    return path

def cifar_batches(path, x, y, n):
    "The first `n` images as five training batches, the rest as the test batch."
    path.mkdir(parents=True)
    chunks = [*torch.arange(n).chunk(5), torch.arange(n, len(x))]
    for f,i in zip([f'data_batch_{k}' for k in range(1,6)] + ['test_batch'], chunks):
        (path/f).write_bytes(pickle.dumps(dict(data=x[i].flatten(1).numpy(), labels=y[i].tolist()), protocol=2))
    (path/'batches.meta').write_bytes(pickle.dumps(dict(label_names=NAMES)))
    return path

def key(x): return {o.numpy().tobytes() for o in x}

cache_file = lambda: next(data.cache_dir().iterdir())


# ---------------------------------------------------------------- augmentation

shapes = st.tuples(st.integers(1,5), st.sampled_from([1,3]), st.integers(1,12), st.integers(1,12))
kinds = st.sampled_from([torch.uint8, torch.float32])

def batch(shape, kind): return noise(*shape) if kind == torch.uint8 else torch.rand(shape, generator=gen())

@settings(max_examples=60, deadline=None)
@given(shapes, kinds, st.integers(0,5), st.integers(0,99))
def test_crop_is_a_window_of_the_padded_image(shape, kind, pad, seed):
    x = batch(shape, kind)
    out, p = RandomCrop(pad)(x, gen(seed)), torch.nn.functional.pad(x, [pad]*4)
    assert out.shape == x.shape and out.dtype == x.dtype
    dy, dx = torch.randint(0, 2*pad + 1, (2, len(x)), generator=gen(seed))
    H, W = x.shape[-2:]
    for o,im,t,l in zip(out, p, dy, dx): assert o.equal(im[:, t:t+H, l:l+W])

@settings(max_examples=60, deadline=None)
@given(shapes, kinds, st.floats(0,1), st.integers(0,99))
def test_flip_gives_image_or_mirror_image(shape, kind, p, seed):
    x = batch(shape, kind)
    out = RandomFlip(p)(x, gen(seed))
    flip = torch.rand(len(x), generator=gen(seed)) < p
    assert out.dtype == x.dtype
    for o,im,f in zip(out, x, flip): assert o.equal(im.flip(-1) if f else im)

@settings(max_examples=60, deadline=None)
@given(shapes, kinds, st.integers(1,14), st.integers(0,99))
def test_cutout_blackens_one_rectangle(shape, kind, size, seed):
    x = batch(shape, kind)//2 + 1 # no zeros
    out, (H,W) = Cutout(size)(x, gen(seed)), shape[-2:]
    assert out.dtype == x.dtype
    for o,im in zip(out, x):
        hole = o[0] == 0
        assert all((c == 0).equal(hole) for c in o) and o[:,~hole].equal(im[:,~hole])
        rows, cols = hole.any(1), hole.any(0)
        assert hole.equal(rows[:,None] & cols) # a rectangle...
        for on,n in ((rows,H), (cols,W)): # ...without gaps, at least the half of the square that lies on the centre's side
            i = on.nonzero()[:,0]
            assert len(i) == i[-1] - i[0] + 1 and min(n, (size+1)//2) <= len(i) <= min(n, size)

def test_augmentations_repeat_with_the_seed_and_leave_the_input_alone():
    x = noise(64,3,16,16)
    before = x.clone()
    for f in (RandomCrop(4), RandomFlip(), Cutout(8)):
        assert f(x, gen(1)).equal(f(x, gen(1))) and not f(x, gen(1)).equal(f(x, gen(2)))
    assert x.equal(before)

def test_crop_and_flip_are_uniform():
    x = torch.zeros(9000,1,5,5, dtype=torch.uint8)
    x[:,:,2,2] = 1
    where = RandomCrop(1)(x, gen()).float().mean((0,1))
    assert (where[1:4,1:4] - 1/9).abs().max() < 0.02 and where.sum() == pytest.approx(1)
    x = torch.tensor([1.,0]).expand(9000,1,1,2)
    assert abs(RandomFlip(0.3)(x, gen())[...,1].mean() - 0.3) < 0.02

def test_batches_of_bytes_and_of_floats_agree():
    x, y, aug = noise(50,3,8,8), torch.arange(50)%2, [RandomCrop(2), RandomFlip(), Cutout(3)]
    a, b = (Batches(Images(o, y, 'ab'), 16, shuffle=True, augment=aug, seed=3) for o in (x, x/255))
    for (xa,ya),(xb,yb) in zip(a, b): assert xa.dtype == torch.float32 and xa.equal(xb) and ya.equal(yb)


# ---------------------------------------------------------------- splits

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2,30), min_size=1, max_size=6), st.floats(0.05,0.9), st.integers(0,9))
def test_split_is_a_partition_with_every_class_in_both(counts, share, seed):
    y = torch.cat([torch.full((n,), c) for c,n in enumerate(counts)])[torch.randperm(sum(counts), generator=gen(seed))]
    a, b = split_off(y, share, seed)
    assert torch.cat([a,b]).sort().values.equal(torch.arange(len(y)))
    assert all(o.equal(o.sort().values) for o in (a,b))
    for c,n in enumerate(counts): assert (y[b] == c).sum() == min(max(round(share*n), 1), n-1)
    assert split_off(y, share, seed)[1].equal(b)

@pytest.mark.parametrize('part', [0, -0.5, 20, 21])
def test_split_refuses_nonsense(part):
    with pytest.raises(AderError, match='cannot split'): split_off(torch.arange(20)%2, part)

def test_split_refuses_single_images():
    with pytest.raises(AderError, match='single image'): split_off(torch.tensor([0,0,0,1]), 0.5)

def test_folder_split_is_fixed_and_without_overlap(home):
    f = classes_of(home/'f', n=20)
    a, b, c = image_folder(f, 8), image_folder(f, 8, seed=5, bs=7), image_folder(f, 8, split_seed=5)
    xs = [key(o.dataset.x) for o in a]
    assert [len(o) for o in xs] == [o.n for o in a] == [28,4,8] and len(set.union(*xs)) == 40
    for o,p in zip(a, b): assert o.dataset.x.equal(p.dataset.x)
    assert not a.test.dataset.x.equal(c.test.dataset.x)


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize('valid', ['valid', 'val'])
def test_folder_with_parts(home, valid):
    for i,k in enumerate(('train', valid, 'test')): classes_of(home/'f'/k, n=4-i)
    (home/'f'/'train'/'notes.txt').write_text('x')
    dls = image_folder(home/'f', 8)
    assert [o.n for o in dls] == [8,6,4] and dls.train.classes == ['a','b']
    assert dls.test.dataset.name == 'f' and dls.test.dataset.eps == 8/255

def test_missing_parts_are_split_off_the_training_images(home):
    classes_of(home/'f'/'train', n=20), classes_of(home/'f'/'test', n=3)
    assert [o.n for o in image_folder(home/'f', 8, valid=0.25)] == [30,10,6]

def test_classes_are_sorted_and_may_be_called_train(home):
    dls = image_folder(classes_of(home/'f', ['train','Bus','car']), 8)
    assert dls.train.classes == ['Bus','car','train']

def test_sizes_channels_and_formats(home):
    x = noise(3,30,40)
    for i,ext in enumerate(('png','jpg','bmp','gif','tiff','webp','PNG','jpeg')): save(x, home/'f'/'ab'[i%2]/f'{i}.{ext}')
    save(noise(1,9,9), home/'f'/'a'/'grey.png')
    Image.fromarray(noise(4,9,9).permute(1,2,0).numpy()).save(home/'f'/'b'/'alpha.png')
    for size,channels,shape in ((8,3,(3,8,8)), ((6,10),1,(1,6,10)), (64,3,(3,64,64))):
        parts, _, _ = read_folder(home/'f', size, channels)
        assert parts['train'][0].shape == (10,*shape)

def test_nothing_is_stretched(home):
    x = torch.zeros(3,40,80, dtype=torch.uint8)
    x[:,:,20:60] = 255 # the middle square
    assert (decode_image(save(x, home/'x.png'), (20,20))[0][:,1:-1] == 255).all()

def test_upright(home):
    x, exif = noise(3,8,8), Image.Exif()
    exif[0x0112] = 3 # upside down
    assert (decode_image(save(x, home/'x.png', exif=exif), (8,8))[0] == x.flip(1,2).permute(1,2,0).numpy()).all()

def test_hidden_files_are_ignored(home):
    f = classes_of(home/'f')
    classes_of(f/'.ipynb_checkpoints'), save(noise(3,8,8), f/'a'/'.0.png')
    assert len(scan_folder(f)) == 20

def test_broken_files_are_named_at_once(home):
    f = classes_of(home/'f')
    good = (f/'a'/'1.png').read_bytes()
    for i in range(7): (f/'b'/f'{i}.png').write_bytes(b'' if i%2 else good[:60])
    (f/'a'/'1.png').write_text('not an image')
    with pytest.raises(AderError) as e: image_folder(f, 8)
    assert '8 of the 20 images' in str(e.value) and 'a/1.png, b/0.png' in str(e.value) and 'b/6.png' not in str(e.value)
    assert not (home/'cache').exists(), 'nothing to keep'

def test_links(home):
    f = classes_of(home/'f')
    (f/'a'/'inside.png').symlink_to(f/'a'/'1.png')
    assert len(scan_folder(f)) == 21
    (home/'link').symlink_to(f)
    assert len(scan_folder(home/'link')) == 21 # the folder itself may be a link
    for to in (save(noise(3,8,8), home/'out.png'), home, f, home/'nowhere', f/'b'):
        link = f/'a'/'link.png'
        link.symlink_to(to)
        with pytest.raises(AderError, match='is a link'): image_folder(f)
        link.unlink()

@pytest.mark.parametrize('bad', ['nowhere', 'file', 'empty', 'one', 'loose', 'loose in train', 'other test', 'fewer in test', 'no train', 'size', 'channels', 'shares', 'bs'])
def test_bad_folders_and_arguments(home, bad):
    f, kwargs = home/'f', {}
    if bad == 'file': f.write_text('x')
    elif bad == 'empty': f.mkdir()
    elif bad == 'one': classes_of(f, 'a')
    elif bad == 'loose': save(noise(3,8,8), classes_of(f)/'x.png')
    elif bad == 'loose in train': classes_of(f/'train'), save(noise(3,8,8), classes_of(f/'test')/'x.png')
    elif bad == 'other test': classes_of(f/'train'), classes_of(f/'test', 'abc')
    elif bad == 'fewer in test': classes_of(f/'train', 'abc'), classes_of(f/'test', 'ab')
    elif bad == 'no train': classes_of(f/'valid'), classes_of(f/'test')
    elif bad != 'nowhere':
        classes_of(f)
        kwargs = dict(size=dict(size=0), channels=dict(channels=4), shares=dict(valid=0), bs=dict(bs=0))[bad]
    with pytest.raises(AderError): image_folder(f, **kwargs)


# ---------------------------------------------------------------- the cache

def test_second_load_decodes_nothing(home, decoded):
    f = classes_of(home/'f')
    a = image_folder(f, 8)
    assert len(decoded) == 20
    b = image_folder(f, 8)
    assert len(decoded) == 20
    for o,p in zip(a, b): assert o.dataset.x.equal(p.dataset.x) and o.dataset.y.equal(p.dataset.y)
    image_folder(f, 8, channels=1), image_folder(f, 9)
    assert len(decoded) == 60 and len(list((home/'cache').iterdir())) == 3

@pytest.mark.parametrize('change', ['pixels', 'time', 'more', 'fewer', 'renamed', 'moved'])
def test_a_changed_folder_is_decoded_again(home, decoded, change):
    f = classes_of(home/'f')
    image_folder(f, 8)
    one = f/'a'/'3.png'
    if change == 'pixels': save(noise(3,8,8, seed=77), one)
    elif change == 'time': os.utime(one, ns=(1,1))
    elif change == 'more': save(noise(3,8,8), f/'a'/'11.png')
    elif change == 'fewer': one.unlink()
    elif change == 'renamed': one.rename(f/'a'/'33.png')
    else: one.rename(f/'b'/'33.png')
    n = len(decoded)
    image_folder(f, 8)
    assert len(decoded) > n and len(list((home/'cache').iterdir())) == 1

@pytest.mark.parametrize('how', ['empty', 'header', 'half', 'one byte less', 'flipped bit', 'other file', 'other safetensors'])
def test_a_broken_cache_is_made_again(home, decoded, how):
    from safetensors.torch import save as dumps
    f = classes_of(home/'f')
    a = image_folder(f, 8)
    whole = cache_file().read_bytes()
    cache_file().write_bytes(dict(zip(['empty', 'header', 'half', 'one byte less', 'flipped bit', 'other file', 'other safetensors'],
        [b'', whole[:9], whole[:len(whole)//2], whole[:-1], whole[:-9] + bytes([whole[-9]^4]) + whole[-8:], b'x'*999, dumps(dict(x=torch.ones(2)))]))[how])
    b = image_folder(f, 8)
    assert len(decoded) == 40 and a.test.dataset.x.equal(b.test.dataset.x)
    image_folder(f, 8)
    assert len(decoded) == 40

def test_loaded_images_outlive_their_cache(home):
    f = classes_of(home/'f')
    a, b = image_folder(f, 8), image_folder(f, 8)
    cache_file().write_bytes(b'')
    for o,p in zip(a, b): assert o.dataset.x.equal(p.dataset.x)

def test_the_cache_is_written_whole_or_not_at_all(home, monkeypatch):
    import safetensors.torch
    file, x = home/'c'/'x.safetensors', dict(images=noise(5,3,8,8))
    write_cache(file, 'f', x, {})
    def fails(tensors, path, *_):
        Path(path).write_bytes(b'half a file')
        raise OSError('No space left on device')
    monkeypatch.setattr(safetensors.torch, 'save_file', fails)
    with pytest.warns(UserWarning, match='could not be kept'): write_cache(file, 'g', x, {})
    assert [o.name for o in file.parent.iterdir()] == ['x.safetensors'] and read_cache(file, 'f') and not read_cache(file, 'g')

def test_no_place_for_a_cache_is_no_reason_to_stop(home, monkeypatch):
    (home/'file').write_text('x')
    monkeypatch.setenv('ADER_CACHE', str(home/'file'/'cache'))
    with pytest.warns(UserWarning, match='could not be kept'): assert len(image_folder(classes_of(home/'f'), 8).train.dataset)


# ---------------------------------------------------------------- CIFAR

@pytest.fixture
def tiny(): return noise(80,3,32,32), torch.arange(80)%10, 60

def test_cifar_shapes_give_the_same_parts(home, tiny):
    a = cifar10(cifar_folder(home/'png', *tiny), valid=20)
    b = cifar10(cifar_batches(home/'cifar-10-batches-py', *tiny), valid=20, seed=9)
    assert [o.n for o in a] == [40,20,20] and a.train.dataset.eps == 8/255
    for o,p in zip(a, b): assert o.dataset.x.equal(p.dataset.x) and o.dataset.y.equal(p.dataset.y) and o.classes == p.classes == NAMES
    assert a.test.dataset.x.equal(tiny[0][60:])
    assert key(a.train.dataset.x) | key(a.valid.dataset.x) == key(tiny[0][:60]) # and nothing of the test images
    assert str(a.train.augment) == '[RandomCrop(4), RandomFlip(0.5)]' and not a.valid.augment

@pytest.mark.parametrize('ext,kwargs,name', [('png', {}, 'CIFAR-10'), ('jpg', {}, 'CIFAR-10 (JPEG-75)'), ('jpg', dict(quality=90), 'CIFAR-10 (JPEG-90)'),
    ('jpg', dict(quality=30, subsampling=0), 'CIFAR-10 (JPEG-30)'), ('jpg', dict(qtables=[[7]*64]*2), 'CIFAR-10 (JPEG)')])
def test_source_name(home, tiny, ext, kwargs, name):
    for _ in range(2): assert {o.dataset.name for o in cifar10(cifar_folder(home/'c', *tiny, ext=ext, **kwargs), valid=10)} == {name}

@given(st.integers(1,100))
@settings(max_examples=30, deadline=None)
def test_every_jpeg_quality_is_told(q):
    f = io.BytesIO()
    Image.new('RGB', (8,8)).save(f, 'JPEG', quality=q)
    assert jpeg_quality(Image.open(f)) == q

def test_order_of_search(home, tiny):
    cifar_batches(home/'data'/'cifar-10-batches-py', *tiny)
    assert find_cifar(10)[0] == Path('data/cifar-10-batches-py')
    cifar_batches(home/'cifar-10-batches-py', *tiny)
    assert find_cifar(10)[0] == Path('cifar-10-batches-py')
    cifar_folder(home/'fastai'/'data'/'cifar10', *tiny)
    assert find_cifar(10)[0] == home/'fastai'/'data'/'cifar10'
    cifar_folder(home/'mine', *tiny)
    assert find_cifar(10, 'mine')[0] == Path('mine')
    assert find_cifar(10, home/'data')[0] == home/'data'/'cifar-10-batches-py'
    assert find_cifar(100)[0] is None and find_cifar(10, home/'fastai')[0] is None

def test_fastai_configuration_counts(home):
    (home/'fastai').mkdir()
    (home/'fastai'/'config.ini').write_text(f'[DEFAULT]\ndata = {home}/elsewhere\n')
    assert fastai_data() == home/'elsewhere'

def test_cifar100_folder_takes_the_fine_class(home):
    fine = [f'c{i:02d}' for i in range(100)]
    for k,n in (('train',2), ('test',1)):
        for i in range(100*n): save(noise(3,32,32,seed=i), home/'cifar100'/k/f'coarse{i%100//5}'/fine[i%100]/f'{i}.png')
    dls = cifar100(home, valid=100)
    assert dls.train.classes == fine and [o.n for o in dls] == [100]*3 and dls.test.dataset.y.equal(torch.arange(100))

def test_without_network_one_error_says_what_to_do(home, monkeypatch):
    import_fastai()
    import fastai.data.external as ext
    def offline(url): raise OSError('no route to host')
    monkeypatch.setattr(ext, 'untar_data', offline)
    with pytest.raises(AderError) as e: cifar10()
    for part in ('no route to host', str(home/'fastai'/'data'/'cifar10'), str(home/'data'/'cifar-10-batches-py'), 'train/<class>/*.png'): assert part in str(e.value)

def test_downloads_only_without_a_path(home, tiny, monkeypatch):
    import_fastai()
    import fastai.data.external as ext
    urls = []
    monkeypatch.setattr(ext, 'untar_data', lambda url: (urls.append(url), cifar_folder(home/'fastai'/'data'/'cifar10', *tiny))[1])
    with pytest.raises(AderError, match='not found'): cifar10(home/'wrong')
    assert not urls
    assert cifar10(valid=10).test.n == 20 and urls == [ext.URLs.CIFAR]
    cifar10(valid=10)
    assert len(urls) == 1

class Evil:
    def __reduce__(self): return os.mkdir, ('owned',)

@pytest.mark.parametrize('bad', ['evil', 'truncated', 'empty', 'missing', 'no labels', 'labels', 'shape'])
def test_bad_batches(home, tiny, bad):
    f = cifar_batches(home/'cifar-10-batches-py', *tiny)/'data_batch_2'
    good = pickle.loads(f.read_bytes())
    if bad == 'missing': f.unlink()
    elif bad in ('truncated', 'empty'): f.write_bytes(f.read_bytes()[:-50] if bad == 'truncated' else b'')
    else: f.write_bytes(pickle.dumps({'evil': dict(data=Evil()), 'no labels': dict(data=good['data']), 'labels': dict(good, labels=[12]*12), 'shape': dict(good, data=good['data'][:,:99])}[bad]))
    with pytest.raises(AderError): cifar10(home, valid=10)
    assert not (home/'owned').exists()

@pytest.mark.parametrize('protocol', range(2,6))
def test_pickles_of_any_protocol(home, tiny, protocol):
    f = cifar_batches(home/'cifar-10-batches-py', *tiny)/'test_batch'
    f.write_bytes(pickle.dumps(pickle.loads(f.read_bytes()), protocol=protocol))
    assert cifar10(home, valid=10).test.dataset.x.equal(tiny[0][60:])

def test_wrong_number_of_classes(home):
    classes_of(home/'c'/'train'), classes_of(home/'c'/'test')
    with pytest.raises(AderError, match='has 10 classes, but .* has 2'): cifar10(home/'c')

@pytest.mark.filterwarnings('default:CIFAR')
def test_incomplete_cifar_draws_a_warning(home, tiny):
    with pytest.warns(UserWarning, match='60000 images, but .* has 80'): cifar10(cifar_folder(home/'c', *tiny), valid=10)

@pytest.mark.skipif(not REAL.exists(), reason=f'{REAL.name} is not beside the repository')
def test_real_images(home):
    with np.load(REAL) as f: jpeg, offsets, labels = f['jpeg'], f['offsets'], f['labels'].astype(int)
    for i in range(400):
        p = home/'fastai'/'data'/'cifar10'/('train' if i < 300 else 'test')/NAMES[labels[i]]/f'{i:05d}.jpg'
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(jpeg[offsets[i]:offsets[i+1]].tobytes())
    dls = cifar10(valid=50)
    assert repr(dls.test.dataset) == 'CIFAR-10 (JPEG-75): 100 images (3, 32, 32), 10 classes'
    assert dls.test.dataset.y.tolist() == labels[300:400].tolist() # the original order
    assert 0.4 < dls.one_batch()[0].mean() < 0.55 # photographs


# ---------------------------------------------------------------- the module

def test_import_is_light():
    code = "import sys, ader.data; print([m for m in ('fastai','torchvision','sklearn','matplotlib','PIL','safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == '[]'
