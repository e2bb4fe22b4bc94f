"An exported student: the file answers as the network does, says what was measured, needs nothing of ader, and is whole or not there."
import base64, json, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np, pytest, torch
from hypothesis import given, strategies as st
pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
pytest.importorskip('onnxscript', reason='the extra onnx is not installed')
hub = pytest.importorskip('huggingface_hub', reason='the extra hub is not installed')
import onnx
from PIL import Image
from ader.attacks import PGD_sat, Threat
from ader.attention import Adapt, attend, look
from ader.data import AderError, decode_image, digits
from ader.deploy import (CLASSIFY, StraightThrough, ader_export, ader_export_cli, answers, before_after, check_onnx, costs, data_of, find_saved, model_card,
                         push_to_hub, session, side_by_side, to_int8, to_onnx)
from ader.evaluation import measure
from ader.networks import small_resnet, wide_resnet
from ader.teachers import adopt, load, save, teach


@pytest.fixture(scope='module')
def student():
    net = teach('natural', small_resnet(width=8), digits(device='cpu'), 2, progress=False)
    net.card['test'] = dict(clean=0.9, FGSM=0.25, PGD_sat=0.125, images=200, verdict='Passed all 8 sanity checks.')
    return net

@pytest.fixture(scope='module')
def test_images(): return digits(device='cpu').test

@pytest.fixture(scope='module')
def file(student): return to_onnx(student)

@pytest.fixture(scope='module')
def file8(file, test_images): return to_int8(file, digits(device='cpu').train.dataset[:100][0])

@pytest.fixture(scope='module')
def saved(student, tmp_path_factory):
    out = tmp_path_factory.mktemp('saved')/'student'
    save(student, out/'student')
    return out

@pytest.fixture(scope='module')
def export(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp('out')/'export'
    save(load(saved/'student'), saved.parent/'teacher'/'teacher')
    ader_export(str(saved), onnx=True, attention=True, int8=True, beside=str(saved.parent/'teacher'), calibration=60, images=60, license='apache-2.0', out=str(out))
    return out

@pytest.fixture(scope='module')
def pictures(tmp_path_factory, test_images):
    "A few digits as PNG files in folders of classes, and their pixels."
    root = tmp_path_factory.mktemp('pictures')
    x, y = test_images.dataset[:120]
    for i,(im,k) in enumerate(zip((255*x[:,0]).round().byte().numpy(), y.tolist())):
        (root/str(k)).mkdir(exist_ok=True)
        Image.fromarray(im).save(root/str(k)/f'{i}.png')
    return root


NETS = {'attended': (lambda: attend(small_resnet(width=4)), [1,8,8]), 'plain': (lambda: small_resnet(width=4), [1,8,8]), 'adapted': (lambda: Adapt(attend(small_resnet(width=4)), 1, 8), [3,20,17]),
        'deepmind': (lambda: wide_resnet(10, 1, variant='deepmind'), [3,16,16])}

@pytest.mark.parametrize('name', NETS)
def test_every_kind_of_network(name):
    make, image = NETS[name]
    net, x = make().eval(), torch.rand(5, *image)
    with torch.no_grad(): want = look(net, x)
    seen = want.attention is not None
    got = answers(session(to_onnx(net, attention=seen, image=image)), x)
    assert len(got) == 1 + seen
    for g,o in zip(got, want): torch.testing.assert_close(g, o, rtol=0, atol=1e-4)


def test_an_adopted_network(small):
    dls = small()
    net = adopt(small_resnet(width=4), dls, progress=False)
    net.card['image'] = [1,8,8]
    assert check_onnx(to_onnx(net), net, dls.valid)['changed'] == 0


def test_export_leaves_the_network_alone(student):
    student.train()
    try:
        before = {k: v.clone() for k,v in student.state_dict().items()}
        to_onnx(student)
        assert student.training and all(torch.equal(v, before[k]) for k,v in student.state_dict().items())
    finally: student.eval()


def test_any_number_of_images(file, student):
    s = session(file)
    @given(st.integers(1, 70))
    def check(n):
        x = torch.rand(n, 1, 8, 8)
        with torch.no_grad(): torch.testing.assert_close(answers(s, x)[0], student(x), rtol=0, atol=1e-4)
    check()


def test_the_file_says_its_classes_and_nothing_of_this_machine(file, file8, student):
    for f in (file, file8):
        assert json.loads(session(f).get_modelmeta().custom_metadata_map['classes']) == student.card['classes']
        for secret in (str(Path.cwd()), str(Path(torch.__file__).parent), 'site-packages', '.py"', 'ader/'): assert secret.encode() not in f
        assert {o.domain for o in (*onnx.load_from_string(f).opset_import, *onnx.load_from_string(f).graph.node)} == {''} # every runtime knows them


def test_check_reads_the_whole_test_split_and_refuses_another_network(file, student, test_images):
    found = check_onnx(file, student, test_images)
    assert found['images'] == 500 and found['changed'] == 0 and found['logits'] < 1e-4 and {1, 3} <= set(found['batch_sizes'])
    m = onnx.load_from_string(file)
    w = next(o for o in m.graph.initializer if o.name.endswith('head.2.bias'))
    w.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(w) + np.float32(1e-3), w.name))
    with pytest.raises(AderError, match='does not answer as the network does'): check_onnx(m.SerializeToString(), student, test_images)


def test_a_damaged_file(file, tmp_path):
    for n in (0, 1, 100, len(file)//2, len(file)-10):
        (tmp_path/'f.onnx').write_bytes(file[:n])
        with pytest.raises(AderError, match='damaged, or no ONNX file'): session(tmp_path/'f.onnx')
    with pytest.raises(AderError, match="can't read"): session(tmp_path/'none.onnx')


@pytest.mark.parametrize('x', [torch.rand(4,3,8,8), torch.rand(4,1,9,8), torch.rand(1,8,8), torch.rand(4,1,8,8)*255, torch.full((4,1,8,8), torch.nan), torch.zeros(0,1,8,8),
                               torch.zeros(4,1,8,8, dtype=torch.uint8)])
def test_calibration_images_that_cannot_be_right(file, x):
    with pytest.raises(AderError): to_int8(file, x)


def test_int8_is_small_close_and_has_whole_numbers_per_channel(file, file8, test_images):
    x, y = test_images.dataset[:]
    z, z8 = answers(session(file), x)[0], answers(session(file8), x)[0]
    assert len(file8) < len(file) and (z - z8).abs().mean() < 0.15*z.std()
    assert ((z8.argmax(1) == y).float().mean() - (z.argmax(1) == y).float().mean()).abs() < 0.03
    m = onnx.load_from_string(file8)
    by = {o.name: onnx.numpy_helper.to_array(o) for o in m.graph.initializer}
    convs = [n for n in m.graph.node if n.op_type == 'DequantizeLinear' and by.get(n.input[0]) is not None and by[n.input[0]].ndim == 4]
    assert convs and all(by[n.input[0]].dtype == np.int8 and by[n.input[1]].shape == (by[n.input[0]].shape[0],) for n in convs)


def test_straight_through_has_the_answers_of_the_one_and_the_gradient_of_the_other(student, file8, test_images):
    x, y = test_images.dataset[:30]
    net = StraightThrough(student, file8)
    z8 = answers(session(file8), x)[0]
    torch.testing.assert_close(net(x), z8, rtol=0, atol=1e-5)
    z, v = x.clone().requires_grad_(), torch.randn(30, 10)
    torch.testing.assert_close(*[torch.autograd.grad((f(z)*v).sum(), z)[0] for f in (net, student)])
    loss = torch.nn.functional.cross_entropy(net(z), y, reduction='sum') # by hand: the derivative by the logits at those of the 8 bits
    by_hand, = torch.autograd.grad((student(z)*(z8.softmax(1) - torch.eye(10)[y])).sum(), z)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], by_hand, rtol=1e-4, atol=1e-6)


def test_before_and_after(student, file8, test_images):
    t = before_after(student, file8, test_images, Threat(0.1), 5, 80)
    assert list(t) == ['float32', 'int8'] and t['int8'].attack.tolist() == ['clean', 'PGD on float32', 'PGD through int8', 'worst case']
    white = measure(student, test_images, [PGD_sat(Threat(0.1), 5)], images=80, progress=False)
    assert t['float32'].accuracy[1] == white.accuracy[1] # made on itself: not a transfer
    clean8 = (answers(session(file8), test_images.dataset[:80][0])[0].argmax(1) == test_images.dataset[:80][1]).float().mean().item()
    assert t['int8'].accuracy[0] == pytest.approx(clean8)
    assert t['int8'].accuracy[3] <= t['int8'].accuracy[1:3].min() < t['int8'].accuracy[0]


def test_costs(student, file, file8):
    d = costs({'student': student, 'other': student}, {'student': file, 'student int8': file8, 'other': file}, torch.rand(1,1,8,8), rounds=5)
    assert d.bytes.tolist() == [len(file), len(file8), len(file)] and d.ratio['student'] == 1 and d.ms.gt(0).all()
    assert d.multiply_adds.nunique() == d.parameters.nunique() == 1


def test_turns():
    wait = threading.Event()
    d = side_by_side({'a': lambda: wait.wait(0.004), 'b': lambda: wait.wait(0.012)}, rounds=5)
    assert 2 < d.ratio['b'] < 4 and d.index.tolist() == ['a', 'b']


def test_the_folder(export, saved, file):
    assert sorted(o.name for o in export.iterdir()) == ['README.md', 'classify.py', 'export.json', 'student.json', 'student.onnx', 'student.safetensors', 'student_int8.onnx']
    assert (export/'student.safetensors').read_bytes() == (saved/'student.safetensors').read_bytes()
    assert [o.name for o in session(export/'student.onnx').get_outputs()] == ['logits', 'attention']
    r = json.loads((export/'export.json').read_text())
    assert r['check']['images'] == 500 and r['check']['changed'] == 0 and r['check']['attention'] < 1e-4
    assert [o['network'] for o in r['costs']] == ['student', 'student int8', 'teacher']
    assert {o['images'] for o in r['int8']['tables']['int8']} == {60} and r['int8']['calibration'] == 60


def test_the_model_card_is_what_the_hub_reads(export, student):
    card = hub.ModelCard.load(export/'README.md')
    assert card.data.library_name == 'ader' and card.data.license == 'apache-2.0' and card.data.pipeline_tag == 'image-classification' and 'onnx' in card.data.tags
    assert {o.metric_name: o.metric_value for o in card.data.eval_results} == {'Accuracy': 90, 'Accuracy, FGSM': 25, 'Accuracy, PGD_sat': 12.5}
    assert {(o.dataset_name, o.task_type, o.dataset_split) for o in card.data.eval_results} == {('digits', 'image-classification', 'test')}
    assert hub.ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    for words in ('## Robustness', '## Threat model', '## Limits', '## Eight bits', '## Costs', 'Passed all 8 sanity checks', 'ε = 0.2', '| PGD through int8 |'): assert words in card.text


def test_a_card_without_results_says_so():
    net = small_resnet(width=4)
    text = model_card(net, 'untested')
    assert 'was not measured' in text and 'assume that it has no robustness' in text and 'model-index' not in text
    assert hub.ModelCard(text).data.library_name == 'ader'


@pytest.mark.parametrize('card', [dict(threat='much'), dict(threat={}), dict(test=[1]), dict(versions=3), dict(classes=7), dict(test=dict(clean=0.5, images='many'))])
def test_a_card_that_is_damaged(card):
    net = small_resnet(width=4)
    net.card = card
    with pytest.raises(AderError, match='card'): model_card(net)


def test_without_onnx_only_weights_and_card(saved, tmp_path):
    ader_export(str(saved/'student.json'), out=str(tmp_path/'out'))
    assert sorted(o.name for o in (tmp_path/'out').iterdir()) == ['README.md', 'student.json', 'student.safetensors']


@pytest.mark.parametrize('argv, says', [(['nowhere', '--onnx'], 'there is no file'), (['.', '--onnx'], 'must hold one saved network'), (['student', '--int8'], 'give --onnx too'),
    (['student', '--onnx', '--calibration', '0'], '--calibration'), (['student', '--onnx', '--eps', 'much'], 'ε is a number'), (['student', '--onnx', '--data', 'cifar11'], 'no folder cifar11'),
    (['student', '--onnx', '--beside', 'nowhere'], 'there is no file'), (['student', '--onnx', '--out', 'file'], "can't write to the folder"), (['student', '--onnx', '--out', '/proc/x'], "can't write"),
    (['hurt', '--onnx'], 'is damaged'), (['student', '--images', '-1'], 'not negative')])
def test_misuse_is_a_sentence_and_leaves_nothing(argv, says, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('student', 'hurt'): save(load(saved/'student'), Path(name)/'student')
    Path('hurt/student.safetensors').write_bytes(b'half'), Path('file').write_text('whole')
    before = sorted(map(str, tmp_path.rglob('*')))
    with pytest.raises(SystemExit) as e: ader_export_cli(argv)
    err = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and len(err) == 1 and err[0].startswith('ader_export: ') and says in err[0]
    assert [o for o in sorted(map(str, tmp_path.rglob('*'))) if o not in before and not o.endswith('/export')] == [] and Path('file').read_text() == 'whole'


def test_a_file_that_fails_its_check_is_not_written(saved, tmp_path, monkeypatch):
    other = to_onnx(small_resnet(width=4), image=[1,8,8])
    monkeypatch.setattr('ader.deploy.to_onnx', lambda *args, **kwargs: other)
    with pytest.raises(AderError, match='does not answer'): ader_export(str(saved), onnx=True, out=str(tmp_path/'out'))
    assert list((tmp_path/'out').iterdir()) == []


@pytest.mark.parametrize('module', ['onnx', 'onnxruntime', 'onnxscript'])
def test_without_the_extra(saved, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AderError, match=r"pip install 'ader\[onnx\]'"): ader_export(str(saved), onnx=True, out=str(tmp_path/'out'))
    assert not (tmp_path/'out').exists()


def test_without_the_hub(export, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(AderError, match=r"pip install 'ader\[hub\]'"): push_to_hub(export, 'me/it')


def test_images_of_the_student(saved, pictures, monkeypatch, tmp_path):
    monkeypatch.setenv('ADER_CACHE', str(tmp_path))
    net = load(find_saved(saved))
    assert data_of(net).test.dataset.name == 'digits'
    dls = data_of(net, str(pictures))
    assert dls.test.dataset.x.shape[1:] == (1,8,8) and dls.test.dataset.classes == net.card['classes']
    net.card['classes'] = list('abcdefghij')
    with pytest.raises(AderError, match='other classes'): data_of(net)
    net.card.update(data='holiday pictures')
    with pytest.raises(AderError, match='say by --data'): data_of(net)
    net.card.update(data='digits', image=[3,32,32])
    with pytest.raises(AderError, match='takes images of shape'): data_of(net)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "Runs Python where there is nothing but the standard library, onnxruntime, numpy and pillow."
    here = tmp_path_factory.mktemp('alone')
    import onnxruntime, PIL
    for m in (onnxruntime, np, PIL):
        for o in Path(m.__file__).parent.parent.glob(f'{"pillow" if m is PIL else m.__name__}.libs'): (here/o.name).symlink_to(o)
        (here/m.__name__).symlink_to(Path(m.__file__).parent)
    return lambda *argv: subprocess.run([sys.executable, '-I', '-S', '-c', f'import sys; sys.path.insert(0, {str(here)!r}); sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name="__main__")',
                                         *map(str, argv)], capture_output=True, text=True)

@pytest.mark.parametrize('module', ['ader', 'torch', 'onnx', 'fastai'])
def test_alone_is_alone(alone, tmp_path, module):
    (tmp_path/'t.py').write_text(f'import numpy, PIL, onnxruntime\nimport {module}')
    assert f"No module named '{module}'" in alone(tmp_path/'t.py').stderr


def test_classify_without_ader(alone, export, pictures, student):
    files = sorted(pictures.rglob('*.png'))[:40]
    r = alone(export/'classify.py', export/'student.onnx', *files)
    x = torch.stack([torch.from_numpy(decode_image(f, (8,8), 1)[0].copy()).permute(2,0,1)/255 for f in files])
    with torch.no_grad(): p = student(x).softmax(1)
    want = [f'{f}: {student.card["classes"][k]} ({v:.0%})' for f,v,k in zip(files, *(o.tolist() for o in p.max(1)))]
    assert r.stderr == '' and r.stdout.splitlines() == want


def test_classify_takes_odd_pictures_as_ader_does(alone, tmp_path):
    net = attend(small_resnet(width=4, in_channels=3)).eval()
    (tmp_path/'n.onnx').write_bytes(to_onnx(net, image=[3,16,12], classes=[f'class {i}' for i in range(10)]))
    (tmp_path/'classify.py').write_text(CLASSIFY)
    rng = np.random.default_rng(0)
    im = rng.integers(0, 256, (40,30,3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6 # the camera was turned
    Image.fromarray(im).save(tmp_path/'a.png'), Image.fromarray(im).save(tmp_path/'b.jpg', exif=exif), Image.fromarray(im[:,:,0]).save(tmp_path/'c.png')
    Image.fromarray(rng.integers(0, 65536, (16,12), dtype=np.uint16)).save(tmp_path/'d.png'), Image.fromarray(im[:16,:12]).convert('RGBA').save(tmp_path/'e.png')
    files = [tmp_path/f for f in ('a.png', 'b.jpg', 'c.png', 'd.png', 'e.png')]
    r = alone(tmp_path/'classify.py', tmp_path/'n.onnx', *files)
    x = torch.stack([torch.from_numpy(decode_image(f, (16,12), 3)[0].copy()).permute(2,0,1)/255 for f in files])
    with torch.no_grad(): p = net(x).softmax(1)
    assert r.stderr == '' and r.stdout.splitlines() == [f'{f}: class {k} ({v:.0%})' for f,v,k in zip(files, *(o.tolist() for o in p.max(1)))]


class Hub:
    "The part of the Hugging Face Hub that an upload talks to, on this machine."
    def __init__(self, refuse=None):
        seen = self.seen = []
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): self.answer(404, {'error': 'not here'})
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
                seen.append((self.path, self.headers.get('Authorization'), body))
                if refuse: return self.answer(refuse, {'error': 'no'})
                if self.path == '/api/repos/create': return self.answer(200, {'url': f'http://{self.headers["Host"]}/me/it', 'name': 'me/it'})
                if self.path == '/api/validate-yaml': return self.answer(200, {'warnings': [], 'errors': []})
                if '/preupload/' in self.path: return self.answer(200, {'files': [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(body)['files']]})
                if '/commit/' in self.path: return self.answer(200, {'success': True, 'commitOid': '0'*40, 'commitUrl': f'http://{self.headers["Host"]}/me/it/commit/{"0"*40}'})
                self.answer(404, {'error': self.path})
            def answer(self, code, d):
                data = json.dumps(d).encode()
                self.send_response(code), self.send_header('Content-Type', 'application/json'), self.send_header('Content-Length', str(len(data))), self.end_headers()
                self.wfile.write(data)
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'
    def __enter__(self): threading.Thread(target=self.server.serve_forever, daemon=True).start(); return self
    def __exit__(self, *args): self.server.shutdown(), self.server.server_close()


def test_push_sends_every_file_whole(export):
    (export/'.README.md.99').write_text('left by a killed write')
    try:
        with Hub() as h: url = push_to_hub(export, 'me/it', private=True, token='hf_secret', endpoint=h.url)
    finally: (export/'.README.md.99').unlink()
    made = json.loads(next(b for p,_,b in h.seen if p == '/api/repos/create'))
    assert made['name'] == 'it' and made['organization'] == 'me' and (made.get('private') or made.get('visibility') == 'private') and url.endswith('/me/it')
    assert {a for _,a,_ in h.seen} == {'Bearer hf_secret'}
    lines = [json.loads(o) for o in next(b for p,_,b in h.seen if '/commit/' in p).splitlines()]
    sent = {o['value']['path']: base64.b64decode(o['value']['content']) for o in lines if o['key'] == 'file'}
    assert sent == {o.name: o.read_bytes() for o in export.iterdir()}


def test_push_refused(export):
    with Hub(401) as h, pytest.raises(AderError, match='could not push .* push again'): push_to_hub(export, 'me/it', token='hf_wrong', endpoint=h.url)
    with pytest.raises(AderError, match='could not push'): push_to_hub(export, 'me/it', token='hf_x', endpoint='http://127.0.0.1:9')
    with pytest.raises(AderError, match='could not push'): push_to_hub(export, 'a/b/c')
    with pytest.raises(AderError, match='there is no model card'): push_to_hub(export.parent, 'me/it')


def test_the_installed_command():
    "In a process of its own: help with units and defaults, and no traceback."
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from ader.deploy import ader_export_cli; ader_export_cli()', '--help'], capture_output=True, text=True)
    words = ' '.join(r.stdout.split())
    assert r.returncode == 0 and '--int8' in words and 'in units of pixels in [0, 1]' in words and '(default: export)' in words
