"An exported student: its file gives what the network gives, says what was measured, needs no ader."
import base64, copy, hashlib, json, subprocess, sys, threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, torch
pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
hub = pytest.importorskip('huggingface_hub', reason='the extra hub is not installed')
import onnx, onnxruntime, PIL
from PIL import Image
from torch.nn import functional as F
from ader.attacks import PGD_sat, Threat
from ader.attention import InputAdapter, add_attention, forward_with_attention
from ader.checkpoints import load, save
from ader.cli import command
from ader.data import AderError, digits, image_folder
from ader.deploy import (ader_export, check_onnx, compare_int8, costs, model_card, onnx_session,
                         push_to_hub, run_onnx, to_int8, to_onnx, _StraightThrough, _data_for)
from ader.evaluation import evaluate
from ader.networks import small_resnet, wide_resnet
from ader.teachers import attach_attention


@pytest.fixture(scope='module')
def dls(): return digits(device='cpu')

@pytest.fixture(scope='module')
def student(natural):
    net = copy.deepcopy(natural)
    verdict = 'Passed all 8 sanity checks.'
    net.metadata['test'] = dict(clean=0.9, FGSM=0.25, PGD_sat=0.125, images=200, verdict=verdict)
    return net

@pytest.fixture(scope='module')
def file(student):
    "Made of a network in training mode, which is left as it was."
    before = {k: v.clone() for k,v in student.train().state_dict().items()}
    try: return to_onnx(student)
    finally:
        assert student.training and student.eval() is student
        assert all(torch.equal(v, before[k]) for k,v in student.state_dict().items())

@pytest.fixture(scope='module')
def file8(file, dls): return to_int8(file, dls.train.dataset[:100][0])

@pytest.fixture(scope='module')
def saved(student, tmp_path_factory):
    out = tmp_path_factory.mktemp('saved')/'student'
    save(student, out/'student')
    return out

@pytest.fixture(scope='module')
def export(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')/'export'
    save(load(saved/'student'), saved.parent/'other'/'teacher')
    ader_export(str(saved), onnx=True, attention=True, int8=True, beside=str(saved.parent/'other'),
                calibration=60, images=60, license='apache-2.0', out=str(out))
    return out

@pytest.fixture(scope='module')
def pictures(tmp_path_factory, dls):
    "A few digits as PNG files in folders of classes."
    root = tmp_path_factory.mktemp('pictures')
    x, y = dls.test.dataset[:120]
    for i,(im,k) in enumerate(zip((255*x[:,0]).round().byte().numpy(), y.tolist())):
        (root/str(k)).mkdir(exist_ok=True)
        Image.fromarray(im).save(root/str(k)/f'{i}.png')
    return root


# The file

small = partial(small_resnet, width=4)
NETS = {'input adapter': (lambda: InputAdapter(add_attention(small()), 1, 8), [3,20,17]),
        'deepmind': (lambda: wide_resnet(10, 1, variant='deepmind'), [3,16,16])}

@pytest.mark.parametrize('name', NETS)
def test_every_kind_of_network_and_any_number_of_images(name):
    make, image = NETS[name]
    net = make().eval()
    seen = name == 'input adapter'
    session = onnx_session(to_onnx(net, seen, image))
    for n in (1, 5, 70):
        x = torch.rand(n, *image)
        with torch.no_grad(): want = forward_with_attention(net, x)
        got = run_onnx(session, x)
        assert len(got) == 1 + seen
        for a,b in zip(got, want): torch.testing.assert_close(a, b, rtol=0, atol=1e-4)

def test_attached_attention(dls):
    net = attach_attention(small(), dls)
    net.metadata['image'] = [1,8,8]
    assert check_onnx(to_onnx(net), net, dls.valid)['changed'] == 0

def test_the_file_says_its_classes_and_nothing_of_this_machine(file, file8, student):
    here = str(Path.cwd()), str(Path(torch.__file__).parent), 'site-packages', '.py"', 'ader/'
    for f in (file, file8):
        about = onnx_session(f).get_modelmeta().custom_metadata_map
        assert json.loads(about['classes']) == student.metadata['classes']
        assert not [o for o in here if o.encode() in f]
        m = onnx.load_from_string(f)
        domains = {o.domain for o in (*m.opset_import, *m.graph.node)}
        assert domains == {''} # every runtime has these operators

def test_check_reads_the_whole_test_split_and_refuses_another_network(file, student, dls):
    found = check_onnx(file, student, dls.test)
    assert found['images'] == 500 and found['changed'] == 0 and found['logits'] < 1e-4
    assert {1, 3} <= set(found['batch_sizes'])
    m = onnx.load_from_string(file)
    w = next(o for o in m.graph.initializer if o.name.endswith('head.2.bias'))
    shifted = onnx.numpy_helper.to_array(w) + np.float32(1e-3)
    w.CopyFrom(onnx.numpy_helper.from_array(shifted, w.name))
    with pytest.raises(AderError, match='not those of the network'):
        check_onnx(m.SerializeToString(), student, dls.test)

def test_wrong_files_and_images(file, tmp_path):
    for n in (0, 100, len(file)-10):
        with pytest.raises(AderError, match='no whole ONNX file'): onnx_session(file[:n])
    with pytest.raises(AderError, match='No such file'): onnx_session(tmp_path/'none.onnx')
    with pytest.raises(AderError, match=r'shape \[1, 8, 8\], got'):
        run_onnx(onnx_session(file), torch.rand(4,3,8,8))
    with pytest.raises(AderError, match=r'image=\[3,32,32\]'): to_onnx(small())
    with pytest.raises(AderError, match='no attention'): to_onnx(small(), True, [1,8,8])


# int8

@pytest.mark.parametrize('x', [torch.rand(4,3,8,8), torch.rand(1,8,8), torch.rand(4,1,8,8)*255,
                               torch.full((4,1,8,8), torch.nan), torch.zeros(0,1,8,8)])
def test_calibration_images_that_cannot_be_right(file, x):
    with pytest.raises(AderError): to_int8(file, x)

def test_int8_is_small_close_and_quantised_per_channel(file, file8, dls):
    x, y = dls.test.dataset[:]
    z, z8 = [run_onnx(onnx_session(f), x)[0] for f in (file, file8)]
    assert len(file8) < len(file) and (z - z8).abs().mean() < 0.15*z.std()
    assert ((z8.argmax(1) == y).float().mean() - (z.argmax(1) == y).float().mean()).abs() < 0.03
    m = onnx.load_from_string(file8)
    by = {o.name: onnx.numpy_helper.to_array(o) for o in m.graph.initializer}
    scaled = [n.input for n in m.graph.node if n.op_type == 'DequantizeLinear' and n.input[0] in by]
    convs = [(by[w], by[s]) for w,s,*_ in scaled if by[w].ndim == 4]
    assert convs and all(w.dtype == np.int8 and s.shape == w.shape[:1] for w,s in convs)

def test_straight_through_has_the_output_of_int8_and_the_gradient_of_float(student, file8, dls):
    x, y = dls.test.dataset[:30]
    net, z8 = _StraightThrough(student, file8), run_onnx(onnx_session(file8), x)[0]
    torch.testing.assert_close(net(x), z8, rtol=0, atol=1e-5)
    z = x.clone().requires_grad_()
    got, = torch.autograd.grad(F.cross_entropy(net(z), y, reduction='sum'), z)
    by_logits = z8.softmax(1) - torch.eye(10)[y] # the derivative at the int8 logits
    by_hand, = torch.autograd.grad((student(z)*by_logits).sum(), z)
    torch.testing.assert_close(got, by_hand, rtol=1e-4, atol=1e-6)

def test_compare_int8(student, file8, dls):
    t = compare_int8(student, file8, dls.test, Threat(0.1), images=80, progress=False)
    rows = ['clean', 'PGD on float32', 'PGD through int8', 'worst case']
    assert list(t) == ['float32', 'int8'] and t['int8'].attack.tolist() == rows
    white = evaluate(student, dls.test, [PGD_sat(Threat(0.1))], images=80, progress=False)
    # made on the network itself, but without early stopping
    assert 0 <= t['float32'].accuracy[1] - white.accuracy[1] <= 0.05
    x, y = dls.test.dataset[:80]
    right = run_onnx(onnx_session(file8), x)[0].argmax(1) == y
    assert t['int8'].accuracy[0] == pytest.approx(right.float().mean().item())
    assert t['int8'].accuracy[3] <= t['int8'].accuracy[1:3].min() < t['int8'].accuracy[0]

def test_costs(student, file, file8):
    nets = {'student': (student, file), 'student int8': (student, file8)}
    d = costs(nets, torch.rand(1,1,8,8), rounds=3)
    assert d.index.tolist() == list(nets) and d.bytes.tolist() == [len(file), len(file8)]
    assert d.ratio['student'] == 1 and d.ms.gt(0).all()
    assert d.multiply_adds.nunique() == d.parameters.nunique() == 1


# The folder and the card

def test_the_folder(export, saved):
    files = ['README.md', 'classify.py', 'export.json', 'student.json', 'student.onnx',
             'student.safetensors', 'student_int8.onnx']
    assert sorted(o.name for o in export.iterdir()) == files
    weights = 'student.safetensors'
    assert (export/weights).read_bytes() == (saved/weights).read_bytes()
    outputs = onnx_session(export/'student.onnx').get_outputs()
    assert [o.name for o in outputs] == ['logits', 'attention']
    r = json.loads((export/'export.json').read_text())
    check = r['check']
    assert check['images'] == 500 and check['changed'] == 0 and check['attention'] < 1e-4
    assert [o['network'] for o in r['costs']] == ['student', 'student int8', 'other']
    assert {o['images'] for o in r['int8']['tables']['int8']} == {60}
    assert r['int8']['calibration'] == 60

def test_the_model_card_is_what_the_hub_reads(export):
    card = hub.ModelCard.load(export/'README.md')
    data, results = card.data, card.data.eval_results
    assert data.library_name == 'ader-distill' and data.license == 'apache-2.0'
    assert 'onnx' in data.tags
    scores = {o.metric_name: o.metric_value for o in results}
    assert scores == dict(clean=90, FGSM=25, PGD_sat=12.5)
    kinds = {(o.dataset_name, o.task_type, o.dataset_split) for o in results}
    assert kinds == {('digits', 'image-classification', 'test')}

def test_what_the_model_card_says(export):
    text = (export/'README.md').read_text()
    for words in ('## Robustness', '## Threat model', '## Limits', '## int8', '## Costs',
                  'Passed all 8 sanity checks', 'each pixel by at most ε = 0.2', '| other |',
                  '| PGD_sat | 12.5 | 8.6 to 17.8 |', '| PGD through int8 |',
                  'no prediction changes'):
        assert words in text, words

def test_a_card_without_results_says_so():
    text = model_card(small(), 'untested')
    assert 'was not measured' in text and 'assume that it has no robustness' in text
    assert 'model-index' not in text

@pytest.mark.parametrize('metadata', [
    dict(threat='much'), dict(threat=dict(eps=-1)), dict(test=[1]), dict(versions=3),
    dict(classes=7), dict(test=dict(clean=0.5, images='many'))])
def test_metadata_that_is_damaged(metadata):
    net = small()
    net.metadata = metadata
    with pytest.raises(AderError, match='metadata of this network is damaged'): model_card(net)

def test_without_onnx_only_weights_and_card(saved, tmp_path):
    ader_export(str(saved/'student.json'), out=str(tmp_path/'out'))
    names = sorted(o.name for o in (tmp_path/'out').iterdir())
    assert names == ['README.md', 'student.json', 'student.safetensors']

MISUSE = '''
nowhere --onnx | there is no file
. --onnx | must hold one saved network
student --int8 | give --onnx too
student --onnx --calibration 0 | --calibration
student --onnx --eps much | 8/255
student --onnx --data cifar11 | a folder of images, not
student --onnx --beside nowhere | there is no file
student --onnx --out file | can't write to the folder
hurt --onnx | is damaged
student --images -1 | not negative
'''.strip().splitlines()

@pytest.mark.parametrize('case', MISUSE)
def test_misuse_is_one_line_and_leaves_nothing(case, saved, tmp_path, monkeypatch, capsys):
    argv, says = case.split(' | ')
    monkeypatch.chdir(tmp_path)
    for name in ('student', 'hurt'): save(load(saved/'student'), Path(name)/'student')
    Path('hurt/student.safetensors').write_bytes(b'half')
    Path('file').write_text('whole')
    before = {o for o in tmp_path.rglob('*') if o.is_file()}
    with pytest.raises(SystemExit) as e: command(f'ader_export {argv}')
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count('\n') == 1
    assert err.startswith('ader_export: ') and says in err
    assert {o for o in tmp_path.rglob('*') if o.is_file()} == before

def test_a_file_that_fails_its_check_is_not_written(saved, file, tmp_path, monkeypatch):
    other = load(saved/'student')
    with torch.no_grad():
        for p in other.parameters(): p.mul_(1.01)
    save(other, tmp_path/'other')
    monkeypatch.setattr('ader.deploy.to_onnx', lambda *args, **kwargs: file)
    with pytest.raises(AderError, match='not those of the network'):
        ader_export(str(tmp_path/'other'), onnx=True, out=str(tmp_path/'out'))
    assert list((tmp_path/'out').iterdir()) == []

@pytest.mark.parametrize('module, extra', [('onnx', 'onnx'), ('onnxruntime', 'onnx'),
                                           ('huggingface_hub', 'hub')])
def test_without_an_extra(saved, tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AderError, match=rf"pip install 'ader-distill\[{extra}\]'"):
        more = dict(onnx=True) if extra == 'onnx' else dict(push='me/it')
        ader_export(str(saved), **more, out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_the_images_of_a_network(saved, pictures):
    net = load(saved)
    assert _data_for(net).test.dataset.name == 'digits'
    ds = _data_for(net, str(pictures)).test.dataset # size, channels and classes from the metadata
    assert ds.x.shape[1:] == (1,8,8) and ds.classes == net.metadata['classes']
    cases = {'say by --data': dict(data='holidays'), 'has image': dict(image=[3,32,32]),
             'has classes': dict(classes=list('abcdefghij'))}
    for says,more in cases.items():
        net.metadata = {**load(saved).metadata, **more}
        with pytest.raises(AderError, match=says): _data_for(net)


# The program

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "Runs Python where there is nothing but the standard library, onnxruntime, numpy and pillow."
    here = tmp_path_factory.mktemp('alone')
    for m,libs in ((onnxruntime, 'onnxruntime'), (np, 'numpy'), (PIL, 'pillow')):
        folder = Path(m.__file__).parent
        for o in (folder, *folder.parent.glob(f'{libs}.libs')): (here/o.name).symlink_to(o)
    start = (f'import runpy, sys; sys.path.insert(0, {str(here)!r}); sys.argv = sys.argv[1:]; '
             'runpy.run_path(sys.argv[0], run_name="__main__")')
    python = [sys.executable, '-I', '-S', '-c', start]
    return lambda *argv: subprocess.run([*python, *map(str, argv)], capture_output=True, text=True)

def test_alone_is_alone(alone, tmp_path):
    tests = [f'try: import {m}\nexcept ImportError: print("none")'
             for m in ('ader', 'torch', 'onnx', 'fastai')]
    (tmp_path/'t.py').write_text('import numpy, PIL, onnxruntime\n' + '\n'.join(tests))
    assert alone(tmp_path/'t.py').stdout == 'none\n'*4

def test_classify_sees_pictures_as_ader_does(alone, export, tmp_path):
    "Turned by the camera, grey, 16 bits, transparent, too large: the same pixels, the same output."
    rng = np.random.default_rng(0)
    im = rng.integers(0, 256, (40,30,4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    rgb, grey = Image.fromarray(im[:,:,:3]), Image.fromarray(im[:,:,0])
    for k in ('a', 'b'): (tmp_path/'p'/k).mkdir(parents=True)
    deep = Image.fromarray(rng.integers(0, 65536, (16,12), dtype=np.uint16))
    clear = Image.fromarray(im)
    files = {'a/1.png': rgb, 'a/3.png': grey, 'b/4.png': deep, 'b/5.png': clear,
             'b/6.png': clear.convert('LA')}
    for k,o in files.items(): o.save(tmp_path/'p'/k)
    rgb.save(tmp_path/'p'/'a'/'2.jpg', exif=exif)
    dls = image_folder(tmp_path/'p', (16,12), valid=1, test=1, device='cpu')
    x = torch.cat([dl.dataset[:][0] for dl in dls.loaders])
    net = add_attention(small(in_channels=3)).eval()
    net.metadata = dict(classes=[f'class {i}' for i in range(10)])
    (tmp_path/'n.onnx').write_bytes(to_onnx(net, image=[3,16,12]))
    with torch.no_grad(): p, k = net(x).softmax(1).max(1)
    r = alone(export/'classify.py', tmp_path/'n.onnx', *(tmp_path/'p').rglob('*.*'))
    assert r.stderr == '' and len(x) == 6
    want = [f'class {i} ({v:.0%})' for i,v in zip(k.tolist(), p.tolist())]
    assert sorted(l.split(': ')[1] for l in r.stdout.splitlines()) == sorted(want)

def test_classify_knows_the_classes(alone, export, pictures, student, dls):
    files = sorted(pictures.rglob('*.png'), key=lambda f: int(f.stem))[:40]
    with torch.no_grad(): k = student(dls.test.dataset[:40][0]).argmax(1)
    r = alone(export/'classify.py', export/'student.onnx', *files)
    names = student.metadata['classes']
    want = [f'{f}: {names[i]}' for f,i in zip(files, k)]
    assert [l.split(' (')[0] for l in r.stdout.splitlines()] == want


# The Hub

class Hub:
    "The part of the Hugging Face Hub that an upload and a download talk to, on this machine."
    def __init__(self, refuse=None, files={}):
        seen = self.seen = []
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self):
                *_,name = self.path.split('/')
                if self.path.startswith('/api/models/me/it/revision'):
                    return self.answer(200, dict(id='me/it', sha='0'*40, siblings=[dict(rfilename=f) for f in files]))
                if self.path.startswith('/api/models/me/it/tree'):
                    return self.answer(200, [dict(type='file', path=f, size=len(b), oid='0'*40) for f,b in files.items()])
                if '/resolve/' in self.path and name in files: return self.file(files[name])
                self.answer(404, {'error': 'not here'})
            do_HEAD = do_GET
            def file(self, data):
                self.send_response(200)
                for k,v in {'Content-Length': len(data), 'X-Repo-Commit': '0'*40,
                            'ETag': f'"{hashlib.sha256(data).hexdigest()}"'}.items():
                    self.send_header(k, str(v))
                self.end_headers()
                if self.command == 'GET': self.wfile.write(data)
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                seen.append((self.path, self.headers.get('Authorization'), body))
                if refuse: return self.answer(refuse, {'error': 'no'})
                url, part = f'http://{self.headers["Host"]}/me/it', self.path.split('/')[-2]
                if part == 'preupload':
                    files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                             for f in json.loads(body)['files']]
                    return self.answer(200, {'files': files})
                if part == 'commit':
                    d = dict(success=True, commitOid='0'*40, commitUrl=f'{url}/commit/{"0"*40}')
                    return self.answer(200, d)
                known = {'/api/repos/create': dict(url=url, name='me/it'),
                         '/api/validate-yaml': dict(warnings=[], errors=[])}
                self.answer(200 if self.path in known else 404, known.get(self.path, {}))
            def answer(self, code, d):
                data = json.dumps(d).encode()
                self.send_response(code)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(data)))
                self.end_headers()
                self.wfile.write(data)
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self
    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()

@pytest.fixture
def at_hub(monkeypatch):
    "Lets huggingface_hub talk to another address."
    def to(url):
        api = hub.HfApi(url, 'hf_secret')
        for f in ('create_repo', 'upload_folder', 'snapshot_download'): monkeypatch.setattr(hub, f, getattr(api, f))
    return to

def test_push_sends_every_file_whole(export, at_hub):
    (export/'.README.md.99').write_text('left by a killed write')
    try:
        with Hub() as h:
            at_hub(f'http://127.0.0.1:{h.server.server_address[1]}')
            assert push_to_hub(export, 'me/it', private=True).endswith('/me/it')
    finally: (export/'.README.md.99').unlink()
    made = json.loads(next(b for p,_,b in h.seen if p == '/api/repos/create'))
    assert made['name'] == 'it' and made['organization'] == 'me'
    assert made.get('private') or made.get('visibility') == 'private'
    assert {a for _,a,_ in h.seen} == {'Bearer hf_secret'}
    lines = [json.loads(o) for o in next(b for p,_,b in h.seen if '/commit/' in p).splitlines()]
    sent = [o['value'] for o in lines if o['key'] == 'file']
    sent = {o['path']: base64.b64decode(o['content']) for o in sent}
    assert sent == {o.name: o.read_bytes() for o in export.iterdir()}

def test_push_refused(export, at_hub):
    with Hub(401) as h:
        at_hub(f'http://127.0.0.1:{h.server.server_address[1]}')
        with pytest.raises(AderError, match='could not push'): push_to_hub(export, 'me/it')
    at_hub('http://127.0.0.1:9')
    for repo in ('me/it', 'a/b/c'):
        with pytest.raises(AderError, match='could not push'): push_to_hub(export, repo)
    with pytest.raises(AderError, match='no README.md'): push_to_hub(export.parent, 'me/it')

def test_a_network_of_the_hub(export, student, dls, at_hub, tmp_path, monkeypatch):
    "Weights and description come, nothing else, and the network answers as it did here."
    files = {o.name: o.read_bytes() for o in export.iterdir()}
    with Hub(files=files) as h:
        at_hub(f'http://127.0.0.1:{h.server.server_address[1]}')
        fetch = hub.snapshot_download
        monkeypatch.setattr(hub, 'snapshot_download', lambda *args, **kw: fetch(*args, cache_dir=tmp_path, **kw))
        net = load('hf://me/it')
    x = dls.test.dataset[:10][0]
    with torch.no_grad(): assert torch.equal(net(x), student.eval()(x))
    assert {f.suffix for f in tmp_path.rglob('*.*') if f.is_file() and 'snapshots' in f.parts} == {'.safetensors', '.json'}

def test_no_network_of_the_hub(at_hub, monkeypatch, tmp_path):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    at_hub('http://127.0.0.1:9')
    with pytest.raises(AderError, match='hf://me/it could not be fetched'): load('hf://me/it')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(AderError, match="ader-distill.hub"): load('hf://me/it')
