"What the README shows must run as it stands."
import numpy as np, pytest, re, shlex
from PIL import Image
from ader.attacks import PGD
from ader.checkpoints import load
from ader.cli import command
from pathlib import Path
from nbdev.config import get_config


def test_the_code_of_the_readme_runs(monkeypatch):
    "As it stands, but attacks have two steps in training and validation, which is quicker."
    quick = lambda threat, steps, step_size=None, *args, **kw: PGD(threat, 2, 5/8*threat.eps, *args, **kw)
    monkeypatch.setattr('ader.training.PGD', quick)
    code = re.search(r'```py\n(.*?)```', (Path(get_config().config_path)/'README.md').read_text(), re.S)[1]
    scope = {}
    body, last = code.strip().rsplit('\n', 1)
    exec(body, scope)
    d = eval(last, scope)
    assert d.ok and d['clean'] > 0.9 and d['PGD_sat'] > 0.15

@pytest.fixture
def photographs(tmp_path):
    "Two classes of small pictures: stripes across, and stripes down."
    rng, t = np.random.default_rng(0), np.arange(32)/32
    for c,axis in (('across', 0), ('down', 1)):
        (tmp_path/'photos'/c).mkdir(parents=True)
        for i in range(12):
            wave = 128 + 80*np.sin(2*np.pi*(4*t + rng.random()))
            pixels = np.expand_dims(wave, (1 - axis, 2)) + rng.normal(0, 20, (32, 32, 3))
            im = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            im.save(tmp_path/'photos'/c/f'{i}.{"jpg" if i % 2 else "png"}')
    return tmp_path/'photos'

def test_the_commands_of_the_readme_run(photographs, tmp_path, monkeypatch, capsys):
    "As they stand, FOLDER replaced by a folder; but trainings are of one epoch."
    blocks = re.findall(r'```sh\n(.*?)```', (Path(get_config().config_path)/'README.md').read_text(), re.S)
    block, = [b for b in blocks if 'FOLDER' in b]
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        name, *argv = shlex.split(line.replace('FOLDER', str(photographs)), comments=True)
        if name != 'ader_evaluate': argv += ['--epochs', '1']
        command([name, *argv])
    out = capsys.readouterr().out
    assert 'AutoAttack' in out and re.search(r'Passed all \d+ sanity checks', out)
    assert load(tmp_path/'student'/'student').metadata['classes'] == ['across', 'down']
