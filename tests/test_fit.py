"One command from images to a classifier: what it writes, how it goes on, what it refuses."
import json, numpy as np, pytest
from PIL import Image
from ader.checkpoints import load
from ader.cli import command
from ader.data import AderError, Images, dataloaders, digits
from ader.fit import ader_fit, _Clock, _describe
import torch
from types import SimpleNamespace

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Unbalanced, jpg and png mixed, no split."
    root, rng, t = tmp_path_factory.mktemp('photos'), np.random.default_rng(0), np.arange(32)/32
    for c,axis,n in (('across', 0, 40), ('down', 1, 12)):
        (root/c).mkdir()
        for i in range(n):
            wave = 128 + 80*np.sin(2*np.pi*(4*t + rng.random()))
            pixels = np.expand_dims(wave, (1 - axis, 2)) + rng.normal(0, 20, (32, 32, 3))
            im = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            im.save(root/c/f'{i}.{"jpg" if i % 2 else "png"}')
    return root

class Killed(BaseException): pass

@pytest.fixture(scope='module')
def done(photos, tmp_path_factory):
    "Killed after the student's first epoch, and given again."
    out, note, seen = tmp_path_factory.mktemp('out'), _Clock.note, []
    argv = [str(photos), '--minutes', '0.55', '--out', str(out), '--eps', '8/255', '--method', 'ADERPlus']
    def killer(self, **plan):
        note(self, **plan)
        if not plan and 'student' in self.plan: seen.append(self.used)
        if len(seen) == 1: raise Killed
    mp = pytest.MonkeyPatch()
    mp.setattr(_Clock, 'note', killer)
    with pytest.raises(Killed): command(['ader_fit', *argv])
    mp.undo()
    before = json.loads((out/'plan.json').read_text())
    command(['ader_fit', *argv])
    return out, argv, before

def test_all_is_there(done):
    out, *_ = done
    names = {o.name for o in out.iterdir()}
    assert names >= {'report.html', 'record.json', 'plan.json', 'student.safetensors', 'student.json',
                     'student.onnx', 'classify.py', 'README.md'}
    r = json.loads((out/'record.json').read_text())
    m = load(out/'student').metadata
    assert m['method'] == 'ADERPlus' and m['classes'] == ['across', 'down'] and m['image'] == [3,32,32]
    assert r['plan']['student']['epochs'] == m['epochs'] and r['results'][0]['attack'] == 'clean'

def test_its_clock_continued(done):
    out, _, before = done
    after = json.loads((out/'plan.json').read_text())
    assert after['used'] > before['used'] > 0 and after['plan']['student'] == before['plan']['student']

def test_given_again_it_is_finished(done, capsys):
    out, argv, _ = done
    files = {o: o.read_bytes() for o in out.iterdir() if o.is_file()}
    command(['ader_fit', *argv])
    assert 'finished' in capsys.readouterr().out
    assert {o: o.read_bytes() for o in out.iterdir() if o.is_file()} == files
    with pytest.raises(AderError, match='another command'): ader_fit(argv[0], 5, str(out), eps='8/255')

def test_a_saved_teacher_is_taken(done, photos, tmp_path, capsys, monkeypatch):
    "Where there is no ONNX, too."
    out, *_ = done
    monkeypatch.setattr('ader.fit.importlib', SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    ader_fit(str(photos), 0.3, str(tmp_path/'x'), 'RSLAD', robust=str(out/'parts'/'robust.json'))
    said = capsys.readouterr().out
    assert 'robust teacher:' not in said and 'clean teacher' not in said and 'student:' in said
    assert not (tmp_path/'x'/'parts'/'clean.json').exists()
    assert 'for an ONNX file: pip install' in said and not (tmp_path/'x'/'student.onnx').exists()

def test_what_is_refused(tmp_path):
    out = str(tmp_path/'x')
    for kw,match in ((dict(minutes=0), 'must be above 0'), (dict(method='ADERR'), 'must be one of'),
                     (dict(data=str(tmp_path/'nothing')), 'data is digits'), (dict(eps='-1'), 'above 0'),
                     (dict(student='small_resnett'), 'no network is called'),
                     (dict(robust='small_resnet:widht=3'), 'not the arguments')):
        with pytest.raises(AderError, match=match): ader_fit(**dict(data='digits', out=out) | kw)
    assert not (tmp_path/'x'/'parts').exists()

def test_a_teacher_of_other_classes_is_refused_at_once(done, tmp_path, capsys):
    out, *_ = done
    with pytest.raises(AderError, match='2 classes and the student 10'):
        ader_fit('digits', 1, str(tmp_path/'x'), robust=str(out/'parts'/'robust.json'))
    assert 'epoch' not in capsys.readouterr().out

def test_a_foreign_plan_is_refused(tmp_path):
    (tmp_path/'plan.json').write_text('{}')
    with pytest.raises(AderError, match='another command'): ader_fit('digits', 1, str(tmp_path))

def test_balance_is_reported():
    y = torch.tensor([0]*30 + [1]*5)
    images = Images(torch.rand(35, 3, 8, 8), y, ['many', 'few'])
    assert "less for 'few'" in _describe(dataloaders(images, images, images))
    assert 'unbalanced' not in _describe(digits())

def test_a_slow_machine_keeps_more_for_judging(tmp_path):
    clock = _Clock(tmp_path/'plan.json', 2)
    kept = lambda step: clock.left - clock.for_training(step)
    assert kept(0.) == pytest.approx(25, abs=0.5) and kept(0.002) == pytest.approx(53, abs=0.5)
    assert clock.for_training(1.) == 0
    assert _Clock(tmp_path/'hour.json', 60).for_training(0.002) == pytest.approx(60*60*7/8, abs=0.5)
